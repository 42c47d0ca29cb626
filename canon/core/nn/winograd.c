// The transforms of Winograd's convolution F(4 x 4, 3 x 3): tiles of 4 x 4 pixels that take 36 products a channel
// instead of 144 (Lavin and Gray 2016, arXiv 1509.09308, section 4.3). The products themselves are left to BLAS.
//
// The polynomials behind it are evaluated at 0, +-3/4, +-3/2 and infinity: at the paper's 0, +-1, +-2 the largest error
// in float32 is four times as large.
//
// Maps are (batch, height, width, channels), channels neighbours in memory; a transform is (36, tiles, channels),
// float32. Tiles are counted through the maps of a batch, row by row; each call does `count` of them from `first` on.

#include "../vectors.h"

typedef struct {
    int64_t height, width, channels, first, count, stride, threads;  // stride: from one of the 36 to the next
} Shape;

#define A 0.75f
#define B 1.5f
#define C (A * A)
#define D (B * B)

// B^T d
INLINE void in6(const f32 d[6], f32 v[6]) {
    f32 a = d[4] - D * d[2], b = A * (d[3] - D * d[1]), c = d[4] - C * d[2], e = B * (d[3] - C * d[1]);
    v[0] = C * D * d[0] - (C + D) * d[2] + d[4];
    v[1] = a + b;
    v[2] = a - b;
    v[3] = c + e;
    v[4] = c - e;
    v[5] = C * D * d[1] - (C + D) * d[3] + d[5];
}

// A^T m
INLINE void out4(const f32 m[6], f32 y[4]) {
    f32 a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
    y[0] = m[0] + a + c;
    y[1] = A * b + B * d;
    y[2] = C * a + D * c;
    y[3] = A * C * b + B * D * d + m[5];
}

// A g
INLINE void out6(const f32 g[4], f32 d[6]) {
    f32 a = g[0] + C * g[2], b = A * g[1] + A * C * g[3], c = g[0] + D * g[2], e = B * g[1] + B * D * g[3];
    d[0] = g[0];
    d[1] = a + b;
    d[2] = a - b;
    d[3] = c + e;
    d[4] = c - e;
    d[5] = g[3];
}

typedef struct {
    int64_t at, row, column;  // where its map begins, and its first pixel in the map
} Tile;

INLINE Tile tile(const Shape *s, int64_t i) {
    int64_t across = (s->width + 3) / 4, each = (s->height + 3) / 4 * across, t = s->first + i;
    return (Tile){t / each * s->height * s->width, t % each / across * 4, t % across * 4};
}

// What lies outside of the map is zero.
INLINE f32 pixel(const Shape *s, const float *x, int64_t at, int64_t y, int64_t z, int64_t c) {
    f32 nothing = {0};
    if (y < 0 || z < 0 || y >= s->height || z >= s->width) return nothing;
    return LOAD(x + (at + y * s->width + z) * s->channels + c);
}

// V = B^T d B of the 6 x 6 pixels around each tile.
void transform_input(const Shape *s, const float *x, float *v) {
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t i = 0; i < s->count; i++) {
        Tile t = tile(s, i);
        for (int64_t k = 0; k < s->channels; k += LANES) {
            int64_t c = whole(k, s->channels);
            f32 columns[6][6], across[6], made[6];
            for (int z = 0; z < 6; z++) {
                f32 down[6];
                for (int y = 0; y < 6; y++) down[y] = pixel(s, x, t.at, t.row + y - 1, t.column + z - 1, c);
                in6(down, columns[z]);
            }
            for (int y = 0; y < 6; y++) {
                for (int z = 0; z < 6; z++) across[z] = columns[z][y];
                in6(across, made);
                for (int z = 0; z < 6; z++) STORE(v + (6 * y + z) * s->stride + i * s->channels + c, made[z]);
            }
        }
    }
}

// A^T m A and the bias, if there is one, into a map.
void transform_output(const Shape *s, const float *m, const float *bias, float *to) {
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t i = 0; i < s->count; i++) {
        Tile t = tile(s, i);
        for (int64_t k = 0; k < s->channels; k += LANES) {
            int64_t c = whole(k, s->channels);
            f32 columns[6][4], made[4], across[6], start = {0};
            if (bias) start = LOAD(bias + c);
            for (int z = 0; z < 6; z++) {
                f32 down[6];
                for (int y = 0; y < 6; y++) down[y] = LOAD(m + (6 * y + z) * s->stride + i * s->channels + c);
                out4(down, columns[z]);
            }
            for (int y = 0; y < 4 && t.row + y < s->height; y++) {
                for (int z = 0; z < 6; z++) across[z] = columns[z][y];
                out4(across, made);
                for (int z = 0; z < 4 && t.column + z < s->width; z++)
                    STORE(to + (t.at + (t.row + y) * s->width + t.column + z) * s->channels + c, made[z] + start);
            }
        }
    }
}

// A dy A^T: the gradient of m.
void transform_gradient(const Shape *s, const float *dy, float *d) {
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t i = 0; i < s->count; i++) {
        Tile t = tile(s, i);
        for (int64_t k = 0; k < s->channels; k += LANES) {
            int64_t c = whole(k, s->channels);
            f32 columns[4][6], across[4], made[6];
            for (int z = 0; z < 4; z++) {
                f32 down[4];
                for (int y = 0; y < 4; y++) down[y] = pixel(s, dy, t.at, t.row + y, t.column + z, c);
                out6(down, columns[z]);
            }
            for (int y = 0; y < 6; y++) {
                for (int z = 0; z < 4; z++) across[z] = columns[z][y];
                out6(across, made);
                for (int z = 0; z < 6; z++) STORE(d + (6 * y + z) * s->stride + i * s->channels + c, made[z]);
            }
        }
    }
}
