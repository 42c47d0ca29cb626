// Products with block-quantised matrices: of one vector at the speed of memory, of many at that of 8-bit integers.
//
// A GGUF row is a sequence of blocks of 32 weights. Here the same bytes lie transposed (see quantized.py): a tile is 16
// rows, and for each group of 32 columns it holds the first 32-bit word of the 16 blocks, then the second, and so on.
// One vector register thus holds the same columns of 16 rows: its lanes are 16 running sums, the input is broadcast,
// and nothing is ever summed across lanes. Weights are never rounded, nor is a single vector. Many vectors are rounded
// to 8 bits, each group of 32 with a scale of its own (as llama.cpp does), for memory is no longer what is waited for.

#define LANES 16  // rows of a tile, whatever registers hold
#include "../vectors.h"
#include <stdlib.h>
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

// ---- Many vectors ---------------------------------------------------------------------------------------------------

#define TOKENS 6              // vectors that are multiplied together: with two tiles, 12 sums of integers, 12 of floats
#define PART (30 * TOKENS)    // vectors for which a tile is unpacked once, at most

// Thirty-two columns of TOKENS vectors: x = scale q. Words hold four columns; sum is that of x, for the minimum. Where
// one number is most of a group, the others would be lost beside it: such an outlier's group has a second term, `Fine`.
typedef struct { float scale[TOKENS], sum[TOKENS]; int32_t q[TOKENS][GROUP / 4]; uint8_t outlier[8]; } Group;
typedef struct { float scale[TOKENS]; int32_t q[TOKENS][GROUP / 4]; } Fine;
// Both (blocks of TOKENS, columns / GROUP); outliers: of each block, how many groups have a second term, and which.
typedef struct { Group *groups; Fine *fine; int32_t *outliers; } Vectors;
// Thirty-two columns of sixteen rows of a matrix: w = d q + m, q in unsigned bytes.
typedef struct { f32 scale, minimum; u32 q[GROUP / 4]; } Tile;

// Whether what follows is fast: `dot4` is one instruction, and there are threads.
#if defined(__AVX512VNNI__) && defined(_OPENMP)
const int fast_integers = 1;
#else
const int fast_integers = 0;
#endif
#ifdef __AVX512VNNI__
#define UNROLLED _Pragma("GCC unroll 12")
#else
#define UNROLLED _Pragma("GCC unroll 1")  // slow in any case: more would only lengthen compiling
#endif

// sum + w0 x0 + w1 x1 + w2 x2 + w3 x3 of the unsigned bytes of w and the signed ones of x
INLINE i32 dot4(i32 sum, u32 w, i32 x) {
#ifdef __AVX512VNNI__
    return (i32)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#else
    for (int shift = 24; shift >= 0; shift -= 8) sum += (i32)(w << (24 - shift) >> 24) * (x << (24 - shift) >> 24);
    return sum;
#endif
}

// Thirty-two small integers, as floats that 1.5 * 2^23 was added to: they are the lowest bytes.
INLINE void store_bytes(f32 low, f32 high, int32_t q[GROUP / 4]) {
    int8_t *bytes = (int8_t *)q;
#ifdef __AVX512F__
    _mm_storeu_si128((__m128i *)bytes, _mm512_cvtepi32_epi8((__m512i)low));
    _mm_storeu_si128((__m128i *)(bytes + LANES), _mm512_cvtepi32_epi8((__m512i)high));
#else
    for (int i = 0; i < LANES; i++) bytes[i] = ((i32)low)[i], bytes[i + LANES] = ((i32)high)[i];
#endif
}

