// Attention of narrow and of small heads, and its gradients: softmax(q k^T / sqrt(d)) v in float32, four queries at a time.
//
// With five channels a head a matrix product has next to nothing to do, and the map of weights is what costs: here it
// never leaves the cache. Keys and values are transposed once, so that neighbours in memory are neighbouring keys.

#include <stdlib.h>

#include "../vectors.h"

#define ROWS 4
#define TILE 256  // keys at a time in the backward pass, whose weights and gradients then stay in the nearest cache

#define APART LANES  // between rows of keys: were they 4,096 bytes long, all would fall upon the same lines of the cache

typedef struct {
    int64_t batch, heads, queries, keys, d, half, threads;
    int64_t q[3], k[3], v[3], y[3];  // strides of batch, head and position, in elements; channels are neighbours
} Shape;

INLINE void put(char *p, int64_t i, float value, int half) {
    f32 v = {value};
    if (half) ((uint16_t *)p)[i] = to_bf16(v)[0];
    else ((float *)p)[i] = value;
}

// Where row t of a head begins, in elements.
INLINE int64_t place(const int64_t stride[3], int64_t b, int64_t h, int64_t t) {
    return b * stride[0] + h * stride[1] + t * stride[2];
}

INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

// d neighbours, times `scale`
INLINE void copy(const char *from, int64_t at, int64_t d, float scale, int half, float *to) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) STORE(to + i, scale * load(from, at + i, half));
    for (; i < d; i++) to[i] = scale * element(from, at + i, half);
}

INLINE void paste(const float *from, int64_t d, float scale, char *to, int64_t at, int half) {
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) store(to, at + i, scale * LOAD(from + i), half);
    for (; i < d; i++) put(to, at + i, scale * from[i], half);
}

// (keys, d) -> (padded keys, padded d) with zeros behind both
INLINE void copy_all(const char *from, const int64_t stride[3], int64_t b, int64_t h, int64_t keys, int64_t d, int half,
                     float *to) {
    int64_t width = padded(d);
    memset(to, 0, padded(keys) * width * sizeof(float));
    for (int64_t t = 0; t < keys; t++) copy(from, place(stride, b, h, t), d, 1, half, to + t * width);
}

// (keys, d) -> (d, n) with zeros behind the keys
INLINE void transpose(const char *from, const int64_t stride[3], int64_t b, int64_t h, int64_t keys, int64_t d,
                      int64_t n, int half, float *to) {
    memset(to, 0, d * n * sizeof(float));
    for (int64_t t = 0; t < keys; t++)
        for (int64_t i = 0, at = place(stride, b, h, t); i < d; i++) to[i * n + t] = element(from, at + i, half);
}

INLINE void transpose_back(const float *from, char *to, const int64_t stride[3], int64_t b, int64_t h, int64_t keys,
                           int64_t d, int64_t n, int half) {
    for (int64_t t = 0; t < keys; t++)
        for (int64_t i = 0, at = place(stride, b, h, t); i < d; i++) put(to, at + i, from[i * n + t], half);
}

INLINE float dot(const float *a, const float *b, int64_t d) {
    f32 sums = {0};
    int64_t i = 0;
    for (; i + LANES <= d; i += LANES) sums += LOAD(a + i) * LOAD(b + i);
    float sum = vsum(sums);
    for (; i < d; i++) sum += a[i] * b[i];
    return sum;
}

// Four rows from `first` on, times `scale`; behind the last one the last again.
INLINE void rows(const char *from, const int64_t stride[3], int64_t b, int64_t h, int64_t first, int64_t count,
                 int64_t d, float scale, int half, float *to) {
    for (int64_t r = 0; r < ROWS; r++) {
        int64_t t = first + r < count ? first + r : count - 1;
        copy(from, place(stride, b, h, t), d, scale, half, to + r * d);
    }
}

// out (ROWS, count) <- a (ROWS, d) m (d, count), of whose rows each has n elements; `wide` vectors of it from j on
INLINE void spread_some(int64_t d, int64_t n, int64_t count, const float *a, const float *m, float *out, int64_t j,
                        int wide) {
    f32 sum[ROWS][2] = {{{0}}};
    for (int64_t i = 0; i < d; i++)
        for (int v = 0; v < wide; v++) {
            f32 column = LOAD(m + i * n + j + v * LANES);
            for (int r = 0; r < ROWS; r++) sum[r][v] += a[r * d + i] * column;
        }
    for (int r = 0; r < ROWS; r++)
        for (int v = 0; v < wide; v++) STORE(out + r * count + j + v * LANES, sum[r][v]);
}

static void spread(int64_t d, int64_t n, int64_t count, const float *a, const float *m, float *out) {
    int64_t j = 0;
    for (; j + LANES < count; j += 2 * LANES) spread_some(d, n, count, a, m, out, j, 2);
    if (j < count) spread_some(d, n, count, a, m, out, j, 1);
}

