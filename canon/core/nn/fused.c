// One token, or a prompt, through a decoder of LLaMA's architecture, in one parallel region.
//
// At batch 1 a token costs as much as reading the weights once, unless the pauses between some 500 PyTorch operations
// come on top; here there are five barriers a layer. Names and order are those of canon/language/llama.

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

// ---- A prompt -------------------------------------------------------------------------------------------------------
//
// Here arithmetic is what takes time: inputs of products are rounded to 8 bits (see quantized.c), those of attention
// are bfloat16. Each function below is one step of a layer; its loop is shared by the threads, which wait for each other
// at its end.

#define QUERIES (2 * TOKENS)  // that attend together

typedef struct {
    // padded: to whole QUERIES; part: tokens that are multiplied in a row; length: of past and tokens, in whole GROUPs
    int64_t past, tokens, padded, part, length, capacity;
    float *x;              // (padded, d_model)
    uint16_t *q;           // (padded, n_heads, d_head), bfloat16
    // pairs of bfloat16: (n_kv_heads, length / GROUP, d_head / 2, GROUP) and (n_kv_heads, length / 2, d_head)
    u32 *keys, *values;
    Vectors input, hidden; // of the products with qkv, out and gate_up, and with down
} Prompt;

typedef struct { Tile *tiles; f32 (*y)[2], (*z)[2]; } Scratch;  // of one thread

// input <- x / rms(x) * weight
static void round_normed(const Model *m, const Prompt *p, const float *weight) {
    int64_t n = m->d_model;
#pragma omp for
    for (int64_t t = 0; t < p->padded; t++) {
        const float *x = p->x + t * n;
        f32 squares = {0};
        for (int64_t i = 0; i < n; i += LANES) squares += LOAD(x + i) * LOAD(x + i);
        float scale = 1 / sqrtf(vsum(squares) / n + m->norm_eps);
        for (int64_t i = 0; i < n; i += GROUP) {
            f32 low = LOAD(x + i) * scale * LOAD(weight + i);
            f32 high = LOAD(x + i + LANES) * scale * LOAD(weight + i + LANES);
            round_group(low, high, p->input, (t / TOKENS * n + i) / GROUP, t % TOKENS);
        }
    }
    list_outliers(p->input, n, p->padded);
}

// For each part of the tokens, from `from` on, and each 32 rows of a matrix.
#define FOR_PARTS_AND_ROWS(rows)                               \
    _Pragma("omp for collapse(2)")                             \
    for (int64_t from = 0; from < p->padded; from += p->part)  \
        for (int64_t r = 0; r < (rows); r += GROUP)
static inline int64_t part_size(const Prompt *p, int64_t from) {
    return p->padded - from < p->part ? p->padded - from : p->part;
}
// Two tiles of w times a part of the tokens.
static void multiply(const Matrix *w, int64_t a, int64_t b, const Prompt *p, Vectors x, int64_t from, Tile *tiles,
                     f32 (*y)[2]) {
    two_tiles(w, a, b, x, from / TOKENS, part_size(p, from) / TOKENS, tiles, y);
}

// q, and new keys and values in the cache, from input: rotated by their position's angles.
static void query(const Model *m, const Prompt *p, const Matrix *w, const float *rotation, uint16_t *key,
                  uint16_t *value, const Scratch *s) {
    int64_t d = m->d_head, n_q = m->n_heads * d, n_k = m->n_kv_heads * d;
    float scale = 1 / sqrtf(d);
    FOR_PARTS_AND_ROWS(w->rows) {
        multiply(w, r / LANES, r / LANES + 1, p, p->input, from, s->tiles, s->y);
        for (int64_t t = from; t < from + part_size(p, from) && t < p->tokens; t++) {
            float *row = (float *)s->y[t - from];
            const float *angle = rotation + t * d + r % d;
            if (r < n_q + n_k)  // the pairs (2i, 2i + 1)
                for (int i = 0; i < GROUP; i += 2) {
                    float re = row[i], im = row[i + 1];
                    row[i] = re * angle[i] - im * angle[i + 1];
                    row[i + 1] = re * angle[i + 1] + im * angle[i];
                }
            for (int i = 0; i < GROUP; i += LANES) {
                f32 v = LOAD(row + i);
                if (r < n_q) *(u16_any *)(p->q + t * n_q + r + i) = to_bf16(v * scale);
                else {
                    int64_t j = (r - n_q) % n_k + i;
                    uint16_t *memory = r < n_q + n_k ? key : value;
                    *(u16_any *)(memory + (j / d * p->capacity + p->past + t) * d + j % d) = to_bf16(v);
                }
            }
        }
    }
}

