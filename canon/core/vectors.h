// As many floats at a time as a register holds, for the C kernels of this package: GCC's vector extensions (also
// Clang's), so any processor runs them; AVX-512 gets a few shortcuts. Longer vectors than registers would go by memory.

#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#ifndef LANES
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#define INLINE static inline __attribute__((always_inline))
typedef float f32 __attribute__((vector_size(4 * LANES)));
typedef int32_t i32 __attribute__((vector_size(4 * LANES)));
typedef uint32_t u32 __attribute__((vector_size(4 * LANES)));
typedef uint16_t u16 __attribute__((vector_size(2 * LANES)));
typedef float f32_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t u16_any __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
#define LOAD(p) (*(const f32_any *)(p))
#define STORE(p, v) (*(f32_any *)(p) = (v))

// Where the vector from i on begins: earlier where it would reach beyond the end, so that there are no loose ends.
// What is then computed twice is the same both times.
INLINE int64_t whole(int64_t i, int64_t count) { return i + LANES <= count ? i : count - LANES; }

INLINE u32 widen(u16 v) {
#ifdef __AVX512F__
    return (u32)_mm512_cvtepu16_epi32((__m256i)v);
#else
    return __builtin_convertvector(v, u32);
#endif
}

// bfloat16 is the upper half of a float32; rounding is to the nearest, ties to even. No number stays no number, which
// rounding might turn into -0.
INLINE f32 from_bf16(const uint16_t *p) { return (f32)(widen(*(const u16_any *)p) << 16); }
INLINE u16 to_bf16(f32 v) {
    u32 bits = (u32)v, number = (u32)(v == v);
    bits = (bits + (number & (0x7fff + ((bits >> 16) & 1)))) | (~number & 0x400000);
    return __builtin_convertvector(bits >> 16, u16);
}

// LANES elements from index i on, or one, of bfloat16 if half, else of float32.
INLINE f32 load(const char *p, int64_t i, int half) {
    if (half) return from_bf16((const uint16_t *)p + i);
    return LOAD((const float *)p + i);
}
INLINE float element(const char *p, int64_t i, int half) {
    if (!half) return ((const float *)p)[i];
    uint32_t bits = (uint32_t)((const uint16_t *)p)[i] << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
INLINE void store(char *p, int64_t i, f32 v, int half) {
    if (half) *(u16_any *)((uint16_t *)p + i) = to_bf16(v);
    else STORE((float *)p + i, v);
}

INLINE float vsum(f32 v) {
#ifdef __AVX512F__
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
#endif
}

INLINE float vmost(f32 v) {
#ifdef __AVX512F__
    return _mm512_reduce_max_ps((__m512)v);
#else
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = fmaxf(most, v[i]);
    return most;
#endif
}

INLINE f32 vmax(f32 a, f32 b) {
#ifdef __AVX512F__
    return (f32)_mm512_max_ps((__m512)a, (__m512)b);
#else
    i32 larger = a > b;
    return (f32)(((i32)a & larger) | ((i32)b & ~larger));
#endif
}

// 1 / x of a normal number, relative error below 2e-7
INLINE f32 inverse(f32 x) {
#ifdef __AVX512F__
    f32 y = (f32)_mm512_rcp14_ps((__m512)x);
    return y * (2 - x * y);  // Newton's step
#else
    return 1 / x;
#endif
}

// exp(x) = 2^n 2^f with n the integer nearest to x / ln 2; 2^f by its Taylor series, relative error below 2e-7. The
// exponent is kept between -126 and 126, so that the result is a positive, normal number.
INLINE f32 vexp(f32 x) {
    f32 t = x * 1.442695041f;
#ifdef __AVX512F__
    // of two operands of which one is no number, these return the second
    t = (f32)_mm512_min_ps(_mm512_set1_ps(126), _mm512_max_ps(_mm512_set1_ps(-126), (__m512)t));
#else
    i32 small = t < -126.0f, large = t > 126.0f;
    t = (f32)(((i32)t & ~small & ~large) | ((i32)((f32){0} - 126) & small) | ((i32)((f32){0} + 126) & large));
#endif
    f32 n = (t + 12582912.0f) - 12582912.0f, f = (t - n) * 0.6931471806f;  // adding 1.5 * 2^23 rounds
    f32 y = 1 + f * (1 + f * (1 / 2.0f + f * (1 / 6.0f + f * (1 / 24.0f + f * (1 / 120.0f + f * (1 / 720.0f))))));
    return (f32)((i32)y + (__builtin_convertvector(n, i32) << 23));
}
