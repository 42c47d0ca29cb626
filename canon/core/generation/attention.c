// Attention of one query a row over a key-value cache: reads every key and value once, at the speed of memory.
//
// For each row and head: softmax(q k^T / sqrt(d)) v over the row's own length, in float32. The new key and value are
// stored first.

#include "../vectors.h"

INLINE void prefetch(const char *p, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

// sum over t of weights[t] values[t, i ...], `n` vectors of columns at a time
INLINE void weigh(const float *weights, const char *values, int64_t length, int64_t d, int64_t i, int n, float scale,
                  char *y, int half) {
    f32 sum[4] = {{0}};
    for (int64_t t = 0; t < length; t++)
        for (int j = 0; j < n; j++) sum[j] += weights[t] * load(values, t * d + i + j * LANES, half);
    for (int j = 0; j < n; j++) store(y, i + j * LANES, sum[j] * scale, half);
}

// One query head. `scores` has room for the length and LANES more.
INLINE void attend(const char *q, const char *keys, const char *values, int64_t length, int64_t d, float *scores,
                   char *y, int half) {
    float query[d], scale = 1 / sqrtf(d), largest = -INFINITY;
    int64_t row = d * (half ? 2 : 4);
    for (int64_t i = 0; i < d; i += LANES) {
        f32 v = load(q, i, half) * scale;
        memcpy(query + i, &v, sizeof v);
    }
    for (int64_t t = 0; t < length; t++) {
        prefetch(values + t * row, row);  // keys and values come from memory at the same time
        f32 product = {0};
        for (int64_t i = 0; i < d; i += LANES) product += load((char *)query, i, 0) * load(keys, t * d + i, half);
        scores[t] = vsum(product);
        largest = fmaxf(largest, scores[t]);
    }
    for (int64_t t = length; t < length + LANES; t++) scores[t] = -INFINITY;
    f32 sum = {0};
    for (int64_t t = 0; t < length; t += LANES) {
        f32 weight = vexp(load((char *)scores, t, 0) - largest);
        sum += weight;
        store((char *)scores, t, weight, 0);
    }
    int64_t i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES) weigh(scores, values, length, d, i, 4, 1 / vsum(sum), y, half);
    for (; i < d; i += LANES) weigh(scores, values, length, d, i, 1, 1 / vsum(sum), y, half);
}

typedef struct {
    int64_t batch, heads, kv_heads, d, capacity;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;  // strides in elements
    int64_t half, threads;
} Shape;

// q (batch, heads, d), k and v (batch, kv_heads, d); keys and values (batch, kv_heads, capacity, d), of which row b
// holds lengths[b]; y (batch, heads, d). All of them are bfloat16 if half, else float32; d is a multiple of LANES.
void attend_one(const Shape *s, const char *q, const char *k, const char *v, char *keys, char *values,
                const int64_t *lengths, char *y) {
    int64_t size = s->half ? 2 : 4, row = s->d * size, group = s->heads / s->kv_heads;
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t item = 0; item < s->batch * s->kv_heads; item++) {
        int64_t b = item / s->kv_heads, h = item % s->kv_heads, length = lengths[b];
        char *key = keys + item * s->capacity * row, *value = values + item * s->capacity * row;
        memcpy(key + length * row, k + (b * s->k_row + h * s->k_head) * size, row);
        memcpy(value + length * row, v + (b * s->v_row + h * s->v_head) * size, row);
        float scores[length + 1 + LANES];
        for (int64_t g = h * group; g < (h + 1) * group; g++) {
            const char *query = q + (b * s->q_row + g * s->q_head) * size;
            char *out = y + (b * s->heads + g) * row;
            if (s->half) attend(query, key, value, length + 1, s->d, scores, out, 1);
            else attend(query, key, value, length + 1, s->d, scores, out, 0);
        }
    }
}
