// GroupNorm of maps whose channels are neighbours in memory, and its gradients; SiLU after it where it is asked for.
//
// PyTorch has kernels for this layout, of which the one for bfloat16 takes four times as long as it should.

#include "../vectors.h"

typedef struct {
    int64_t batch, pixels, channels, groups, half, silu, each, threads;  // each: whether every map has a gain of its own
    double eps;
} Shape;

#define BLOCK 64  // pixels

// 1 / (1 + exp(-z))
INLINE f32 sigmoid(f32 z) { return inverse(1 + vexp(-z)); }

// Channels that whole groups and whole vectors fill, so that a few maps keep all threads busy, or all of them.
static int64_t part(const Shape *s) {
    int64_t width = s->channels / s->groups, n = width;
    while (n % LANES) n += width;
    return s->batch >= s->threads || s->channels % n ? s->channels : n;
}

// Mean and squared deviation from it, summed over the pixels, of LANES channels: of blocks, each in two passes, joined as
// by Chan, Golub and LeVeque (1983), so that neither large means nor outliers cost precision.
INLINE void moments(const Shape *s, const char *x, int64_t at, float *mean, float *deviation, int half) {
    f32 m = {0}, all = {0};
    for (int64_t first = 0; first < s->pixels; first += BLOCK) {
        int64_t n = s->pixels - first < BLOCK ? s->pixels - first : BLOCK, from = at + first * s->channels;
        f32 sum[4] = {{0}}, square[4] = {{0}};
        for (int64_t p = 0; p < n; p += 4)
            for (int64_t i = 0; i < 4 && p + i < n; i++) sum[i] += load(x, from + (p + i) * s->channels, half);
        f32 here = ((sum[0] + sum[1]) + (sum[2] + sum[3])) / (float)n;
        for (int64_t p = 0; p < n; p += 4)
            for (int64_t i = 0; i < 4 && p + i < n; i++) {
                f32 v = load(x, from + (p + i) * s->channels, half) - here;
                square[i] += v * v;
            }
        f32 apart = here - m;
        m += apart * ((float)n / (first + n));
        all += (square[0] + square[1]) + (square[2] + square[3]) + apart * apart * ((float)first * n / (first + n));
    }
    STORE(mean, m);
    STORE(deviation, all);
}

// Moments of channels become those of their groups: mean and 1 / sqrt(variance + eps).
static void join_groups(const Shape *s, int64_t count, float *mean, float *rstd) {
    int64_t width = s->channels / s->groups;
    for (int64_t first = 0; first < count; first += width) {
        double m = 0, deviation = 0;
        for (int64_t i = first; i < first + width; i++) m += mean[i];
        m /= width;
        for (int64_t i = first; i < first + width; i++) deviation += rstd[i] + s->pixels * (mean[i] - m) * (mean[i] - m);
        for (int64_t i = first; i < first + width; i++) {
            mean[i] = m;
            rstd[i] = 1 / sqrt(deviation / (width * s->pixels) + s->eps);
        }
    }
}

// Each channel gets the mean over its group: of sums over pixels, times a weight.
static void over_groups(const Shape *s, int64_t count, const float *sums, const float *weight, float *means) {
    int64_t width = s->channels / s->groups;
    for (int64_t first = 0; first < count; first += width) {
        double sum = 0;
        for (int64_t i = first; i < first + width; i++) sum += (double)sums[i] * weight[i];
        for (int64_t i = first; i < first + width; i++) means[i] = sum / (width * s->pixels);
    }
}

INLINE void forward(const Shape *s, const char *x, const float *gain, const float *bias, char *y, float *mean,
                    float *rstd, int half, int silu) {
    int64_t c = s->channels, count = part(s), parts = c / count;
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t item = 0; item < s->batch * parts; item++) {
        int64_t b = item / parts, channel = item % parts * count, start = b * s->pixels * c + channel;
        float *m = mean + b * c + channel, *r = rstd + b * c + channel;
        const float *g = gain + s->each * b * c + channel, *o = bias + s->each * b * c + channel;
        for (int64_t i = 0, j; i < count; i += LANES) j = whole(i, count), moments(s, x, start + j, m + j, r + j, half);
        join_groups(s, count, m, r);
        for (int64_t i = 0, j; i < count; i += LANES) {
            j = whole(i, count);
            f32 a = LOAD(r + j) * LOAD(g + j), shift = LOAD(o + j) - LOAD(m + j) * a;
            for (int64_t p = 0, at = start + j; p < s->pixels; p++, at += c) {
                f32 z = load(x, at, half) * a + shift;
                store(y, at, silu ? z * sigmoid(z) : z, half);
            }
        }
    }
}

