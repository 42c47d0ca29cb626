// Winograd's convolution F(4 x 4, 3 x 3): tiles of 4 x 4 pixels that take 36 products a channel instead of 144 (Lavin and
// Gray 2016, arXiv 1509.09308, section 4.3).
//
// A thread keeps its tiles in its own cache from the first transform to the last, the products between them included:
// handed from core to core, they cost more than the products themselves.
//
// The polynomials behind it are evaluated at 0, +-3/4, +-3/2 and infinity: at the paper's 0, +-1, +-2 the largest error
// in float32 is four times as large.
//
// Maps are (batch, height, width, channels), channels neighbours in memory, at least 16 of them. Tiles are counted
// through the maps of a batch, row by row. A transform of tiles is (36, tiles, channels), that of a kernel (36, channels,
// others), float32. Every function returns whether there was no memory.

#include <stdlib.h>

#include "../vectors.h"

// Rows times vectors of a product whose sums a processor has registers for.
#define WIDE 2
#define ROWS (LANES == 16 ? 8 : 4)
#define PANEL (WIDE * LANES)
#define APART LANES  // between the 36: were they 4,096 bytes apart, all would fall upon the same lines of the cache

typedef struct {
    int64_t height, width, channels, others, tiles, block, groups, other_groups, threads;
} Shape;

#define A 0.75f
#define B 1.5f
#define C (A * A)
#define D (B * B)
#define P (0.5f / (C * C - C * D))
#define Q (0.5f / (D * D - C * D))

// G g
INLINE void kernel6(const f32 g[3], f32 u[6]) {
    f32 a = P * (g[0] + C * g[2]), b = P * A * g[1], c = Q * (g[0] + D * g[2]), d = Q * B * g[1];
    u[0] = g[0] * (1 / (C * D));
    u[1] = a + b;
    u[2] = a - b;
    u[3] = c + d;
    u[4] = c - d;
    u[5] = g[2];
}

// G^T u
INLINE void kernel3(const f32 u[6], f32 g[3]) {
    f32 a = P * (u[1] + u[2]), b = P * A * (u[1] - u[2]), c = Q * (u[3] + u[4]), d = Q * B * (u[3] - u[4]);
    g[0] = u[0] * (1 / (C * D)) + a + c;
    g[1] = b + d;
    g[2] = C * a + D * c + u[5];
}

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
    int64_t across = (s->width + 3) / 4, each = (s->height + 3) / 4 * across;
    return (Tile){i / each * s->height * s->width, i % each / across * 4, i % across * 4};
}

// LANES channels of a pixel from c on; what lies outside of the map is zero.
INLINE f32 pixel(const Shape *s, const float *x, int64_t channels, Tile t, int64_t y, int64_t z, int64_t c) {
    f32 nothing = {0};
    y += t.row, z += t.column;
    if (y < 0 || z < 0 || y >= s->height || z >= s->width) return nothing;
    return LOAD(x + (t.at + y * s->width + z) * channels + c);
}

// V = B^T d B of the 6 x 6 pixels around a tile, LANES channels from c on; `stride` is that from one of the 36 to the next.
INLINE void transform_input(const Shape *s, const float *x, Tile t, int64_t c, float *v, int64_t stride) {
    f32 columns[6][6], across[6], made[6];
    for (int z = 0; z < 6; z++) {
        f32 down[6];
        for (int y = 0; y < 6; y++) down[y] = pixel(s, x, s->channels, t, y - 1, z - 1, c);
        in6(down, columns[z]);
    }
    for (int y = 0; y < 6; y++) {
        for (int z = 0; z < 6; z++) across[z] = columns[z][y];
        in6(across, made);
        for (int z = 0; z < 6; z++) STORE(v + (6 * y + z) * stride, made[z]);
    }
}

// A dy A^T, the gradient of what the products made.
INLINE void transform_gradient(const Shape *s, const float *dy, Tile t, int64_t c, float *d, int64_t stride) {
    f32 columns[4][6], across[4], made[6];
    for (int z = 0; z < 4; z++) {
        f32 down[4];
        for (int y = 0; y < 4; y++) down[y] = pixel(s, dy, s->others, t, y, z, c);
        out6(down, columns[z]);
    }
    for (int y = 0; y < 6; y++) {
        for (int z = 0; z < 4; z++) across[z] = columns[z][y];
        out6(across, made);
        for (int z = 0; z < 6; z++) STORE(d + (6 * y + z) * stride, made[z]);
    }
}