// out (ROWS, d) += a (ROWS, count) m (count, padded d), for heads that fill vectors
static void combine(int64_t d, int64_t count, const float *a, const float *m, float *out) {
    int64_t width = padded(d);
    for (int64_t i = 0; i < width; i += LANES) {
        f32 sum[ROWS] = {{0}};
        for (int64_t j = 0; j < count; j++) {
            f32 row = LOAD(m + j * width + i);
            for (int r = 0; r < ROWS; r++) sum[r] += a[r * count + j] * row;
        }
        for (int r = 0; r < ROWS; r++) {
            float *to = out + r * d + i;
            if (i + LANES <= d) STORE(to, LOAD(to) + sum[r]);
            else for (int64_t k = 0; i + k < d; k++) to[k] += sum[r][k];
        }
    }
}

// out (ROWS, d) += a (ROWS, count) m^T (count, d), two channels at a time
static void gather(int64_t d, int64_t n, int64_t count, const float *a, const float *m, float *out) {
    for (int64_t i = 0; i < d; i += 2) {
        const float *one = m + i * n, *two = m + (i + 1 < d ? i + 1 : i) * n;
        f32 sum[ROWS][2] = {{{0}}};
        for (int64_t j = 0; j < count; j += LANES) {
            f32 left = LOAD(one + j), right = LOAD(two + j);
            for (int r = 0; r < ROWS; r++) {
                f32 weight = LOAD(a + r * count + j);
                sum[r][0] += weight * left;
                sum[r][1] += weight * right;
            }
        }
        for (int r = 0; r < ROWS; r++) {
            out[r * d + i] += vsum(sum[r][0]);
            if (i + 1 < d) out[r * d + i + 1] += vsum(sum[r][1]);
        }
    }
}

// m (d, count) += a^T (d, ROWS) w (ROWS, count)
static void add(int64_t d, int64_t n, int64_t count, const float *a, const float *w, float *m) {
    for (int64_t j = 0; j < count; j += LANES) {
        f32 weight[ROWS];
        for (int r = 0; r < ROWS; r++) weight[r] = LOAD(w + r * count + j);
        for (int64_t i = 0; i < d; i++) {
            f32 sum = LOAD(m + i * n + j);
            for (int r = 0; r < ROWS; r++) sum += a[r * d + i] * weight[r];
            STORE(m + i * n + j, sum);
        }
    }
}

// Scores become weights, not yet divided by their sum; returns the largest score and the sum.
INLINE float weigh(float *w, int64_t keys, int64_t count, float *total) {
    for (int64_t j = keys; j < count; j++) w[j] = -INFINITY;
    f32 most = LOAD(w), sum = {0};
    for (int64_t j = LANES; j < count; j += LANES) most = vmax(most, LOAD(w + j));
    float largest = vmost(most);
    for (int64_t j = 0; j < count; j += LANES) {
        f32 weight = vexp(LOAD(w + j) - largest);
        sum += weight;
        STORE(w + j, weight);
    }
    *total = vsum(sum);
    return largest;
}

INLINE int forward(const Shape *s, const char *q, const char *k, const char *v, char *y, float *lse, int half) {
    int64_t d = s->d, all = padded(s->keys), n = all + APART;
    float scale = 1 / sqrtf(d);
    int failed = 0, wide = d >= LANES;
    int64_t values = wide ? all * padded(d) : d * n;
#pragma omp parallel num_threads(s->threads)
    {
        float *kt = malloc((d * n + values + ROWS * (all + 2 * d)) * sizeof(float));
        float *vt = kt + d * n, *w = vt + values, *query = w + ROWS * all, *out = query + ROWS * d;
        if (!kt) failed = 1;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < s->batch * s->heads; item++) {
            if (!kt) continue;
            int64_t b = item / s->heads, h = item % s->heads;
            transpose(k, s->k, b, h, s->keys, d, n, half, kt);
            if (wide) copy_all(v, s->v, b, h, s->keys, d, half, vt);
            else transpose(v, s->v, b, h, s->keys, d, n, half, vt);
            for (int64_t first = 0; first < s->queries; first += ROWS) {
                float total[ROWS], largest[ROWS];
                rows(q, s->q, b, h, first, s->queries, d, scale, half, query);
                spread(d, n, all, query, kt, w);
                for (int r = 0; r < ROWS; r++) largest[r] = weigh(w + r * all, s->keys, all, total + r);
                memset(out, 0, ROWS * d * sizeof(float));
                if (wide) combine(d, all, w, vt, out);
                else gather(d, n, all, w, vt, out);
                for (int r = 0; r < ROWS && first + r < s->queries; r++) {
                    lse[item * s->queries + first + r] = largest[r] + logf(total[r]);
                    paste(out + r * d, d, 1 / total[r], y, place(s->y, b, h, first + r), half);
                }
            }
        }
        free(kt);
    }
    return failed;
}