// With n = (x - mean) rstd and z = gain n + bias: dbias and dgain, for each map, are the sums of dz and dz n over the
// pixels, and dx = rstd (gain dz - <gain dz> - n <gain dz n>), means over the group.
INLINE void backward(const Shape *s, const char *x, const float *gain, const float *bias, const float *mean,
                     const float *rstd, const char *dy, char *dx, float *dgain, float *dbias, float *means, int half,
                     int silu) {
    int64_t c = s->channels, count = part(s), parts = c / count;
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t item = 0; item < s->batch * parts; item++) {
        int64_t b = item / parts, channel = item % parts * count, start = b * s->pixels * c + channel;
        int64_t here = b * c + channel, shared = s->each * b * c + channel;
        const float *m = mean + here, *r = rstd + here, *g = gain + shared, *o = bias + shared;
        float *m0 = means + here, *m1 = means + s->batch * c + here;
        for (int pass = 0; pass < 2; pass++) {
            for (int64_t i = 0, j; i < count; i += LANES) {
                j = whole(i, count);
                f32 mu = LOAD(m + j), rho = LOAD(r + j), gamma = LOAD(g + j), beta = LOAD(o + j);
                f32 mean0 = {0}, mean1 = {0}, sum0 = {0}, sum1 = {0}, all0 = {0}, all1 = {0};
                if (pass) mean0 = LOAD(m0 + j), mean1 = LOAD(m1 + j);
                for (int64_t p = 0, at = start + j; p < s->pixels; p++, at += c) {
                    int kept = silu && pass && i == j;  // dz, in the place of dx; where vectors overlap it is lost
                    f32 n = (load(x, at, half) - mu) * rho, dz = load(kept ? dx : dy, at, half);
                    if (silu && !kept) {
                        f32 z = gamma * n + beta, sigma = sigmoid(z);
                        dz *= sigma * (1 + z * (1 - sigma));
                        if (!pass) store(dx, at, dz, half);
                    }
                    if (pass) store(dx, at, rho * (gamma * dz - mean0 - n * mean1), half);
                    else {
                        sum0 += dz, sum1 += dz * n;
                        if (p % BLOCK == BLOCK - 1 || p == s->pixels - 1) {
                            all0 += sum0, all1 += sum1;
                            sum0 = sum1 = (f32){0};
                        }
                    }
                }
                if (!pass) STORE(dbias + here + j, all0), STORE(dgain + here + j, all1);
            }
            if (!pass) over_groups(s, count, dbias + here, g, m0), over_groups(s, count, dgain + here, g, m1);
        }
    }
}

// x and y (batch, pixels, channels), bfloat16 if half, else float32; gain and bias (channels), or (batch, channels) if
// each; mean and rstd (batch, channels), those of the channel's group, which the backward pass takes.
void group_norm(const Shape *s, const char *x, const float *gain, const float *bias, char *y, float *mean, float *rstd) {
    if (s->half && s->silu) forward(s, x, gain, bias, y, mean, rstd, 1, 1);
    else if (s->half) forward(s, x, gain, bias, y, mean, rstd, 1, 0);
    else if (s->silu) forward(s, x, gain, bias, y, mean, rstd, 0, 1);
    else forward(s, x, gain, bias, y, mean, rstd, 0, 0);
}

// dgain and dbias are (batch, channels) always; means is room for twice as much.
void group_norm_backward(const Shape *s, const char *x, const float *gain, const float *bias, const float *mean,
                        const float *rstd, const char *dy, char *dx, float *dgain, float *dbias, float *means) {
    if (s->half && s->silu) backward(s, x, gain, bias, mean, rstd, dy, dx, dgain, dbias, means, 1, 1);
    else if (s->half) backward(s, x, gain, bias, mean, rstd, dy, dx, dgain, dbias, means, 1, 0);
    else if (s->silu) backward(s, x, gain, bias, mean, rstd, dy, dx, dgain, dbias, means, 0, 1);
    else backward(s, x, gain, bias, mean, rstd, dy, dx, dgain, dbias, means, 0, 0);
}
