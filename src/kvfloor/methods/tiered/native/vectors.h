/* Compute with vectors of eight numbers, by the vector types of GCC and Clang.

   Instructions are named where the processor for which this is compiled has AVX2. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(one, two, ...) __builtin_shufflevector(one, two, __VA_ARGS__)
#else
#define SHUFFLE(one, two, ...) __builtin_shuffle(one, two, (integers){__VA_ARGS__})
#endif

enum { LANES = 8 };

static const double LEAST = -80.0; /* least exponent of a weight relative to the largest one: smaller weights are 0 */

typedef float numbers __attribute__((vector_size(32)));
typedef int32_t integers __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef numbers loose __attribute__((aligned(4), may_alias));
typedef integers loose_integers __attribute__((aligned(4), may_alias));
typedef uint16_t shorts __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint8_t bytes __attribute__((vector_size(8), aligned(1), may_alias));
typedef int8_t signed_bytes __attribute__((vector_size(8), aligned(1), may_alias));

INLINE numbers load(const float *from) { return *(const loose *)from; }
INLINE void store(float *to, numbers x) { *(loose *)to = x; }
INLINE numbers every(float x) { return x - (numbers){}; }
INLINE numbers where(integers mask, numbers x) { return (numbers)((integers)x & mask); }
INLINE numbers choose(integers mask, numbers x, numbers y) {
    return (numbers)(((integers)x & mask) | ((integers)y & ~mask));
}
/* Return the larger of two numbers, the second one if the first is not a number. */
INLINE numbers larger(numbers x, numbers y) {
#ifdef __AVX2__
    return (numbers)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return choose(x > y, x, y);
#endif
}
INLINE integers lanes_from(int32_t start) { return (integers){0, 1, 2, 3, 4, 5, 6, 7} + start; }
INLINE numbers as_floats(integers x) { return __builtin_convertvector(x, numbers); }
INLINE double most_of(double x, double y) { return x > y ? x : y; }
INLINE double least_of(double x, double y) { return x < y ? x : y; }
INLINE numbers absolute(numbers x) { return (numbers)((integers)x & 0x7fffffff); }

/* Return eight signed bytes as numbers. */
INLINE numbers from_signed(const int8_t *at) {
#ifdef __AVX2__
    return (numbers)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)at)));
#else
    return as_floats(__builtin_convertvector(*(const signed_bytes *)at, integers));
#endif
}

/* Return eight bytes as numbers. */
INLINE numbers from_bytes(const uint8_t *at) {
#ifdef __AVX2__
    return (numbers)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)at)));
#else
    return as_floats(__builtin_convertvector(*(const bytes *)at, integers));
#endif
}

/* Return eight numbers of bfloat16 from their bits. */
INLINE numbers from_shorts(const uint16_t *at) {
#ifdef __AVX2__
    return (numbers)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)at)), 16);
#else
    return (numbers)(__builtin_convertvector(*(const shorts *)at, words) << 16);
#endif
}

INLINE float from_short(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float x;
    memcpy(&x, &wide, 4);
    return x;
}

/* Return a mask of the lanes that are set, lane 0 in bit 0. */
INLINE unsigned marked(integers mask) {
#ifdef __AVX2__
    return (unsigned)_mm256_movemask_ps((__m256)mask);
#else
    unsigned bits = 0;
    for (int i = 0; i < LANES; i++) bits |= (unsigned)(mask[i] & 1) << i;
    return bits;
#endif
}

/* Return the numbers at eight places of an array. */
INLINE numbers numbers_at(const float *array, integers place) {
#ifdef __AVX2__
    return (numbers)_mm256_i32gather_ps(array, (__m256i)place, 4);
#else
    numbers out;
    for (int i = 0; i < LANES; i++) out[i] = array[place[i]];
    return out;
#endif
}

/* Return a mask of the lanes whose bits, lane 0 in bit 0, are not set. */
INLINE integers unmarked(unsigned bits) {
    return ((integers){1, 2, 4, 8, 16, 32, 64, 128} & (int32_t)bits) == 0;
}

/* Return the sums of four vectors' lanes, in the lower four lanes. */
INLINE numbers sums_of_four(numbers a, numbers b, numbers c, numbers d) {
    numbers ab = SHUFFLE(a, b, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    numbers cd = SHUFFLE(c, d, 0, 8, 2, 10, 4, 12, 6, 14) + SHUFFLE(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
    numbers half = SHUFFLE(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) + SHUFFLE(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
    return half + SHUFFLE(half, half, 4, 5, 6, 7, 0, 1, 2, 3);
}

INLINE float sum(numbers x) {
    numbers none = {};
    return sums_of_four(x, none, none, none)[0];
}

INLINE float highest(numbers x) {
    x = larger(x, SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
    x = larger(x, SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
    return x[0] > x[1] ? x[0] : x[1];
}

/* Return exp(x) for x <= 0, to within 2^-22 of it; 0 below LEAST. */
INLINE numbers exponential(numbers x) {
    integers n = __builtin_convertvector(x * 1.44269504f - 0.5f, integers);
    numbers whole = as_floats(n);
    numbers r = x - whole * 0.693359375f + whole * 2.12194440e-4f; /* the first product has no rounding */
    numbers p = every(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    return where(x >= (float)LEAST, p * (numbers)((n + 127) << 23));
}