// A^T m A and the bias, if there is one.
INLINE void transform_output(const Shape *s, const float *m, int64_t stride, const float *bias, Tile t, int64_t c,
                             float *y) {
    f32 columns[6][4], across[6], made[4], start = {0};
    if (bias) start = LOAD(bias + c);
    for (int z = 0; z < 6; z++) {
        f32 down[6];
        for (int y = 0; y < 6; y++) down[y] = LOAD(m + (6 * y + z) * stride);
        out4(down, columns[z]);
    }
    for (int i = 0; i < 4 && t.row + i < s->height; i++) {
        for (int z = 0; z < 6; z++) across[z] = columns[z][i];
        out4(across, made);
        for (int z = 0; z < 4 && t.column + z < s->width; z++)
            STORE(y + (t.at + (t.row + i) * s->width + t.column + z) * s->others + c, made[z] + start);
    }
}

INLINE int transform(const Shape *s, const float *g, float *u, int turned) {
    int64_t across = 9 * (turned ? 1 : s->channels), down = 9 * (turned ? s->others : 1);
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t k = 0; k < s->channels; k++)
        for (int64_t j = 0; j < s->others; j += LANES) {
            int64_t c = whole(j, s->others);
            f32 taps[3][3], columns[3][6], row[3], made[6];
            for (int i = 0; i < 9; i++)
                for (int l = 0; l < LANES; l++)
                    taps[i % 3][i / 3][l] = g[(c + l) * across + k * down + (turned ? 8 - i : i)];
            for (int z = 0; z < 3; z++) kernel6(taps[z], columns[z]);
            for (int y = 0; y < 6; y++) {
                for (int z = 0; z < 3; z++) row[z] = columns[z][y];
                kernel6(row, made);
                for (int z = 0; z < 6; z++) STORE(u + ((6 * y + z) * s->channels + k) * s->others + c, made[z]);
            }
        }
    return 0;
}

// u (36, channels, others) <- G g G^T, of g (others, channels, 3, 3)
int transform_kernel(const Shape *s, const float *g, float *u) { return transform(s, g, u, 0); }

// of g (channels, others, 3, 3), turned by half a circle
int transform_kernel_turned(const Shape *s, const float *g, float *u) { return transform(s, g, u, 1); }

// m (rows, wide vectors) <- v (rows, channels) u (channels, wide vectors, which begin at `at`)
INLINE void multiply(const Shape *s, const float *v, const float *u, const int64_t at[WIDE], float *m, int rows,
                     int wide) {
    f32 sum[ROWS][WIDE] = {{{0}}};
    for (int64_t k = 0; k < s->channels; k++) {
        f32 right[WIDE];
        for (int w = 0; w < wide; w++) right[w] = LOAD(u + k * s->others + at[w]);
        for (int r = 0; r < rows; r++)
            for (int w = 0; w < wide; w++) sum[r][w] += v[r * s->channels + k] * right[w];
    }
    for (int r = 0; r < rows; r++)
        for (int w = 0; w < wide; w++) STORE(m + r * PANEL + w * LANES, sum[r][w]);
}

INLINE void multiply_all(const Shape *s, int64_t rows, const float *v, const float *u, const int64_t at[WIDE], float *m,
                         int wide) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS) multiply(s, v + r * s->channels, u, at, m + r * PANEL, ROWS, wide);
    for (; r < rows; r++) multiply(s, v + r * s->channels, u, at, m + r * PANEL, 1, wide);
}

// y (batch, height, width, others) <- x, convolved by the kernel whose transform is u, and the bias, if there is one;
// a thread takes a block of tiles at a time.
int convolve(const Shape *s, const float *x, const float *u, const float *bias, float *y) {
    int64_t v_stride = s->block * s->channels + APART, m_stride = s->block * PANEL + APART;
    int failed = 0;
#pragma omp parallel num_threads(s->threads)
    {
        float *v = malloc(36 * (v_stride + m_stride) * sizeof(float)), *m = v + 36 * v_stride;
        if (!v) failed = 1;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < s->tiles; first += s->block) {
            if (!v) continue;
            int64_t rows = s->tiles - first < s->block ? s->tiles - first : s->block;
            for (int64_t i = 0; i < rows; i++)
                for (int64_t k = 0, c; k < s->channels; k += LANES) {
                    c = whole(k, s->channels);
                    transform_input(s, x, tile(s, first + i), c, v + i * s->channels + c, v_stride);
                }
            for (int64_t panel = 0; panel < s->others; panel += PANEL) {
                int64_t at[WIDE] = {0}, wide = 0;
                for (int64_t c = panel; wide < WIDE && c < s->others; c += LANES) at[wide++] = whole(c, s->others);
                for (int e = 0; e < 36; e++) {
                    const float *left = v + e * v_stride, *right = u + e * s->channels * s->others;
                    if (wide == WIDE) multiply_all(s, rows, left, right, at, m + e * m_stride, WIDE);
                    else multiply_all(s, rows, left, right, at, m + e * m_stride, 1);
                }
                for (int64_t i = 0; i < rows; i++)
                    for (int64_t w = 0; w < wide; w++)
                        transform_output(s, m + i * PANEL + w * LANES, m_stride, bias, tile(s, first + i), at[w], y);
            }
        }
        free(v);
    }
    return failed;
}

