// A token of each row of logits, drawn by inverting the cumulative distribution, and its log-probability.
//
// Three passes over a row that lies in the processor's cache: its largest logit, the sums of exp(logit - largest) over
// blocks of 64 tokens, and the block in which the sums reach u times the total.

#include "../vectors.h"

#define BLOCK 64

typedef struct {
    int64_t rows, vocab, stride;  // stride between rows, in elements
    int64_t half, threads;        // bfloat16 if half, else float32
    float inverse_temperature;
} Shape;

// exp(scale (x - largest)) of up to LANES tokens from i on; 0 beyond the vocabulary and where x is minus infinity.
INLINE f32 vweights(const char *logits, int64_t i, int64_t vocab, float largest, float scale, int half) {
    f32 x;
    if (i + LANES <= vocab) x = load(logits, i, half);
    else for (int j = 0; j < LANES; j++) x[j] = i + j < vocab ? element(logits, i + j, half) : -INFINITY;
    i32 real = x != -INFINITY;
    return (f32)((i32)vexp((x - largest) * scale) & real);
}

INLINE void draw_row(const Shape *s, const char *logits, double u, int64_t *token, float *log_probability, int half) {
    int64_t vocab = s->vocab, blocks = (vocab + BLOCK - 1) / BLOCK, i = 0;
    f32 top = (f32){0} - INFINITY;
    i32 not_a_number = {0};
    for (; i + LANES <= vocab; i += LANES) {
        f32 x = load(logits, i, half);
        not_a_number |= x != x;
        top = vmax(x, top);
    }
    float largest = -INFINITY;
    int bad = 0;
    for (int j = 0; j < LANES; j++) {
        largest = fmaxf(largest, top[j]);
        bad |= not_a_number[j];
    }
    for (; i < vocab; i++) {
        float x = element(logits, i, half);
        largest = fmaxf(largest, x);
        bad |= x != x;
    }
    *token = 0;
    *log_probability = NAN;
    if (bad || isinf(largest)) return;

    float sums[blocks];
    double total = 0, all = 0;  // with temperature and without
    for (int64_t b = 0; b < blocks; b++) {
        f32 sum = {0}, plain = {0};
        for (int64_t k = b * BLOCK; k < (b + 1) * BLOCK && k < vocab; k += LANES) {
            sum += vweights(logits, k, vocab, largest, s->inverse_temperature, half);
            if (s->inverse_temperature != 1) plain += vweights(logits, k, vocab, largest, 1, half);
        }
        total += sums[b] = vsum(sum);
        all += s->inverse_temperature != 1 ? vsum(plain) : sums[b];
    }

    double target = u * total, before = 0;
    int64_t b = 0, chosen = -1;
    while (b < blocks - 1 && before + sums[b] <= target) before += sums[b++];
    for (; chosen < 0; b--)  // by rounding the last block may turn out to hold no weight: then one before it serves
        for (int64_t k = b * BLOCK; k < (b + 1) * BLOCK && k < vocab && before <= target; k += LANES) {
            f32 weight = vweights(logits, k, vocab, largest, s->inverse_temperature, half);
            for (int j = 0; j < LANES && before <= target; j++)
                if (weight[j] > 0) {
                    chosen = k + j;
                    before += weight[j];
                }
        }
    *token = chosen;
    *log_probability = element(logits, chosen, half) - largest - (float)log(all);
}

// logits (rows, vocab); uniform (rows, 2), of which the first column is used; tokens and log_probabilities (rows,).
void draw(const Shape *s, const char *logits, const double *uniform, int64_t *tokens, float *log_probabilities) {
#pragma omp parallel for num_threads(s->threads) schedule(static)
    for (int64_t row = 0; row < s->rows; row++) {
        const char *p = logits + row * s->stride * (s->half ? 2 : 4);
        if (s->half) draw_row(s, p, uniform[2 * row], tokens + row, log_probabilities + row, 1);
        else draw_row(s, p, uniform[2 * row], tokens + row, log_probabilities + row, 0);
    }
}
