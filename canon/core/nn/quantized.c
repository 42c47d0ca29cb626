// Products of a vector with block-quantised matrices, at the speed of memory.
//
// A GGUF row is a sequence of blocks of 32 weights. Here the same bytes lie transposed (see quantized.py): a tile is 16
// rows, and for each group of 32 columns it holds the first 32-bit word of the 16 blocks, then the second, and so on.
// One vector register thus holds the same columns of 16 rows: its lanes are 16 running sums, the input is broadcast,
// and nothing is ever summed across lanes. Weights are unpacked to float32 and never rounded, nor are the inputs.

#define LANES 16  // rows of a tile, whatever registers hold
#include "../vectors.h"
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num(void) { return 0; }
static int omp_get_num_threads(void) { return 1; }
#endif

#define GROUP 32

enum { Q4_1 = 3, Q8_0 = 8 };                                // GGML's numbers
typedef struct { u32 scale_and_minimum, q[4]; } Q4Tile;     // w = d q + m, d and m in float16
typedef struct { uint8_t scale[32], q[8][64]; } Q8Tile;     // w = d q
typedef struct { const void *data; int64_t type, rows, columns; } Matrix;

// float16 in the lower halves of the lanes: its fields shifted into place, and 2^112 for the difference of the biases.
static inline f32 from_f16(u32 v) {
    f32 magnitude = (f32)((v & 0x7fff) << 13) * 0x1p112f;
    return (f32)((u32)magnitude | (v & 0x8000) << 16);
}
// The four bits at `shift` of each lane, as floats.
static inline f32 nibble(u32 v, int shift) {
#ifdef __AVX512F__  // a table look-up, which reads the lower four bits only
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (f32)_mm512_permutexvar_ps((__m512i)(v >> shift), table);
#else
    return __builtin_convertvector((i32)(v >> shift & 15), f32);
#endif
}
static inline f32 signed_byte(u32 v, int shift) {
    return __builtin_convertvector((i32)(v << (24 - shift)) >> 24, f32);
}

// Sixteen rows times x; sums[g] is the sum of x over group g, which the minimum of the group multiplies.
static inline f32 q4_rows(const Q4Tile *tile, int64_t groups, const float *x, const float *sums) {
    f32 y = {0};
    for (int64_t g = 0; g < groups; g++, tile++, x += GROUP) {
        f32 part[4] = {{0}};
        __builtin_prefetch((const char *)tile + 2048);
        __builtin_prefetch((const char *)tile + 2048 + 128);
        __builtin_prefetch((const char *)tile + 2048 + 256);
        for (int w = 0; w < 4; w++)
            for (int b = 0; b < 4; b++) {
                part[b] += nibble(tile->q[w], 8 * b) * x[4 * w + b];
                part[b] += nibble(tile->q[w], 8 * b + 4) * x[4 * w + b + 16];
            }
        y += from_f16(tile->scale_and_minimum) * ((part[0] + part[1]) + (part[2] + part[3]));
        y += from_f16(tile->scale_and_minimum >> 16) * sums[g];
    }
    return y;
}

static inline f32 q8_rows(const Q8Tile *tile, int64_t groups, const float *x) {
    f32 y = {0};
    for (int64_t g = 0; g < groups; g++, tile++, x += GROUP) {
        f32 part[4] = {{0}};
        for (int w = 0; w < 8; w++) {
            u32 q;
            __builtin_prefetch((const char *)tile + 4096 + 64 * w);
            memcpy(&q, tile->q[w], sizeof q);
            for (int b = 0; b < 4; b++) part[b] += signed_byte(q, 8 * b) * x[4 * w + b];
        }
        y += from_f16(widen(*(const u16_any *)tile->scale)) * ((part[0] + part[1]) + (part[2] + part[3]));
    }
    return y;
}

static inline f32 rows16(const Matrix *m, int64_t tile, const float *x, const float *sums) {
    int64_t groups = m->columns / GROUP;
    if (m->type == Q4_1) return q4_rows((const Q4Tile *)m->data + tile * groups, groups, x, sums);
    return q8_rows((const Q8Tile *)m->data + tile * groups, groups, x);
}

static inline void group_sums(const float *x, int64_t n, float *sums) {
    for (int64_t g = 0; g < n / GROUP; g++) {
        float sum = 0;
        for (int j = 0; j < GROUP; j++) sum += x[g * GROUP + j];
        sums[g] = sum;
    }
}

// The calling thread's share of `tiles`.
static inline void share(int64_t tiles, int64_t *from, int64_t *to) {
    int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    *from = tiles * thread / threads;
    *to = tiles * (thread + 1) / threads;
}

// y (rows) = W x
void matvec(const Matrix *w, const float *x, float *y, int threads) {
    float sums[w->columns / GROUP];
    group_sums(x, w->columns, sums);
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to;
        share(w->rows / LANES, &from, &to);
        for (int64_t t = from; t < to; t++) STORE(y + LANES * t, rows16(w, t, x, sums));
    }
}

// out (columns, rows) = the transpose of W, rounded to bfloat16
void transpose_to_bf16(const Matrix *w, uint16_t *out, int threads) {
    int64_t groups = w->columns / GROUP;
#pragma omp parallel num_threads(threads)
    {
        int64_t from, to;
        share(w->rows / LANES, &from, &to);
        for (int64_t t = from; t < to; t++)
            for (int64_t g = 0; g < groups; g++) {
                f32 columns[GROUP];
                if (w->type == Q4_1) {
                    const Q4Tile *tile = (const Q4Tile *)w->data + t * groups + g;
                    f32 scale = from_f16(tile->scale_and_minimum), minimum = from_f16(tile->scale_and_minimum >> 16);
                    for (int c = 0; c < 16; c++) {
                        columns[c] = nibble(tile->q[c / 4], c % 4 * 8) * scale + minimum;
                        columns[c + 16] = nibble(tile->q[c / 4], c % 4 * 8 + 4) * scale + minimum;
                    }
                } else {
                    const Q8Tile *tile = (const Q8Tile *)w->data + t * groups + g;
                    f32 scale = from_f16(widen(*(const u16_any *)tile->scale));
                    for (int c = 0; c < GROUP; c++) {
                        u32 q;
                        memcpy(&q, tile->q[c / 4], sizeof q);
                        columns[c] = signed_byte(q, c % 4 * 8) * scale;
                    }
                }
                for (int c = 0; c < GROUP; c++)
                    *(u16_any *)(out + (g * GROUP + c) * w->rows + t * LANES) = to_bf16(columns[c]);
            }
    }
}