// Round a group of vector t of a block; what is no number stays none, by the sum.
INLINE void round_group(f32 low, f32 high, Vectors to, int64_t index, int t) {
    const float to_integer = 12582912.0f;
    Group *group = to.groups + index;
    f32 squares = low * low + high * high;
    float largest = vmost(vmax((f32)((u32)low & 0x7fffffff), (f32)((u32)high & 0x7fffffff)));
    float scale = largest / 127, inverse = largest > 0x1p-119f ? 127 / largest : 0;  // of smaller ones: infinite
    f32 a = low * inverse + to_integer, b = high * inverse + to_integer;
    f32 sum = (a - to_integer) + (b - to_integer);
    store_bytes(a, b, group->q[t]);
    if ((group->outlier[t] = 6 * largest * largest > 5 * vsum(squares))) {
        a = (low * inverse - (a - to_integer)) * 254 + to_integer;
        b = (high * inverse - (b - to_integer)) * 254 + to_integer;
        sum += ((a - to_integer) + (b - to_integer)) / 254;
        store_bytes(a, b, to.fine[index].q[t]);
    }
    group->scale[t] = scale;
    group->sum[t] = vsum(sum) * scale;
}

// Once all groups are rounded: which have outliers.
static void list_outliers(Vectors x, int64_t columns, int64_t vectors) {
    int64_t groups = columns / GROUP;
#pragma omp for
    for (int64_t block = 0; block < vectors / TOKENS; block++) {
        int32_t *list = x.outliers + block * (1 + groups);
        *list = 0;
        for (int64_t g = block * groups; g < (block + 1) * groups; g++) {
            const Group *group = x.groups + g;
            if (!memcmp(group->outlier, (uint8_t[TOKENS]){0}, TOKENS)) continue;
            for (int t = 0; t < TOKENS; t++)  // 0 for vectors without one, whose `fine` is whatever memory held
                x.fine[g].scale[t] = group->outlier[t] ? group->scale[t] / 254 : 0;
            list[++*list] = g - block * groups;
        }
    }
}

static void unpack_tile(const Matrix *w, int64_t tile, Tile *out) {
    int64_t groups = w->columns / GROUP;
    for (int64_t g = 0; g < groups; g++, out++)
        if (w->type == Q4_1) {
            const Q4Tile *in = (const Q4Tile *)w->data + tile * groups + g;
            out->scale = from_f16(in->scale_and_minimum);
            out->minimum = from_f16(in->scale_and_minimum >> 16);
            for (int i = 0; i < 4; i++) out->q[i] = in->q[i] & 0x0f0f0f0f, out->q[i + 4] = in->q[i] >> 4 & 0x0f0f0f0f;
        } else {  // signed bytes, so 128 is added
            const Q8Tile *in = (const Q8Tile *)w->data + tile * groups + g;
            out->scale = from_f16(widen(*(const u16_any *)in->scale));
            out->minimum = out->scale * -128;
            memcpy(out->q, in->q, sizeof out->q);
            for (int i = 0; i < GROUP / 4; i++) out->q[i] ^= 0x80808080;
        }
}

// total += the products of thirty-two columns, but for the scale of each vector, which is in `scale`.
INLINE void add_group(f32 total[TOKENS][2], const Tile *left, const Tile *right, const int32_t q[TOKENS][GROUP / 4],
                      const float scale[TOKENS]) {
    i32 sum[TOKENS][2] = {{{0}}};
    UNROLLED
    for (int i = 0; i < GROUP / 4; i++)
        UNROLLED
        for (int t = 0; t < TOKENS; t++) {
            i32 columns = (i32){0} + q[t][i];
            sum[t][0] = dot4(sum[t][0], left->q[i], columns);
            sum[t][1] = dot4(sum[t][1], right->q[i], columns);
        }
    UNROLLED
    for (int t = 0; t < TOKENS; t++) {
        total[t][0] += __builtin_convertvector(sum[t][0], f32) * (left->scale * scale[t]);
        total[t][1] += __builtin_convertvector(sum[t][1], f32) * (right->scale * scale[t]);
    }
}

