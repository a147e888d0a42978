/* Compute attention of few queries over many tokens, or its log-masses alone, from float32 or bfloat16 keys and values.

   A row is one stream of tokens. Its tokens are read in parts, and a part in tiles, which stay in the processor's
   caches while all queries read them: first the logits of four queries and two tokens at a time, then the weights
   relative to the largest logit so far, then the sums of weighted values. Sums are in float32, but for those of the
   tiles' weights, which are in float64. For processors with AVX2 and fused multiply-add. */

#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8")

enum { LANES = 8, QUERIES = 4, TILE = 64, MOST_QUERIES = 16, MOST_THREADS = 256 };

typedef __m256 numbers;

struct asked {
    int64_t rows, m, s, d, dv;                      /* dv: 0 for log-masses alone */
    int64_t k_row, k_token, v_row, v_token, w_row;  /* strides, in numbers */
    int64_t part, narrow;                           /* tokens of a part, a multiple of TILE; 1 for bfloat16 */
    const float *q;                                 /* rows x m rounded up to QUERIES x d rounded up to LANES, scaled */
    const void *k, *v;
    const float *weight;                            /* rows x s, added to the logits; 0: nothing is added */
    float *mean, *log_mass;                         /* rows x parts x m x dv, rows x parts x m */
};

int64_t size_of_asked(void) { return sizeof(struct asked); }

INLINE numbers load(const float *from) { return _mm256_loadu_ps(from); }
INLINE void store(float *to, numbers x) { _mm256_storeu_ps(to, x); }
INLINE numbers every(float x) { return _mm256_set1_ps(x); }

/* Return eight numbers from place `at` on, or only `count` of them and zeros after them. */
INLINE numbers eight(const void *from, int64_t at, int64_t count, int narrow) {
    if (narrow) {
        const uint16_t *bits = (const uint16_t *)from + at;
        uint16_t some[LANES] = {0};
        if (count < LANES) bits = memcpy(some, bits, (size_t)count * sizeof *bits);
        __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)bits));
        return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
    }
    const float *at_hand = (const float *)from + at;
    float some[LANES] = {0};
    if (count < LANES) at_hand = memcpy(some, at_hand, (size_t)count * sizeof *at_hand);
    return load(at_hand);
}

INLINE float sum(numbers x) {
    float each[LANES];
    store(each, x);
    return ((each[0] + each[1]) + (each[2] + each[3])) + ((each[4] + each[5]) + (each[6] + each[7]));
}

