// GroupNorm of maps whose channels are neighbours in memory, and its gradients; SiLU after it where it is asked for.
//
// PyTorch has kernels for this layout, of which the one for bfloat16 takes four times as long as it should.

#include "../vectors.h"

typedef struct {
    int64_t batch, pixels, channels, groups, half, silu, each, threads;  // each: whether every map has a gain of its own
    double eps;
} Shape;

// 1 / (1 + exp(-z))
INLINE f32 sigmoid(f32 z) { return inverse(1 + exp16(-z)); }

// Each channel gets the mean over its group: of sums over pixels, times a weight.
static void over_groups(const Shape *s, const float *sums, const float *weight, float *means) {
    int64_t width = s->channels / s->groups;
    for (int64_t first = 0; first < s->channels; first += width) {
        double sum = 0;
        for (int64_t i = first; i < first + width; i++) sum += (double)sums[i] * weight[i];
        for (int64_t i = first; i < first + width; i++) means[i] = sum / (width * s->pixels);
    }
}

// Mean and squared deviation from it, summed over the pixels, of 16 channels. The first pixel is taken away before, so
// that the difference of two sums loses nothing (Chan, Golub and LeVeque 1983).
INLINE void moments(const Shape *s, const char *x, int64_t at, float *mean, float *deviation, int half) {
    f32 sum[4] = {{0}}, square[4] = {{0}}, first = load(x, at, half);
    for (int64_t p = 0; p < s->pixels; p += 4)
        for (int64_t i = 0; i < 4 && p + i < s->pixels; i++) {
            f32 v = load(x, at + (p + i) * s->channels, half) - first;
            sum[i] += v;
            square[i] += v * v;
        }
    f32 all = (sum[0] + sum[1]) + (sum[2] + sum[3]), m = all / (float)s->pixels;
    STORE(mean, first + m);
    STORE(deviation, (square[0] + square[1]) + (square[2] + square[3]) - all * m);
}

// Moments of channels become those of their groups: mean and 1 / sqrt(variance + eps).
static void join_groups(const Shape *s, float *mean, float *rstd) {
    int64_t width = s->channels / s->groups;
    for (int64_t first = 0; first < s->channels; first += width) {
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

INLINE void forward(const Shape *s, const char *x, const float *gain, const float *bias, char *y, float *mean,
                    float *rstd, int half, int silu) {
    int64_t c = s->channels;
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t b = 0; b < s->batch; b++) {
        int64_t start = b * s->pixels * c;
        float *m = mean + b * c, *r = rstd + b * c;
        const float *g = gain + s->each * b * c, *o = bias + s->each * b * c;
        for (int64_t i = 0, j; i < c; i += LANES) j = whole(i, c), moments(s, x, start + j, m + j, r + j, half);
        join_groups(s, m, r);
        for (int64_t i = 0, j; i < c; i += LANES) {
            j = whole(i, c);
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
    int64_t c = s->channels;
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t b = 0; b < s->batch; b++) {
        int64_t start = b * s->pixels * c;
        const float *m = mean + b * c, *r = rstd + b * c, *g = gain + s->each * b * c, *o = bias + s->each * b * c;
        float *m0 = means + 2 * b * c, *m1 = m0 + c;
        for (int pass = 0; pass < 2; pass++) {
            for (int64_t i = 0, j; i < c; i += LANES) {
                j = whole(i, c);
                f32 mu = LOAD(m + j), rho = LOAD(r + j), gamma = LOAD(g + j), beta = LOAD(o + j), sum0 = {0}, sum1 = {0};
                f32 mean0 = {0}, mean1 = {0};
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
                    else sum0 += dz, sum1 += dz * n;
                }
                if (!pass) STORE(dbias + b * c + j, sum0), STORE(dgain + b * c + j, sum1);
            }
            if (!pass) over_groups(s, dbias + b * c, g, m0), over_groups(s, dgain + b * c, g, m1);
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