// du (ROWS, wide vectors) += d^T (ROWS, tiles) v (tiles, wide vectors), whose rows are n and m numbers long
INLINE void multiply_back(int64_t tiles, const float *d, int64_t n, const float *v, int64_t m, float *du, int wide) {
    f32 sum[ROWS][WIDE];
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < wide; w++) sum[r][w] = LOAD(du + r * m + w * LANES);
    for (int64_t t = 0; t < tiles; t++) {
        f32 right[WIDE];
        for (int w = 0; w < wide; w++) right[w] = LOAD(v + t * m + w * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int w = 0; w < wide; w++) sum[r][w] += d[t * n + r] * right[w];
    }
    for (int r = 0; r < ROWS; r++)
        for (int w = 0; w < wide; w++) STORE(du + r * m + w * LANES, sum[r][w]);
}

// dg (others, channels, 3, 3), the gradient of the kernel, from x and dy: each of groups x other_groups threads makes that
// of some channels and other channels, from all tiles, a block at a time.
int convolve_backward(const Shape *s, const float *x, const float *dy, float *dg) {
    int64_t vectors = (s->channels + LANES - 1) / LANES, others = (s->others + LANES - 1) / LANES, failed = 0;
#pragma omp parallel for schedule(static) num_threads(s->threads)
    for (int64_t item = 0; item < s->groups * s->other_groups; item++) {
        int64_t group = item / s->other_groups, other = item % s->other_groups;
        int64_t from = vectors * group / s->groups, m = vectors * (group + 1) / s->groups * LANES - from * LANES;
        int64_t start = others * other / s->other_groups;
        int64_t n = others * (other + 1) / s->other_groups * LANES - start * LANES;
        int64_t v_stride = s->block * m + APART, d_stride = s->block * n + APART;
        float *du = calloc(36 * (n * m + v_stride + d_stride), sizeof(float));
        float *v = du + 36 * n * m, *d = v + 36 * v_stride;
        if (!du) {
            failed = 1;
            continue;
        }
        for (int64_t first = 0; first < s->tiles; first += s->block) {
            int64_t rows = s->tiles - first < s->block ? s->tiles - first : s->block;
            for (int64_t i = 0; i < rows; i++) {
                Tile t = tile(s, first + i);
                for (int64_t k = 0; k < m; k += LANES)
                    transform_input(s, x, t, whole(from * LANES + k, s->channels), v + i * m + k, v_stride);
                for (int64_t k = 0; k < n; k += LANES)
                    transform_gradient(s, dy, t, whole(start * LANES + k, s->others), d + i * n + k, d_stride);
            }
            for (int e = 0; e < 36; e++)
                for (int64_t c = 0; c < m; c += PANEL)
                    for (int64_t r = 0; r < n; r += ROWS) {
                        const float *left = d + e * d_stride + r, *right = v + e * v_stride + c;
                        float *to = du + (e * n + r) * m + c;
                        if (c + PANEL <= m) multiply_back(rows, left, n, right, m, to, WIDE);
                        else multiply_back(rows, left, n, right, m, to, 1);
                    }
        }
        for (int64_t r = 0; r < n; r++)
            for (int64_t k = 0; k < m; k += LANES) {
                int64_t row = whole(start * LANES + r / LANES * LANES, s->others) + r % LANES;
                int64_t c = whole(from * LANES + k, s->channels);
                f32 down[6], columns[6][3], across[6], made[3];
                for (int z = 0; z < 6; z++) {
                    for (int y = 0; y < 6; y++) down[y] = LOAD(du + ((6 * y + z) * n + r) * m + k);
                    kernel3(down, columns[z]);
                }
                for (int y = 0; y < 3; y++) {
                    for (int z = 0; z < 6; z++) across[z] = columns[z][y];
                    kernel3(across, made);
                    for (int z = 0; z < 3; z++)
                        for (int l = 0; l < LANES; l++)
                            dg[(row * s->channels + c + l) * 9 + 3 * y + z] = made[z][l];
                }
            }
        free(du);
    }
    return failed;
}