/* Return the sums of four vectors. */
INLINE __m128 sums(numbers a, numbers b, numbers c, numbers d) {
    numbers pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

INLINE float highest(numbers x) {
    float each[LANES], most = -INFINITY;
    store(each, x);
    for (int i = 0; i < LANES; i++) most = each[i] > most ? each[i] : most;
    return most;
}

/* Return exp(x) for x <= 0, to within some 2^-22 of it; 0 below -87, and for what is not a number. */
INLINE numbers exponential(numbers x) {
    numbers whole = _mm256_round_ps(x * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    numbers r = x - whole * 0.693359375f + whole * 2.12194440e-4f; /* the first product has no rounding */
    numbers p = every(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return _mm256_and_ps(p * _mm256_castsi256_ps(power), _mm256_cmp_ps(x, every(-87.0f), _CMP_GE_OQ));
}

/* Write the logits of four queries on the tokens i and i + 1 of a tile, whose keys begin at the places one and two. */
INLINE void two_logits(const struct asked *a, const float *q, int64_t wide, int64_t one, int64_t two, float *logit,
                       int i, int narrow) {
    numbers x[QUERIES] = {}, y[QUERIES] = {};
    for (int64_t at = 0; at < a->d; at += LANES) {
        numbers first = eight(a->k, one + at, a->d - at, narrow), second = eight(a->k, two + at, a->d - at, narrow);
        UNROLL for (int j = 0; j < QUERIES; j++) {
            numbers query = load(q + j * wide + at);
            x[j] += query * first;
            y[j] += query * second;
        }
    }
    __m128 of_one = sums(x[0], x[1], x[2], x[3]), of_two = sums(y[0], y[1], y[2], y[3]);
    UNROLL for (int j = 0; j < QUERIES; j++) {
        logit[j * TILE + i] = of_one[j];
        logit[j * TILE + i + 1] = of_two[j];
    }
}

/* What is known of a query's logits so far: the largest one, by what it fades older weights, the sum of the weights, and
   whether a logit is infinite or not a number. */
struct seen {
    float top, fade;
    double mass;
    int lost;
};

/* Turn one query's n logits of a tile into weights relative to the largest logit so far. */
INLINE void weigh(float *logit, const float *weight, int64_t n, struct seen *seen) {
    for (int64_t i = n; i < TILE; i++) logit[i] = -INFINITY;
    if (weight) {
        int64_t i = 0;
        for (; i + LANES <= n; i += LANES) store(logit + i, load(logit + i) + load(weight + i));
        for (; i < n; i++) logit[i] += weight[i];
    }
    numbers best = every(-INFINITY);
    numbers finite = _mm256_cmp_ps(best, best, _CMP_EQ_OQ);
    for (int i = 0; i < TILE; i += LANES) {
        numbers x = load(logit + i);
        finite = _mm256_and_ps(finite, _mm256_cmp_ps(x, every(INFINITY), _CMP_LT_OQ)); /* false for no number too */
        best = _mm256_max_ps(x, best);
    }
    if (_mm256_movemask_ps(finite) != 0xff) seen->lost = 1;
    float higher = highest(best);
    seen->fade = 1.0f;
    if (higher > seen->top) {
        seen->fade = (float)exp((double)seen->top - higher);
        seen->mass *= seen->fade;
        seen->top = higher;
    }
    float shift = seen->top > -INFINITY ? seen->top : 0.0f;
    numbers total = {};
    for (int i = 0; i < TILE; i += LANES) {
        numbers x = exponential(load(logit + i) - shift);
        store(logit + i, x);
        total += x;
    }
    seen->mass += sum(total);
}

/* Add to four queries' sums of values, which fade first, those of a tile's n tokens. */
INLINE void add_values(const struct asked *a, int64_t base, const float *weight, const struct seen *seen, int64_t n,
                       float *sum_at, int64_t wide, int narrow) {
    int64_t at = 0;
    for (; at + 2 * LANES <= a->dv; at += 2 * LANES) {
        numbers x[QUERIES], y[QUERIES];
        UNROLL for (int j = 0; j < QUERIES; j++) {
            x[j] = load(sum_at + j * wide + at) * seen[j].fade;
            y[j] = load(sum_at + j * wide + at + LANES) * seen[j].fade;
        }
        for (int64_t i = 0; i < n; i++) {
            numbers first = eight(a->v, base + i * a->v_token + at, LANES, narrow);
            numbers second = eight(a->v, base + i * a->v_token + at + LANES, LANES, narrow);
            UNROLL for (int j = 0; j < QUERIES; j++) {
                x[j] += first * weight[j * TILE + i];
                y[j] += second * weight[j * TILE + i];
            }
        }
        UNROLL for (int j = 0; j < QUERIES; j++) {
            store(sum_at + j * wide + at, x[j]);
            store(sum_at + j * wide + at + LANES, y[j]);
        }
    }
    for (; at < a->dv; at += LANES) {
        numbers x[QUERIES];
        for (int j = 0; j < QUERIES; j++) x[j] = load(sum_at + j * wide + at) * seen[j].fade;
        for (int64_t i = 0; i < n; i++) {
            numbers value = eight(a->v, base + i * a->v_token + at, a->dv - at, narrow);
            for (int j = 0; j < QUERIES; j++) x[j] += value * weight[j * TILE + i];
        }
        for (int j = 0; j < QUERIES; j++) store(sum_at + j * wide + at, x[j]);
    }
}

/* Ask for two tokens' values, which are read once the tile's logits are known. */
INLINE void announce(const struct asked *a, int64_t place, int64_t size) {
    const char *at = (const char *)a->v + place * size;
    for (int64_t byte = 0; byte < a->dv * size; byte += 64) {
        __builtin_prefetch(at + byte);
        __builtin_prefetch(at + a->v_token * size + byte);
    }
}

INLINE void read_part(const struct asked *a, int64_t row, int64_t number, int64_t parts, int narrow) {
    int64_t from = number * a->part, to = from + a->part < a->s ? from + a->part : a->s;
    int64_t wide = (a->d + LANES - 1) / LANES * LANES, wide_v = (a->dv + LANES - 1) / LANES * LANES;
    int64_t groups = (a->m + QUERIES - 1) / QUERIES, size = narrow ? 2 : 4;
    float logit[QUERIES * TILE], total[groups * QUERIES * wide_v + 1];
    struct seen seen[MOST_QUERIES];
    for (int i = 0; i < MOST_QUERIES; i++) seen[i] = (struct seen){-INFINITY, 1.0f, 0.0, 0};
    memset(total, 0, sizeof total);
    for (int64_t start = from; start < to; start += TILE) {
        int64_t n = to - start < TILE ? to - start : TILE;
        int64_t key = row * a->k_row + start * a->k_token, value = row * a->v_row + start * a->v_token;
        const float *weight = a->weight ? a->weight + row * a->w_row + start : 0;
        for (int64_t group = 0; group < groups; group++) {
            const float *q = a->q + (row * groups + group) * QUERIES * wide;
            for (int64_t i = 0; i < n; i += 2) {
                int64_t one = key + i * a->k_token, two = i + 1 < n ? one + a->k_token : one;
                if (group == 0 && i + 1 < n) announce(a, value + i * a->v_token, size);
                two_logits(a, q, wide, one, two, logit, (int)i, narrow);
            }
            for (int j = 0; j < QUERIES; j++) weigh(logit + j * TILE, weight, n, seen + group * QUERIES + j);
            add_values(a, value, logit, seen + group * QUERIES, n, total + group * QUERIES * wide_v, wide_v, narrow);
        }
    }
    for (int64_t j = 0; j < a->m; j++) {
        int64_t at = (row * parts + number) * a->m + j;
        double mass = seen[j].lost ? NAN : seen[j].mass;
        a->log_mass[at] = (float)(seen[j].top + log(mass)); /* -infinity without mass */
        float share = mass == 0 ? 0.0f : (float)(1.0 / mass);
        for (int64_t i = 0; i < a->dv; i++) a->mean[at * a->dv + i] = total[j * wide_v + i] * share;
    }
}

/* The tasks of one call, of which threads take one after the other: number i is part i % parts of row i / parts. */
struct work {
    const struct asked *asked;
    int64_t parts, next;
};

static void work_on(void *given) {
    struct work *work = given;
    const struct asked *a = work->asked;
    for (;;) {
        int64_t i = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (i >= a->rows * work->parts) return;
        if (a->narrow) read_part(a, i / work->parts, i % work->parts, work->parts, 1);
        else read_part(a, i / work->parts, i % work->parts, work->parts, 0);
    }
}

static void *work_as_thread(void *given) {
    work_on(given);
    return 0;
}

/* Answer all queries in at most so many threads. Where threads cannot be had, fewer do the work.
   parallel: GOMP_parallel of the OpenMP runtime that torch runs, whose threads wait for work; 0: threads are started */
void attend_few(int64_t threads, void (*parallel)(void (*)(void *), void *, unsigned, unsigned), const struct asked *a) {
    struct work work = {a, (a->s + a->part - 1) / a->part, 0};
    int64_t most = a->rows * work.parts < threads ? a->rows * work.parts : threads, started = 0;
    if (parallel && most > 1) {
        parallel(work_on, &work, (unsigned)most, 0);
        return;
    }
    pthread_t others[MOST_THREADS];
    while (started < most - 1 && started < MOST_THREADS &&
           !pthread_create(others + started, 0, work_as_thread, &work)) started++;
    work_on(&work);
    for (int64_t i = 0; i < started; i++) pthread_join(others[i], 0);
}
