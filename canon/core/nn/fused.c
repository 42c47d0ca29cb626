// One token through a decoder of LLaMA's architecture, in one parallel region.
//
// At batch 1 a token costs as much as reading the weights once, unless the pauses between some 500 PyTorch operations
// come on top; here there are four barriers a layer. Names and order are those of canon/language/llama.

#include "quantized.c"

typedef struct {
    const float *attention_norm, *feed_forward_norm;
    Matrix qkv, out, gate_up, down;
} Layer;

typedef struct {
    int64_t n_layers, d_model, n_heads, n_kv_heads, d_head, d_ff;
    float norm_eps;
    const float *final_norm;
    Matrix head;
    const Layer *layers;
} Model;

// y = x / rms(x) * weight, and its group sums
static void rms_norm(const float *x, const float *weight, int64_t n, float eps, float *y, float *sums) {
    f32 squares = {0};
    for (int64_t i = 0; i < n; i += LANES) squares += LOAD(x + i) * LOAD(x + i);
    float scale = 1 / sqrtf(vsum(squares) / n + eps);
    for (int64_t i = 0; i < n; i += LANES) STORE(y + i, LOAD(x + i) * scale * LOAD(weight + i));
    group_sums(y, n, sums);
}

// Scores of `n` query heads that share the keys: scores (n, stride) <- q (n, d) keys (length, d)^T scale.
static inline void score(int n, const float *q, const uint16_t *keys, int64_t length, int64_t d, float scale,
                         float *scores, int64_t stride) {
    for (int64_t t = 0; t < length; t++, keys += d) {
        f32 product[4] = {{0}};
        for (int64_t i = 0; i < d; i += LANES) {
            f32 key = from_bf16(keys + i);
            for (int h = 0; h < n; h++) product[h] += LOAD(q + h * d + i) * key;
        }
        for (int h = 0; h < n; h++) scores[h * stride + t] = vsum(product[h]) * scale;
    }
}

// out (n, out_stride) <- weights (n, stride) values (length, d)
static inline void weigh(int n, const float *weights, int64_t stride, const uint16_t *values, int64_t length, int64_t d,
                         float *out, int64_t out_stride) {
    for (int64_t i = 0; i < d; i += 2 * LANES) {
        f32 sum[4][2] = {{{0}}};
        for (int64_t t = 0; t < length; t++) {
            f32 left = from_bf16(values + t * d + i), right = from_bf16(values + t * d + i + LANES);
            for (int h = 0; h < n; h++) {
                sum[h][0] += weights[h * stride + t] * left;
                sum[h][1] += weights[h * stride + t] * right;
            }
        }
        for (int h = 0; h < n; h++) {
            STORE(out + h * out_stride + i, sum[h][0]);
            STORE(out + h * out_stride + i + LANES, sum[h][1]);
        }
    }
}

// Calls that the compiler specialises for 1 to 4 heads, so that the sums of all stay in registers.
#define FOR_HEADS(n, call) \
    switch (n) { case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; default: call(4); }

// This thread's slice of the past, [from, to): for every query head the largest score, the sum of exp(score - largest)
// and the values weighted by it. Slices are merged as in FlashAttention (Dao et al., 2022, section 3.1).
static void attend(const Model *m, const float *q, const uint16_t *keys, const uint16_t *values, int64_t capacity,
                   int64_t from, int64_t to, float *partial) {
    int64_t d = m->d_head, group = m->n_heads / m->n_kv_heads, result = d + 2, length = to - from;
    int64_t stride = (length + LANES - 1) / LANES * LANES;
    float scale = 1 / sqrtf(d), scores[4 * stride + LANES];
    for (int64_t first = 0; first < m->n_heads; first += 4 < group - first % group ? 4 : group - first % group) {
        int64_t n = group - first % group, memory = (first / group * capacity + from) * d;
#define SCORE(n) score(n, q + first * d, keys + memory, length, d, scale, scores, stride)
        FOR_HEADS(n, SCORE)
        for (int64_t h = 0; h < n && h < 4; h++) {
            float largest = -INFINITY, *s = scores + h * stride, *r = partial + (first + h) * result;
            f32 sum = {0};
            for (int64_t t = 0; t < length; t++) largest = fmaxf(largest, s[t]);
            for (int64_t t = length; t < stride; t++) s[t] = -INFINITY;  // of weight 2^-126
            for (int64_t t = 0; t < length; t += LANES) {
                f32 weight = vexp(LOAD(s + t) - largest);
                STORE(s + t, weight);
                sum += weight;
            }
            r[0] = largest;
            r[1] = vsum(sum);
        }
#define WEIGH(n) weigh(n, scores, stride, values + memory, length, d, partial + first * result + 2, result)
        FOR_HEADS(n, WEIGH)
    }
}