// ds = w (dw - sum_j w_j dw_j), the gradient of the scores, in the place of dw; w from the scores in its place.
// The sum is that of dy y. Behind the keys, and in rows that are not there, the weights are nothing.
INLINE void through_softmax(float *w, float *dw, int64_t keys, int64_t count, float lse, float sum) {
    for (int64_t j = keys > 0 ? keys : 0; j < count; j++) w[j] = -INFINITY;
    for (int64_t j = 0; j < count; j += LANES) {
        f32 weight = vexp(LOAD(w + j) - lse);
        STORE(w + j, weight);
        STORE(dw + j, weight * (LOAD(dw + j) - sum));
    }
}

INLINE int backward(const Shape *s, const char *q, const char *k, const char *v, const char *y, const char *dy,
                     const float *lse, char *dq, char *dk, char *dv, int half) {
    int64_t d = s->d, all = padded(s->keys), n = all + APART;
    float scale = 1 / sqrtf(d);
    int failed = 0, wide = d >= LANES;
#pragma omp parallel num_threads(s->threads)
    {
        float *kt = malloc((4 * d * n + ROWS * (2 * TILE + 4 * d) + wide * all * padded(d)) * sizeof(float));
        float *vt = kt + d * n, *dkt = vt + d * n, *dvt = dkt + d * n, *w = dvt + d * n, *ds = w + ROWS * TILE;
        float *query = ds + ROWS * TILE, *grad = query + ROWS * d, *made = grad + ROWS * d, *out = made + ROWS * d, *keys = out + ROWS * d;
        if (!kt) failed = 1;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < s->batch * s->heads; item++) {
            if (!kt) continue;
            int64_t b = item / s->heads, h = item % s->heads;
            transpose(k, s->k, b, h, s->keys, d, n, half, kt);
            transpose(v, s->v, b, h, s->keys, d, n, half, vt);
            if (wide) copy_all(k, s->k, b, h, s->keys, d, half, keys);
            memset(dkt, 0, 2 * d * n * sizeof(float));
            for (int64_t first = 0; first < s->queries; first += ROWS) {
                rows(q, s->q, b, h, first, s->queries, d, scale, half, query);
                rows(dy, s->y, b, h, first, s->queries, d, 1, half, grad);
                rows(y, s->y, b, h, first, s->queries, d, 1, half, made);
                memset(out, 0, ROWS * d * sizeof(float));
                for (int64_t j = 0; j < all; j += TILE) {
                    int64_t count = all - j < TILE ? all - j : TILE;
                    spread(d, n, count, query, kt + j, w);
                    spread(d, n, count, grad, vt + j, ds);
                    for (int64_t r = 0; r < ROWS; r++) {
                        int there = first + r < s->queries;
                        float sum = dot(grad + r * d, made + r * d, d);
                        through_softmax(w + r * count, ds + r * count, there ? s->keys - j : 0, count,
                                        there ? lse[item * s->queries + first + r] : 0, sum);
                    }
                    if (wide) combine(d, count, ds, keys + j * padded(d), out);
                    else gather(d, n, count, ds, kt + j, out);
                    add(d, n, count, query, ds, dkt + j);  // the query is scaled already
                    add(d, n, count, grad, w, dvt + j);
                }
                for (int64_t r = 0; r < ROWS && first + r < s->queries; r++)
                    paste(out + r * d, d, scale, dq, place(s->q, b, h, first + r), half);
            }
            transpose_back(dkt, dk, s->k, b, h, s->keys, d, n, half);
            transpose_back(dvt, dv, s->v, b, h, s->keys, d, n, half);
        }
        free(kt);
    }
    return failed;
}

// q and y (batch, heads, queries, d), k and v (batch, heads, keys, d), bfloat16 if half, else float32; lse (batch,
// heads, queries), the logarithm of each query's sum of exponentiated scores. Returns whether there was no memory.
int attend_narrow(const Shape *s, const char *q, const char *k, const char *v, char *y, float *lse) {
    if (s->half) return forward(s, q, k, v, y, lse, 1);
    return forward(s, q, k, v, y, lse, 0);
}

// dy has the strides of y, and dq, dk and dv those of q, k and v.
int attend_narrow_backward(const Shape *s, const char *q, const char *k, const char *v, const char *y, const char *dy,
                            const float *lse, char *dq, char *dk, char *dv) {
    if (s->half) return backward(s, q, k, v, y, dy, lse, dq, dk, dv, 1);
    return backward(s, q, k, v, y, dy, lse, dq, dk, dv, 0);
}