// y (blocks * TOKENS, 2): the rows of tiles a and b times the vectors from block `first` on; memory holds both tiles,
// unpacked.
static void two_tiles(const Matrix *w, int64_t a, int64_t b, Vectors x, int64_t first, int64_t blocks, Tile *memory,
                      f32 (*y)[2]) {
    int64_t groups = w->columns / GROUP;
    unpack_tile(w, a, memory);
    unpack_tile(w, b, memory + groups);
    int64_t size = groups * (w->type == Q4_1 ? sizeof(Q4Tile) : sizeof(Q8Tile));
    for (int64_t i = 0; i < size; i += 64) {  // of what comes next
        __builtin_prefetch((const char *)w->data + (a + 2) * size + i);
        __builtin_prefetch((const char *)w->data + (b + 2) * size + i);
    }
    const Group *group = x.groups + first * groups;
    const Fine *fine = x.fine + first * groups;
    for (int64_t block = 0; block < blocks; block++, y += TOKENS, group += groups, fine += groups) {
        f32 total[TOKENS][2] = {{{0}}};
        for (int64_t g = 0; g < groups; g++) {
            add_group(total, memory + g, memory + groups + g, group[g].q, group[g].scale);
            UNROLLED
            for (int t = 0; t < TOKENS; t++) {
                total[t][0] += memory[g].minimum * group[g].sum[t];
                total[t][1] += memory[groups + g].minimum * group[g].sum[t];
            }
        }
        const int32_t *list = x.outliers + (first + block) * (1 + groups);
        for (const int32_t *g = list + 1; g <= list + *list; g++)
            add_group(total, memory + *g, memory + groups + *g, fine[*g].q, fine[*g].scale);
        memcpy(y, total, sizeof total);
    }
}

static void *memory_for(int64_t count, int64_t size) { return aligned_alloc(64, (count * size + 63) / 64 * 64); }
static Vectors vectors_for(int64_t vectors, int64_t columns) {  // vectors: a multiple of TOKENS
    int64_t blocks = vectors / TOKENS, groups = columns / GROUP;
    return (Vectors){memory_for(blocks * groups, sizeof(Group)), memory_for(blocks * groups, sizeof(Fine)),
                  memory_for(blocks * (1 + groups), sizeof(int32_t))};
}
static int allocated(Vectors x) { return x.groups && x.fine && x.outliers; }
static void free_vectors(Vectors x) { free(x.groups), free(x.fine), free(x.outliers); }

// y (vectors, rows) = x (vectors, columns) W^T. Returns 0, or 1 if there is not enough memory.
int matmul(const Matrix *w, const float *x, float *y, int64_t vectors, int threads) {
    int64_t padded = (vectors + TOKENS - 1) / TOKENS * TOKENS, groups = w->columns / GROUP, failed = 0;
    if (!vectors) return 0;
    Vectors rounded = vectors_for(padded, w->columns);
    if (!allocated(rounded)) failed = 1;
#pragma omp parallel num_threads(threads)
    {
        int64_t part = padded < PART ? padded : PART, tiles = w->rows / LANES;
        Tile *memory = memory_for(2 * groups, sizeof *memory);
        f32 *products = memory_for(2 * part, sizeof *products);
        if (!memory || !products) {
#pragma omp atomic write
            failed = 1;
        }
#pragma omp barrier
        if (!failed) {
#pragma omp for
            for (int64_t t = 0; t < padded; t++)
                for (int64_t g = 0; g < groups; g++) {
                    // the last block is filled up with the first vector
                    const float *from = x + (t < vectors ? t : 0) * w->columns + g * GROUP;
                    round_group(LOAD(from), LOAD(from + LANES), rounded, t / TOKENS * groups + g, t % TOKENS);
                }
            list_outliers(rounded, w->columns, padded);
#pragma omp for collapse(2)
            for (int64_t from = 0; from < padded; from += part)
                for (int64_t a = 0; a < tiles; a += 2) {
                    int64_t b = a + 1 < tiles ? a + 1 : a, to = from + part < padded ? from + part : padded;
                    two_tiles(w, a, b, rounded, from / TOKENS, (to - from) / TOKENS, memory, (f32(*)[2])products);
                    for (int64_t t = from; t < to && t < vectors; t++) {
                        STORE(y + t * w->rows + a * LANES, products[2 * (t - from)]);
                        STORE(y + t * w->rows + b * LANES, products[2 * (t - from) + (b > a)]);
                    }
                }
        }
        free(memory), free(products);
    }
    free_vectors(rounded);
    return failed;
}