// Merge the slices of all threads: y (n_heads, d_head)
static void merge(const Model *m, const float *partial, int64_t slices, float *y) {
    int64_t d = m->d_head, stride = d + 2;
    for (int64_t h = 0; h < m->n_heads; h++) {
        float largest = -INFINITY, total = 0;
        for (int64_t s = 0; s < slices; s++) largest = fmaxf(largest, partial[(s * m->n_heads + h) * stride]);
        memset(y + h * d, 0, d * sizeof(float));
        for (int64_t s = 0; s < slices; s++) {
            const float *slice = partial + (s * m->n_heads + h) * stride;
            float weight = expf(slice[0] - largest);
            total += weight * slice[1];
            for (int64_t i = 0; i < d; i += LANES) STORE(y + h * d + i, LOAD(y + h * d + i) + weight * LOAD(slice + 2 + i));
        }
        for (int64_t i = 0; i < d; i += LANES) STORE(y + h * d + i, LOAD(y + h * d + i) / total);
    }
}

// Args: x (d_model) the token's embedding, overwritten; rotation (d_head) cos and sin of each pair at this position;
// memory: keys and values of the first layer, of the second and so on, each (n_kv_heads, capacity, d_head) bfloat16 with
// `past` tokens filled, to which this one is added; logits (vocab).
void decode(const Model *m, float *x, const float *rotation, uint16_t *const *memory, int64_t capacity, int64_t past,
            float *logits, int threads) {
    int64_t d = m->d_head, n_q = m->n_heads * d, n_k = m->n_kv_heads * d, widest = m->d_ff > n_q ? m->d_ff : n_q;
    float qkv[n_q + 2 * n_k], inner[m->d_ff], partial[threads * m->n_heads * (d + 2)];
    if (widest < m->d_model) widest = m->d_model;
#pragma omp parallel num_threads(threads)
    {
        float h[widest], sums[widest / GROUP];
        int64_t from, to, slices = omp_get_num_threads(), slice = omp_get_thread_num();
        for (const Layer *layer = m->layers; layer < m->layers + m->n_layers; layer++) {
            uint16_t *key = memory[2 * (layer - m->layers)], *value = memory[2 * (layer - m->layers) + 1];

            rms_norm(x, layer->attention_norm, m->d_model, m->norm_eps, h, sums);
            share(layer->qkv.rows / LANES, &from, &to);
            for (int64_t r = from * LANES; r < to * LANES; r += LANES) {
                STORE(qkv + r, rows16(&layer->qkv, r / LANES, h, sums));
                if (r < n_q + n_k)  // rotate the pairs (2i, 2i + 1)
                    for (int64_t i = r; i < r + LANES; i += 2) {
                        float cos = rotation[i % d], sin = rotation[i % d + 1], re = qkv[i], im = qkv[i + 1];
                        qkv[i] = re * cos - im * sin;
                        qkv[i + 1] = re * sin + im * cos;
                    }
                if (r >= n_q) {
                    int64_t i = (r - n_q) % n_k;
                    *(u16_any *)((r < n_q + n_k ? key : value) + (i / d * capacity + past) * d + i % d) =
                        to_bf16(LOAD(qkv + r));
                }
            }
#pragma omp barrier
            attend(m, qkv, key, value, capacity, (past + 1) * slice / slices, (past + 1) * (slice + 1) / slices,
                   partial + slice * m->n_heads * (d + 2));
#pragma omp barrier
            merge(m, partial, slices, h);
            group_sums(h, n_q, sums);
            share(layer->out.rows / LANES, &from, &to);
            for (int64_t t = from; t < to; t++) STORE(x + t * LANES, LOAD(x + t * LANES) + rows16(&layer->out, t, h, sums));
#pragma omp barrier
            rms_norm(x, layer->feed_forward_norm, m->d_model, m->norm_eps, h, sums);
            share(m->d_ff / LANES, &from, &to);
            for (int64_t t = from; t < to; t++) {  // silu(gate) * up
                f32 gate = rows16(&layer->gate_up, t, h, sums);
                f32 up = rows16(&layer->gate_up, t + m->d_ff / LANES, h, sums);
                STORE(inner + t * LANES, gate / (1 + vexp(-gate)) * up);
            }
#pragma omp barrier
            group_sums(inner, m->d_ff, sums);
            share(layer->down.rows / LANES, &from, &to);
            for (int64_t t = from; t < to; t++)
                STORE(x + t * LANES, LOAD(x + t * LANES) + rows16(&layer->down, t, inner, sums));
#pragma omp barrier
        }
        rms_norm(x, m->final_norm, m->d_model, m->norm_eps, h, sums);
        share(m->head.rows / LANES, &from, &to);
        for (int64_t t = from; t < to; t++) STORE(logits + t * LANES, rows16(&m->head, t, h, sums));
    }
}