// keys and values from the cache, in pairs: of neighbouring columns, GROUP keys side by side, and of neighbouring rows.
static void pair_cache(const Model *m, const Prompt *p, const uint16_t *key, const uint16_t *value) {
    int64_t d = m->d_head, seen = p->past + p->tokens;
#pragma omp for collapse(2)
    for (int64_t h = 0; h < m->n_kv_heads; h++)
        for (int64_t t = 0; t < seen; t += 2) {
            const uint16_t *k = key + (h * p->capacity + t) * d, *v = value + (h * p->capacity + t) * d;
            uint32_t *to = (uint32_t *)p->keys + (h * p->length + t / GROUP * GROUP) * d / 2 + t % GROUP;
            for (int64_t i = 0; i < d / 2; i++) {
                memcpy(to + i * GROUP, k + 2 * i, 4);
                if (t + 1 < seen) memcpy(to + i * GROUP + 1, k + d + 2 * i, 4);
            }
            for (int64_t i = 0; i < d; i += LANES) {
                u32 odd = t + 1 < seen ? widen(*(const u16_any *)(v + d + i)) : (u32){0};
                p->values[((h * p->length + t) / 2 * d + i) / LANES] = widen(*(const u16_any *)(v + i)) | odd << 16;
            }
        }
}

// sum + a0 b0 + a1 b1 of pairs of bfloat16
INLINE f32 dot2(f32 sum, u32 a, u32 b) {
#ifdef __AVX512BF16__
    return (f32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
#else
    return sum + (f32)(a << 16) * (f32)(b << 16) + (f32)(a & 0xffff0000) * (f32)(b & 0xffff0000);
#endif
}

// c (QUERIES, 2 vectors) = a (QUERIES, 2 * pairs) b (2 * pairs, 2 vectors); a_row and b_row: how far rows of a, and
// pairs of rows of b, are apart.
INLINE void outer(const uint16_t *a, int64_t a_row, const u32 *b, int64_t b_row, int64_t pairs, f32 c[QUERIES][2]) {
    f32 sum[QUERIES][2] = {{{0}}};
    for (int64_t k = 0; k < pairs; k++, a += 2, b += b_row)
        UNROLLED
        for (int i = 0; i < QUERIES; i++) {
            uint32_t pair;
            memcpy(&pair, a + i * a_row, 4);
            u32 both = (u32){0} + pair;
            sum[i][0] = dot2(sum[i][0], both, b[0]);
            sum[i][1] = dot2(sum[i][1], both, b[1]);
        }
    memcpy(c, sum, sizeof sum);
}

// input <- softmax(q k^T / sqrt(d)) v, each token seeing the past and itself. scores and weights: (QUERIES, length).
static void attend_all(const Model *m, const Prompt *p, float *scores, uint16_t *weights) {
    int64_t d = m->d_head, n_q = m->n_heads * d, group = m->n_heads / m->n_kv_heads;
#pragma omp for collapse(2) schedule(dynamic)
    for (int64_t first = p->padded - QUERIES; first >= 0; first -= QUERIES)  // the longest rows first
        for (int64_t head = 0; head < m->n_heads; head++) {
            int64_t memory = head / group * p->length * d / 2 / LANES;
            int64_t after = first + QUERIES < p->tokens ? first + QUERIES : p->tokens, seen = p->past + after;
            int64_t row = (seen + GROUP - 1) / GROUP * GROUP;
            f32 c[QUERIES][2];
            float total[QUERIES];
            for (int64_t t = 0; t < row; t += GROUP) {
                const u32 *keys = p->keys + memory + t * d / 2 / LANES;
                outer(p->q + first * n_q + head * d, n_q, keys, GROUP / LANES, d / 2, c);
                for (int i = 0; i < QUERIES; i++) memcpy(scores + i * row + t, c[i], sizeof c[i]);
            }
            for (int i = 0; i < QUERIES; i++) {
                int64_t visible = p->past + first + i + 1 < seen ? p->past + first + i + 1 : seen;
                float *s = scores + i * row;
                uint16_t *weight = weights + i * row;
                f32 most = (f32){0} - INFINITY, sum = {0};
                for (int64_t t = visible; t < row; t++) s[t] = -INFINITY;
                for (int64_t t = 0; t < visible; t += LANES) most = vmax(most, LOAD(s + t));
                most = (f32){0} + vmost(most);
                for (int64_t t = 0; t < visible; t += LANES) {
                    f32 e = vexp(LOAD(s + t) - most);  // 2^-126 for minus infinity
                    *(u16_any *)(weight + t) = to_bf16(e);
                    sum += e;
                }
                memset(weight + visible, 0, (row - visible) * sizeof *weight);
                total[i] = 1 / vsum(sum);
            }
            for (int64_t i = 0; i < d; i += GROUP) {
                outer(weights, row, p->values + memory + i / LANES, d / LANES, (seen + 1) / 2, c);
                for (int64_t j = 0, t = first; j < QUERIES; j++, t++)
                    round_group(c[j][0] * total[j], c[j][1] * total[j], p->input,
                                (t / TOKENS * n_q + head * d + i) / GROUP, t % TOKENS);
            }
        }
    list_outliers(p->input, n_q, p->padded);
}

// hidden <- silu(gate) * up, from input
static void gate(const Model *m, const Prompt *p, const Matrix *w, const Scratch *s) {
    FOR_PARTS_AND_ROWS(m->d_ff) {
        int64_t tile = r / LANES, up = m->d_ff / LANES;
        multiply(w, tile, tile + up, p, p->input, from, s->tiles, s->y);
        multiply(w, tile + 1, tile + 1 + up, p, p->input, from, s->tiles, s->z);
        for (int64_t i = 0, t = from; i < part_size(p, from); i++, t++) {
            f32 low = s->y[i][0] * inverse(1 + vexp(-s->y[i][0])) * s->y[i][1];
            f32 high = s->z[i][0] * inverse(1 + vexp(-s->z[i][0])) * s->z[i][1];
            round_group(low, high, p->hidden, (t / TOKENS * m->d_ff + r) / GROUP, t % TOKENS);
        }
    }
    list_outliers(p->hidden, m->d_ff, p->padded);
}

// x <- x + W input
static void add_product(const Prompt *p, const Matrix *w, Vectors input, const Scratch *s) {
    FOR_PARTS_AND_ROWS(w->rows) {
        multiply(w, r / LANES, r / LANES + 1, p, input, from, s->tiles, s->y);
        for (int64_t i = 0; i < part_size(p, from); i++)
            for (int j = 0; j < 2; j++) {
                float *x = p->x + (from + i) * w->rows + r + j * LANES;
                STORE(x, LOAD(x) + s->y[i][j]);
            }
    }
}

// Args: as of `decode`, but for `tokens` tokens: x (tokens, d_model), rotation (tokens, d_head). logits are those of
// the last one, or null where nobody asks. Returns 0, or 1 if there is not enough memory.
int prefill(const Model *m, const float *x, const float *rotation, uint16_t *const *memory, int64_t capacity,
            int64_t past, int64_t tokens, float *logits, int threads) {
    int64_t n = m->d_model, n_q = m->n_heads * m->d_head, n_k = m->n_kv_heads * m->d_head, failed = 0;
    int64_t wide = n > n_q ? n : n_q, widest = m->d_ff > wide ? m->d_ff : wide;
    int64_t padded = (tokens + QUERIES - 1) / QUERIES * QUERIES, parts = (padded + PART - 1) / PART;
    int64_t part = (padded / TOKENS + parts - 1) / parts * TOKENS;  // all but alike, so that no thread waits for long
    int64_t length = (past + tokens + GROUP - 1) / GROUP * GROUP;
    Prompt p = {past, tokens, padded, part, length, capacity, memory_for(padded * n, sizeof *p.x),
                memory_for(padded * n_q, sizeof *p.q), memory_for(length * n_k, sizeof *p.q),
                memory_for(length * n_k, sizeof *p.q), vectors_for(padded, wide), vectors_for(padded, m->d_ff)};
    if (!p.x || !p.q || !p.keys || !p.values || !allocated(p.input) || !allocated(p.hidden)) failed = 1;
    else {
        memcpy(p.x, x, tokens * n * sizeof *x);
        memset(p.x + tokens * n, 0, (padded - tokens) * n * sizeof *p.x);
        memset(p.q + tokens * n_q, 0, (padded - tokens) * n_q * sizeof *p.q);
    }
    Prompt last = p;  // of the last layer, all but the last tokens are keys and values only
    last.past += padded - QUERIES, last.tokens -= padded - QUERIES, last.padded = last.part = QUERIES;
    last.x += (padded - QUERIES) * n, last.q += (padded - QUERIES) * n_q;
#pragma omp parallel num_threads(threads)
    {
        Tile *tiles = memory_for(2 * widest / GROUP, sizeof *tiles);
        f32 *y = memory_for(4 * part, sizeof *y);
        float *scores = memory_for(QUERIES * length, sizeof *scores);
        uint16_t *weights = memory_for(QUERIES * length, sizeof *weights);
        Scratch s = {tiles, (f32(*)[2])y, (f32(*)[2])(y + 2 * part)};
        if (!tiles || !y || !scores || !weights) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        for (const Layer *layer = m->layers; layer < m->layers + m->n_layers && !failed; layer++) {
            uint16_t *key = memory[2 * (layer - m->layers)], *value = memory[2 * (layer - m->layers) + 1];
            round_normed(m, &p, layer->attention_norm);
            query(m, &p, &layer->qkv, rotation, key, value, &s);
            pair_cache(m, &p, key, value);
            const Prompt *wanted = layer + 1 < m->layers + m->n_layers ? &p : &last;
            attend_all(m, wanted, scores, weights);
            add_product(wanted, &layer->out, p.input, &s);
            round_normed(m, wanted, layer->feed_forward_norm);
            gate(m, wanted, &layer->gate_up, &s);
            add_product(wanted, &layer->down, p.hidden, &s);
        }
        free(tiles), free(y), free(scores), free(weights);
    }
    if (!failed && logits) {
        float normed[n], sums[n / GROUP];
        rms_norm(p.x + (tokens - 1) * n, m->final_norm, n, m->norm_eps, normed, sums);
        matvec(&m->head, normed, logits, threads);
    }
    free(p.x), free(p.q), free(p.keys), free(p.values), free_vectors(p.input), free_vectors(p.hidden);
    return failed;
}
