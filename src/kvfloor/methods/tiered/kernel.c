/* Compute certified attention over packed codes, read in place.

   kernel.py says when it is used, `certify.glimpse` defines what it computes, and docs/certificates.md has the bounds
   and what the order of this file's sums allows for rounding.

   A row is one (batch item, kv head) stream, a slot the place of one held token, a page `group` tokens of a row that
   are coded together, a channel one entry of a key or value. The kernel goes through a row's coded slots twice: for all
   logits, and for the values of the tokens whose weights count. Heavy tokens, those of large weight, are bounded one by
   one, all others together. Vectors have eight numbers; arithmetic on them is that of GCC's and Clang's vector types,
   with instructions named where the processor for which this is compiled has AVX2. */

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

enum {
    LANES = 8,
    BLOCK = 32,  /* tokens whose values are decoded at a time */
    CHUNK = 256, /* tokens that are summed in float32, before they are added to a sum in float64 */
    HEAVY = 64,  /* most tokens that are bounded one by one, for each query */
    ROWS = 6,    /* most sums of values that are made at once */
    DEEPEST = 6, /* how often a query's heavy tokens are found anew, once all that there were are fetched */
};

static const double MIDDLE = 127.5; /* of a value's codes: it stands for 0 */
static const float HIDDEN = -1e30f; /* stands for the logit of a token that is not seen */
static const double LEAST = -80.0;  /* least exponent of a weight relative to the largest one: smaller weights are 0 */
static const double DOUBT = 30.0;   /* bound on a logit's error from which on nothing is bounded */
static const double UNIT = 0x1p-23; /* the allowance for one rounding in float32, twice the largest relative error */
#define TERMS (UNIT * (CHUNK + 64)) /* for a sum of CHUNK terms in float32, and for its factors */

typedef float numbers __attribute__((vector_size(32)));
typedef int32_t integers __attribute__((vector_size(32)));
typedef uint32_t words __attribute__((vector_size(32)));
typedef numbers loose __attribute__((aligned(4), may_alias));
typedef uint16_t shorts __attribute__((vector_size(16), aligned(2), may_alias));
typedef uint8_t bytes __attribute__((vector_size(8), aligned(1), may_alias));
typedef int8_t signed_bytes __attribute__((vector_size(8), aligned(1), may_alias));

/* What `kernel.py` passes, in this order: numbers of 8 bytes, then addresses of arrays. */
struct given {
    int64_t rows, m, d, dv, first, group, ring, extra, fine_words, slots, groups, longest_row;
    double scale, softcap, gram_rounding, epsilon, share;
    const float *q;                           /* (rows, m, d) */
    const int64_t *offset, *count, *coded;    /* (rows): first slot, slots that are read, tokens before those uncoded */
    const uint8_t *hide;                      /* (rows, m, slots) bool, True for slots a query does not see; or NULL */
    const uint8_t *key_packed;                /* (places, d) */
    const uint32_t *key_fine;                 /* (places, fine_words) */
    const uint8_t *low, *high, *loud;         /* (rows, groups, d), and d / 2 for `loud`, or NULL */
    const float *span;                        /* (rows, groups, 4) */
    const uint8_t *value_packed;              /* (places, dv) */
    const uint16_t *value_widest, *radius;    /* (places) the bits of bfloat16 */
    const float *fresh_k, *fresh_v;           /* (rows, first + ring, d and dv) */
    const float *key_gram;                    /* (rows, d, d) */
    const float *excess, *reach, *longest, *operator_; /* (rows) */
    const double *turn;                       /* (dv, dv) the rotation of values */
    float *mean;                              /* (rows, m, dv) */
    float *log_mass, *error, *spread, *largest, *unread; /* (rows, m) */
    struct work **kept;                       /* (rows) what `refine` needs of the rows with an unsure query; or NULL */
};

int64_t size_of_given(void) { return sizeof(struct given); }

#ifdef TIMED /* for bench/certified_read.py */
#include <time.h>
double spent[3]; /* nanoseconds of this thread's processor, by part */
static void mark(int part) {
    static double before;
    struct timespec now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    double at = (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
    if (part >= 0) spent[part] += at - before;
    before = at;
}
#define MARK(part) mark(part)
#else
#define MARK(part) (void)0
#endif

/* ---- vectors ----------------------------------------------------------------------------------------------------- */

INLINE numbers load(const float *from) { return *(const loose *)from; }
INLINE void store(float *to, numbers x) { *(loose *)to = x; }
INLINE numbers every(float x) { return x - (numbers){}; }
INLINE numbers where(integers mask, numbers x) { return (numbers)((integers)x & mask); }
INLINE numbers choose(integers mask, numbers x, numbers y) {
    return (numbers)(((integers)x & mask) | ((integers)y & ~mask));
}
INLINE numbers larger(numbers x, numbers y) { return choose(x > y, x, y); }
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
    float most = x[0];
    for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
    return most;
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

void exponentials(const float *x, float *out, int64_t n) { /* for tests */
    for (int64_t t = 0; t + LANES <= n; t += LANES) store(out + t, exponential(load(x + t)));
}

/* ---- the first time: logits and weights -------------------------------------------------------------------------- */

/* A page's channels, and the queries with its ranges folded in. */
struct page {
    const uint8_t *loud;        /* (d / 2) the channels that have further bits */
    float *begin, *wide, *step; /* (d) start and width of each channel's range, and its step */
    float *coarse_step;         /* (d) what one of the 8 bits of a code counts */
    float *fine_step;           /* (d / 2) the steps of the channels in `loud` */
    float *coarse, *fine;       /* (m, d) and (m, d / 2): these steps, times the queries */
    float *start;               /* (m) the queries' products with the starts of the ranges */
};

/* Return from + codes * step, each operation rounded, for eight codes. */
INLINE numbers end_of(float from, const uint8_t *codes, float step) {
#ifdef __AVX2__
    numbers product = from_bytes(codes) * step;
    __asm__("" : "+x"(product)); /* so that it is rounded before it is added */
    return from + product;
#else
    numbers out;
    for (int i = 0; i < LANES; i++) out[i] = from + (float)((double)codes[i] * (double)step); /* an exact product */
    return out;
#endif
}

/* Write the ranges and steps of a page's channels, to the bit as `codes.ranges` and `LoudChannels` compute them. */
static void write_steps(const struct given *g, int64_t at, struct page *page) {
    const float *span = g->span + 4 * at;
    const uint8_t *low = g->low + at * g->d, *high = g->high + at * g->d;
    int64_t loud = g->extra ? g->d / 2 : 0;
    float most = (float)((256 << g->extra) - 1), times = (float)(1 << g->extra);
    page->loud = g->loud + at * loud;
    for (int64_t c = 0; c < g->d; c += LANES) {
        numbers begin = end_of(span[0], low + c, span[1]), wide = end_of(span[2], high + c, span[3]) - begin;
        wide = where(wide > 0, wide);
        store(page->begin + c, begin);
        store(page->wide + c, wide);
        store(page->step + c, wide / 255.0f);
        store(page->coarse_step + c, wide / 255.0f);
    }
    for (int64_t n = 0; n < loud; n++) page->fine_step[n] = page->wide[page->loud[n]];
    for (int64_t n = 0; n < loud; n += LANES) store(page->fine_step + n, load(page->fine_step + n) / most);
    for (int64_t n = 0; n < loud; n++) {
        page->step[page->loud[n]] = page->fine_step[n];
        page->coarse_step[page->loud[n]] = page->fine_step[n] * times;
    }
}

/* Fold a page's steps into query i, asked (d); return a bound on a logit's error from half a step of every channel. */
static double fold(const struct given *g, struct page *page, const float *asked, int64_t i) {
    float *coarse = page->coarse + i * g->d, *fine = page->fine + i * (g->d / 2);
    numbers start = {}, error = {};
    for (int64_t c = 0; c < g->d; c += LANES) {
        numbers query = load(asked + c);
        store(coarse + c, query * load(page->coarse_step + c));
        start += query * load(page->begin + c);
        error += absolute(query) * load(page->step + c);
    }
    for (int64_t n = 0; g->extra && n < g->d / 2; n++) fine[n] = asked[page->loud[n]] * page->fine_step[n];
    page->start[i] = sum(start);
    return sum(error) / 2;
}

/* Write the logits of four tokens and of m queries from `first` on to out[i stride + t], for a literal m of 1 to 3. */
INLINE void four_logits(const struct given *g, const struct page *page, int64_t place, const int m, int64_t first,
                        float *out, int64_t stride) {
    numbers totals[4][3] = {}, queries[3];
    const uint8_t *codes = g->key_packed + place * g->d;
    const float *coarse = page->coarse + first * g->d, *fine = page->fine + first * (g->d / 2);
    for (int64_t c = 0; c < g->d; c += LANES) {
        UNROLL for (int i = 0; i < m; i++) queries[i] = load(coarse + i * g->d + c);
        UNROLL for (int t = 0; t < 4; t++) {
            numbers code = from_bytes(codes + t * g->d + c);
            UNROLL for (int i = 0; i < m; i++) totals[t][i] += queries[i] * code;
        }
    }
    const uint32_t *further = g->key_fine + place * g->fine_words, each = (uint32_t)g->extra, mask = (1u << each) - 1;
    for (int64_t j = 0, n = 0; j < g->fine_words; j++) {
        words by = (words)lanes_from(0) * each;
        for (uint32_t bit = 0; bit < 32 / LANES; bit += each, n += LANES, by += LANES * each) {
            UNROLL for (int i = 0; i < m; i++) queries[i] = load(fine + i * (g->d / 2) + n);
            UNROLL for (int t = 0; t < 4; t++) {
                words code = ((further[t * g->fine_words + j] + (words){}) >> by) & mask;
                UNROLL for (int i = 0; i < m; i++) totals[t][i] += queries[i] * as_floats((integers)code);
            }
        }
    }
    UNROLL for (int i = 0; i < m; i++) {
        numbers found = sums_of_four(totals[0][i], totals[1][i], totals[2][i], totals[3][i]) + page->start[first + i];
        memcpy(out + (first + i) * stride, &found, 4 * sizeof *out);
    }
}

/* Write the logits of `many` tokens from slot `place` on, a multiple of 4, and all queries to out[i stride + t]. */
static void page_logits(const struct given *g, const struct page *page, int64_t place, int64_t many, float *out,
                        int64_t stride) {
    for (int64_t t = 0; t < many; t += 4)
        for (int64_t left = g->m, i = 0; left > 0; left = g->m - i) {
            if (left == 3 || left > 4) {
                four_logits(g, page, place + t, 3, i, out + t, stride);
                i += 3;
            } else if (left > 1) {
                four_logits(g, page, place + t, 2, i, out + t, stride);
                i += 2;
            } else {
                four_logits(g, page, place + t, 1, i, out + t, stride);
                i += 1;
            }
        }
    for (int64_t i = 0; g->softcap > 0 && i < g->m; i++)
        for (int64_t t = 0; t < many; t++) {
            double logit = out[i * stride + t];
            out[i * stride + t] = (float)(g->softcap * tanh(logit / g->softcap));
        }
}

/* Turn n logits into weights relative to `top`, n a multiple of LANES; add their sum and that of their squares. */
static void weigh(float *x, int64_t n, float top, double *mass, double *square) {
    for (int64_t start = 0; start < n; start += CHUNK) {
        numbers one = {}, two = {};
        for (int64_t t = start; t < n && t < start + CHUNK; t += LANES) {
            numbers weight = exponential(load(x + t) - top);
            store(x + t, weight);
            one += weight;
            two += weight * weight;
        }
        *mass += (double)sum(one);
        *square += (double)sum(two);
    }
}

/* Return how many of n weights are above the limit, and write the sum of the squares of the others. */
static int64_t heavier(const float *x, int64_t n, float limit, double *rest) {
    int64_t count = 0;
    *rest = 0;
    for (int64_t start = 0; start < n; start += CHUNK) {
        integers above = {};
        numbers square = {};
        for (int64_t t = start; t < n && t < start + CHUNK; t += LANES) {
            numbers weight = load(x + t);
            integers heavy = weight > limit;
            above -= heavy;
            square += where(~heavy, weight * weight);
        }
        for (int i = 0; i < LANES; i++) count += above[i];
        *rest += (double)sum(square);
    }
    return count;
}

/* Return a weight that at most HEAVY of n weights are above, and these stand out.

   square  the sum of all squares; becomes that of the squares of the weights that are not above */
static float limit_of(const float *x, int64_t n, double *square) {
    float limit = INFINITY, lower = (float)sqrt(*square / HEAVY);
    int64_t before = 0;
    for (int i = 0; i < 4; i++) {
        double rest;
        int64_t count = heavier(x, n, lower, &rest);
        if (count > HEAVY) break;
        limit = lower;
        *square = rest;
        if (count == before) break;
        before = count;
        lower = (float)sqrt(rest / HEAVY);
    }
    return limit;
}

/* Return a weight such that the weights up to it, of n, add up to about `most`, or to less.

   stride: from one to the next of the LANES weights that are looked at */
static float cut_of(const float *x, int64_t n, double most, int64_t stride) {
    if (!(most > 0) || !n) return 0.0f;
    double low = most / (double)n, high = most;
    for (int i = 0; i < 7; i++) {
        float middle = (float)sqrt(low * high);
        numbers below = {};
        for (int64_t t = 0; t < n; t += stride) {
            numbers weight = load(x + t);
            below += where(weight <= middle, weight);
        }
        if ((double)sum(below) * (double)(stride / LANES) <= most) low = middle;
        else high = middle;
    }
    return (float)low;
}

/* ---- the second time: values ------------------------------------------------------------------------------------- */

/* What a block of tokens adds to the sums over values, and the sums, for all queries. */
struct sums {
    int64_t place[BLOCK];
    int32_t token[BLOCK];
    int8_t *codes;                     /* (BLOCK, dv) the values' codes less 128, half a step below what they stand for */
    float step[BLOCK], radius[BLOCK], size[BLOCK];
    float *weight;                     /* (2 m, BLOCK) weights times steps; light ones' squares, times steps */
    float *part;                       /* (2 m, dv) sums of at most CHUNK tokens */
    double *total;                     /* (2 m, dv) */
    double (*of)[8];                   /* (m) what `add_block` says */
    int64_t (*heavy)[HEAVY], *heavies; /* (m) the heavy tokens, and how many there are: above HEAVY, not all are here */
};

/* Return the step of the value in a slot, as `SteppedTokens` computes it. */
INLINE float step_of(const struct given *g, int64_t place) { return from_short(g->value_widest[place]) * (2.0f / 255); }

/* Return eight sums of the squared numbers that a value's codes stand for, of half steps: exact.

   less_128 (dv): is filled with the codes less 128 */
INLINE integers square_of(const struct given *g, const uint8_t *codes, int8_t *less_128) {
    integers total = {};
    for (int64_t c = 0; c < g->dv; c += 2 * LANES) {
#ifdef __AVX2__
        __m128i code = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(codes + c)), _mm_set1_epi8(-128));
        __m256i wide = _mm256_cvtepi8_epi16(code);
        __m256i half_steps = _mm256_add_epi16(_mm256_add_epi16(wide, wide), _mm256_set1_epi16(1));
        _mm_storeu_si128((__m128i *)(less_128 + c), code);
        total += (integers)_mm256_madd_epi16(half_steps, half_steps);
#else
        for (int i = 0; i < 2 * LANES; i++) {
            less_128[c + i] = (int8_t)(codes[c + i] ^ 128);
            total[i / 2] += (2 * less_128[c + i] + 1) * (2 * less_128[c + i] + 1);
        }
#endif
    }
    return total;
}

/* Return the norm of the value in a slot; scratch: (dv). */
static float norm_of(const struct given *g, int64_t place, int8_t *scratch) {
    return step_of(g, place) / 2 * sqrtf(sum(as_floats(square_of(g, g->value_packed + place * g->dv, scratch))));
}

/* Add the values of a block, weighted by `rows` rows from `first` on, to `part`, for a literal number of rows. */
INLINE void add_rows(const struct given *g, struct sums *s, int64_t first, const int rows) {
    for (int64_t c = 0; c < g->dv; c += 2 * LANES) {
        numbers totals[ROWS][2];
        float *part = s->part + first * g->dv + c;
        const float *weight = s->weight + first * BLOCK;
        UNROLL for (int i = 0; i < rows; i++) {
            totals[i][0] = load(part + i * g->dv);
            totals[i][1] = load(part + i * g->dv + LANES);
        }
        for (int t = 0; t < BLOCK; t++) {
            numbers one = from_signed(s->codes + t * g->dv + c), two = from_signed(s->codes + t * g->dv + c + LANES);
            UNROLL for (int i = 0; i < rows; i++) {
                totals[i][0] += one * weight[i * BLOCK + t];
                totals[i][1] += two * weight[i * BLOCK + t];
            }
        }
        UNROLL for (int i = 0; i < rows; i++) {
            store(part + i * g->dv, totals[i][0]);
            store(part + i * g->dv + LANES, totals[i][1]);
        }
    }
}

/* Add n numbers of `part` to `total`, and clear them. */
static void flush(struct sums *s, int64_t n) {
    for (int64_t i = 0; i < n; i++) s->total[i] += (double)s->part[i];
    memset(s->part, 0, (size_t)n * sizeof *s->part);
}

/* Add a block of `many` tokens to the sums.

   x, stride   the weights x[i stride + token] of all queries
   cut, limit  (m) weights up to which a token is not read, and above which it is heavy
   grown       grown[i stride / BLOCK + token / BLOCK]: at least exp of the bound on the logit's error

   of[i] has sums over the tokens that are read: of weights, of weights times sizes, of grown weights times radii; over
   those that are not heavy: of squared weights times squared sizes, of squared weights, of squared grown weights; and
   of what `weight` holds of this query, of all and of the light ones */
static void add_block(const struct given *g, struct sums *s, int64_t many, const float *x, int64_t stride,
                      const float *cut, const float *limit, const float *grown) {
    for (int64_t t = many; t < BLOCK; t++) s->place[t] = s->place[0], s->token[t] = s->token[0]; /* with weight 0 */
    for (int64_t start = 0; start < BLOCK; start += 4) {
        numbers square[4];
        UNROLL for (int64_t t = 0; t < 4; t++) {
            int64_t place = s->place[start + t];
            s->step[start + t] = step_of(g, place);
            s->radius[start + t] = from_short(g->radius[place]);
            square[t] = as_floats(square_of(g, g->value_packed + place * g->dv, s->codes + (start + t) * g->dv));
        }
        numbers size = sums_of_four(square[0], square[1], square[2], square[3]);
        memcpy(s->size + start, &size, 4 * sizeof *s->size);
    }
    for (int64_t t = 0; t < BLOCK; t++) s->size[t] = s->step[t] / 2 * sqrtf(s->size[t]);
    for (int64_t i = 0; i < g->m; i++) {
        float copied[BLOCK], growth[BLOCK];
        const float *weight = x + i * stride + s->token[0];
        if (many < BLOCK || s->token[BLOCK - 1] - s->token[0] >= BLOCK) {
            for (int64_t t = 0; t < BLOCK; t++) copied[t] = t < many ? x[i * stride + s->token[t]] : 0.0f;
            weight = copied;
        }
        for (int64_t t = 0; t < BLOCK; t++) growth[t] = grown[i * (stride / BLOCK) + s->token[t] / BLOCK];
        numbers mass = {}, sizes = {}, radii = {}, far = {}, light = {}, wide = {}, steps = {}, light_steps = {};
        for (int64_t t = 0; t < BLOCK; t += LANES) {
            numbers one = load(weight + t), step = load(s->step + t), size = load(s->size + t);
            one = where(one > cut[i], one);
            integers heavy = one > limit[i];
            numbers more = one * load(growth + t), two = where(~heavy, one * one);
            store(s->weight + i * BLOCK + t, one * step);
            store(s->weight + (g->m + i) * BLOCK + t, two * step);
            steps += one * step;
            light_steps += two * step;
            mass += one;
            sizes += one * size;
            radii += more * load(s->radius + t);
            far += two * (size * size);
            light += two;
            wide += where(~heavy, more * more);
            for (unsigned bits = marked(heavy); bits; bits &= bits - 1) {
                if (s->heavies[i] < HEAVY) s->heavy[i][s->heavies[i]] = s->token[t + __builtin_ctz(bits)];
                s->heavies[i]++;
            }
        }
        numbers one = sums_of_four(mass, sizes, radii, far), two = sums_of_four(light, wide, steps, light_steps);
        for (int n = 0; n < 4; n++) s->of[i][n] += (double)one[n], s->of[i][4 + n] += (double)two[n];
    }
    for (int64_t left = 2 * g->m; left > 0;) {
        int64_t i = 2 * g->m - left;
        if (left >= 6) add_rows(g, s, i, 6), left -= 6;
        else if (left == 4) add_rows(g, s, i, 4), left -= 4;
        else add_rows(g, s, i, 2), left -= 2;
    }
}

/* Add the values of all tokens whose weight is above its query's cut; write the mass of others, grown, to left (m).

   place  the slot of token 0; list: room for n indices. Returns how many tokens were read. */
static int64_t add_values(const struct given *g, struct sums *s, int64_t place, int64_t n, const float *x,
                          const float *cut, const float *limit, const float *grown, int32_t *list, double *left) {
    int64_t found = 0, sums = 2 * g->m * g->dv;
    memset(s->part, 0, (size_t)sums * sizeof *s->part);
    memset(s->total, 0, (size_t)sums * sizeof *s->total);
    memset(s->of, 0, (size_t)g->m * sizeof *s->of);
    memset(s->heavies, 0, (size_t)g->m * sizeof *s->heavies);
    memset(left, 0, (size_t)g->m * sizeof *left);
    for (int64_t start = 0; start < n; start += BLOCK) {
        unsigned read = 0;
        for (int64_t i = 0; i < g->m; i++) {
            numbers below = {};
            for (int64_t t = 0; t < BLOCK; t += LANES) {
                numbers weight = load(x + i * n + start + t);
                integers kept = weight > cut[i];
                below += where(~kept, weight);
                read |= marked(kept) << t;
            }
            left[i] += (double)grown[(i * n + start) / BLOCK] * (double)sum(below);
        }
        if (read == 0xffffffffu)
            for (int t = 0; t < BLOCK; t++) list[found + t] = (int32_t)start + t;
        else
            for (unsigned bits = read, at = 0; bits; bits &= bits - 1)
                list[found + at++] = (int32_t)start + __builtin_ctz(bits);
        found += __builtin_popcount(read);
    }
    for (int64_t start = 0; start < found; start += BLOCK) {
        int64_t many = found - start < BLOCK ? found - start : BLOCK;
        for (int64_t t = 0; t < many; t++) {
            s->token[t] = list[start + t];
            s->place[t] = place + list[start + t];
            if (start + BLOCK + t < found)
                for (int64_t c = 0; c < g->dv; c += 64)
                    __builtin_prefetch(g->value_packed + (place + list[start + BLOCK + t]) * g->dv + c);
        }
        add_block(g, s, many, x, n, cut, limit, grown);
        if (start % CHUNK == CHUNK - BLOCK) flush(s, sums);
    }
    flush(s, sums);
    return found;
}

/* Return whether query i of row r sees the token in slot t. */
INLINE int sees(const struct given *g, int64_t r, int64_t i, int64_t t) {
    return !g->hide || !g->hide[(r * g->m + i) * g->slots + t];
}

/* What a query's bound takes from its row. */
struct known {
    double largest, widest; /* at most the largest norm of a value that the query sees; at least that of all values */
    double typical, radius; /* a guess of the values' mean norm; the mean radius */
    double fresh_rounding;  /* of logits of uncoded tokens */
    int wild;               /* true if nothing is bounded */
};

/* Write what is known of the coded values that query i sees.

   Where tokens are hidden, a value's norm is computed only if its widest entry says that it may be longer than those
   before it; scratch: (dv). */
static void read_lengths(const struct given *g, int64_t r, int64_t i, struct known *known, int8_t *scratch) {
    const float shrink = (float)(1 - UNIT * (4 * (double)g->dv + 64)), root = (float)sqrt((double)g->dv);
    int64_t place = g->offset[r], n = g->coded[r];
    float least = g->coded[r] > g->first && !g->hide ? g->longest[r] * shrink : 0.0f;
    numbers radii = {}, widest = {};
    for (int64_t start = 0; start < n; start += LANES) {
        radii += from_shorts(g->radius + place + start);
        widest += from_shorts(g->value_widest + place + start);
    }
    for (int64_t t = g->first; g->hide && t < n; t++) {
        float radius = from_short(g->radius[place + t]), widest = from_short(g->value_widest[place + t]);
        if (!sees(g, r, i, t) || !(widest * root - radius > least)) continue;
        float length = norm_of(g, place + t, scratch) * shrink - radius;
        least = length > least ? length : least;
    }
    known->largest = least;
    known->widest = (double)g->longest[r] * (1 + UNIT * (4 * (double)g->dv + 64));
    known->typical = (double)sum(widest) / (double)(n ? n : 1) * root / 2.5; /* as if entries were normal */
    known->radius = (double)sum(radii) / (double)(n ? n : 1);
}

/* ---- tokens without codes ---------------------------------------------------------------------------------------- */

/* A row's uncoded tokens, at most `room` of them. */
struct fresh {
    int64_t count, room;
    int64_t *position, *slot; /* (room) */
    double *size;             /* (room) norms of the values */
    float *logits;            /* (m, room) */
};

/* Return the logit of a key as it was given, for a query asked, both (d). */
static double plain_logit(const struct given *g, const float *asked, const float *key) {
    numbers total = {};
    for (int64_t c = 0; c < g->d; c += LANES) total += load(asked + c) * load(key + c);
    double logit = sum(total);
    return g->softcap > 0 ? g->softcap * tanh(logit / g->softcap) : logit;
}

/* Return the part of a logit's allowance for rounding that does not grow with its key. */
static double fixed_rounding(const struct given *g) { return UNIT * (16 - LEAST + 8 * g->softcap); }

/* Return the allowance for a logit of a key as it was given; size: the product of the query's and the key's norms. */
static double plain_rounding(const struct given *g, double size) {
    return UNIT * ((double)g->d / 2 + 2) * size + fixed_rounding(g);
}

/* Note that a query sees a value of this norm, which was given. */
static void note_length(const struct given *g, struct known *known, double size) {
    double rounding = UNIT * ((double)g->dv + 4);
    known->largest = most_of(known->largest, size * (1 - rounding));
    known->widest = most_of(known->widest, size * (1 + rounding));
}

/* Write a row's uncoded tokens, and the logits of the queries asked (m, d); return the largest norm of their keys. */
static double read_fresh(const struct given *g, int64_t r, const float *asked, struct fresh *fresh) {
    int64_t every_slot = g->first + g->ring;
    float widest = 0;
    fresh->count = 0;
    for (int64_t p = 0; p < g->count[r]; p++) {
        if (p == g->first && p < g->coded[r]) p = g->coded[r];
        if (p >= g->count[r]) break;
        fresh->position[fresh->count] = p;
        fresh->slot[fresh->count++] = p < g->first ? p : g->first + p % g->ring;
    }
    for (int64_t f = 0; f < fresh->count; f++) {
        const float *key = g->fresh_k + (r * every_slot + fresh->slot[f]) * g->d;
        const float *value = g->fresh_v + (r * every_slot + fresh->slot[f]) * g->dv;
        numbers size = {}, square = {};
        for (int64_t c = 0; c < g->dv; c += LANES) size += load(value + c) * load(value + c);
        for (int64_t c = 0; c < g->d; c += LANES) square += load(key + c) * load(key + c);
        fresh->size[f] = sqrt((double)sum(size));
        float long_square = sum(square);
        widest = !(long_square <= widest) ? long_square : widest;
        for (int64_t i = 0; i < g->m; i++) {
            float logit = (float)plain_logit(g, asked + i * g->d, key);
            fresh->logits[i * fresh->room + f] = sees(g, r, i, fresh->position[f]) ? logit : HIDDEN;
        }
    }
    for (int64_t i = 0; i < g->m; i++)
        for (int64_t f = fresh->count; f < fresh->room; f++) fresh->logits[i * fresh->room + f] = HIDDEN;
    return sqrt((double)widest) * (1 + 1e-4);
}

/* ---- the bound --------------------------------------------------------------------------------------------------- */

/* Return a bound on the root of the sum of squared errors of logits, from the sums of the keys' residuals.

   asked (d): a query times the scale; scratch: (d) */
static double gram_bound(const struct given *g, int64_t r, const double *asked, double *scratch) {
    const float *gram = g->key_gram + r * g->d * g->d;
    double square = 0, trace = 0, norm = 0;
    memset(scratch, 0, (size_t)g->d * sizeof *scratch);
    for (int64_t c = 0; c < g->d; c++)
        for (int64_t e = 0; e < g->d; e++) scratch[e] += asked[c] * (double)gram[c * g->d + e];
    for (int64_t c = 0; c < g->d; c++) {
        square += scratch[c] * asked[c];
        norm += asked[c] * asked[c];
        trace += (double)gram[c * g->d + c];
    }
    square = square < 0 ? 0 : square; /* NaN stays */
    return sqrt(square + g->gram_rounding * norm * trace) * (1 + 1e-6);
}

/* A heavy token of a query: what it adds to the bounds on the answer's error, and on that of the mass. */
struct heavy {
    int64_t token;
    double each, own, spread_each, spread_own; /* as `deviation` takes them */
};

/* Return the least bound on a sum of a_i |exp(eta_i) - 1| over `count` heavy tokens and others.

   each    (count) a_i (exp(B_i) - 1) of the heavy tokens; own: (count) a_i^2; rest: the sum of the others' a_i^2
   stride  from one of `each`, or of `own`, to the next
   factor  what the root of a sum of a_i^2 is multiplied with for the Gram bound
   Token by token, from the first on, the heavy ones are bounded by themselves, and the rest by the Gram bound. */
static double deviation(const double *each, const double *own, int64_t stride, int64_t count, double rest,
                        double factor) {
    double after[HEAVY + 1], first = 0;
    after[count] = rest;
    for (int64_t n = count; n-- > 0;) after[n] = after[n + 1] + own[n * stride];
    double least = factor * sqrt(after[0]);
    for (int64_t n = 0; n < count; n++) {
        first += each[n * stride];
        double found = first + factor * sqrt(after[n + 1]);
        least = found < least ? found : least;
    }
    return least;
}

/* Write the product of the matrix turn (w, w), or of its transpose, and a vector to out. */
static void turned(const double *turn, const double *vector, double *out, int64_t w, int back) {
    memset(out, 0, (size_t)w * sizeof *out);
    for (int64_t a = 0; a < w; a++)
        for (int64_t b = 0; b < w; b++) {
            if (back) out[b] += turn[a * w + b] * vector[a];
            else out[a] += turn[a * w + b] * vector[b];
        }
}

/* Sums over a query's coded tokens before any of them was fetched: what float32 makes of sums is a share of these. */
struct before {
    double of[8], mass, lighter, left;
};

/* The tokens that were fetched for a query, together. */
struct fetched {
    double mass, size; /* their weights; these times the norms of their values */
    double *values;    /* (dv) the weighted sum of their values */
};

/* All that answering rows needs beside what is given. */
struct work {
    struct page page;
    struct sums sums;
    struct fresh fresh;
    float *x;                                       /* (m, coded tokens) logits, then weights */
    float *doubt, *grown;                           /* (m, pages) and (m, tokens / BLOCK) errors of logits; their exp */
    int32_t *list;                                  /* (coded tokens) */
    float *asked, *cut, *limit, *top;               /* (m, d), (m), (m), (m) */
    double *exact, *vector, *centre, *plain;        /* (m, d) the queries times the scale; (d), (dv), (dv) */
    double *left, *mass, *lighter, *gram, *rounding, *norm; /* (m) */
    double *rest, *whole;                           /* (m) an answer's error without unread values; the mass of all */
    struct known *known;                            /* (m) */
    struct before *before;                          /* (m) */
    struct fetched *fetched;                        /* (m) */
    struct heavy (*worth)[HEAVY + 1];               /* (m) the heavy tokens, those of the largest `each` first */
    int64_t *needed, *tries, *deeper;               /* (m) how many of them to fetch; how often a cut was lowered, and
                                                       heavy tokens were found anew */
};

/* Return the largest error of answer `at`, of all rows' queries, that is within epsilon. */
static double allowed(const struct given *g, int64_t at) {
    return g->epsilon * (double)g->largest[at] * (1 - (double)g->spread[at]);
}

/* Answer query i of row r from the sums over its values. */
static void answer(const struct given *g, struct work *w, int64_t r, int64_t i, const struct known *known) {
    int64_t dv = g->dv, n = g->coded[r], pages = n / g->group, at = r * g->m + i, tokens = w->sums.heavies[i];
    float *mean = g->mean + at * dv;
    memset(mean, 0, (size_t)dv * sizeof *mean);
    g->log_mass[at] = g->error[at] = g->spread[at] = g->largest[at] = g->unread[at] = 0.0f;
    if (known->wild || tokens > HEAVY) { /* there never are more, by `limit_of`; none is left out if there are */
        g->error[at] = g->spread[at] = INFINITY;
        return;
    }
    if (w->top[i] <= HIDDEN) {
        g->log_mass[at] = -INFINITY;
        return;
    }
    /* the mean */
    const struct before *before = &w->before[i];
    const struct fetched *fetched = &w->fetched[i];
    const double *of = w->sums.of[i], *total = w->sums.total + i * dv, *light = w->sums.total + (g->m + i) * dv;
    double fresh_mass = fetched->mass, fresh_size = fetched->size, *centre = w->centre, *plain = w->plain;
    memcpy(plain, fetched->values, (size_t)dv * sizeof *plain);
    for (int64_t f = 0; f < w->fresh.count; f++) {
        double weight = w->fresh.logits[i * w->fresh.room + f];
        const float *value = g->fresh_v + (r * (g->first + g->ring) + w->fresh.slot[f]) * dv;
        fresh_mass += weight;
        fresh_size += weight * w->fresh.size[f];
        for (int64_t c = 0; weight > 0 && c < dv; c++) plain[c] += weight * (double)value[c];
    }
    double read_mass = of[0] + fresh_mass, whole_mass = w->mass[i] + fresh_mass, square = 0, near = 0;
    turned(g->turn, plain, centre, dv, 0);
    for (int64_t c = 0; c < dv; c++) {
        centre[c] = (total[c] + of[6] / 2 + centre[c]) / read_mass;
        square += centre[c] * centre[c];
        near += centre[c] * (light[c] + of[7] / 2);
    }
    turned(g->turn, centre, plain, dv, 1);
    for (int64_t c = 0; c < dv; c++) mean[c] = (float)plain[c];
    double length = sqrt(square), rounding = w->rounding[i], apart = known->fresh_rounding, widest = rounding;
    /* the heavy tokens, each by itself; those of the largest parts first */
    const float *doubt = w->doubt + i * pages, *x = w->x + i * n;
    double grown_square = of[5];
    struct heavy *worth = w->worth[i];
    for (int64_t h = 0; h < tokens; h++) {
        int64_t t = w->sums.heavy[i][h], k = h;
        const uint8_t *codes = g->value_packed + (g->offset[r] + t) * dv;
        double step = step_of(g, g->offset[r] + t), away = 0, size = 0, weight = x[t];
        for (int64_t c = 0; c < dv; c++) {
            double number = step * ((double)codes[c] - MIDDLE);
            away += (number - centre[c]) * (number - centre[c]);
            size += number * number;
        }
        away = weight * (sqrt(away) + 4 * UNIT * (sqrt(size) + length));
        double more = expm1(least_of(doubt[t / g->group], DOUBT));
        grown_square += weight * (1 + more) * weight * (1 + more);
        for (; k > 0 && worth[k - 1].each < away * more; k--) worth[k] = worth[k - 1];
        worth[k] = (struct heavy){t, away * more, away * away, weight * more, weight * weight};
    }
    /* all together */
    for (int64_t page = 0; page < pages; page++) widest = most_of(widest, doubt[page]);
    widest = least_of(most_of(widest, apart), DOUBT);
    double slope = expm1(widest) / most_of(widest, 1e-300), uncoded = expm1(least_of(apart, DOUBT));
    double root = sqrt(before->of[3]) + length * sqrt(before->of[4]), rest = of[3] - 2 * near + square * of[4];
    rest = (rest < 0 ? 0 : rest) + UNIT * ((double)dv / 2 + CHUNK + 144) * root * root;
    const int64_t stride = sizeof *worth / sizeof(double);
    double by_tokens = deviation(&worth->each, &worth->own, stride, tokens, rest, slope * w->gram[i]);
    double about = by_tokens + slope * rounding * (of[1] + length * of[0]) + uncoded * (fresh_size + length * fresh_mass);
    about += w->left[i] * (known->widest + length);
    double over = deviation(&worth->spread_each, &worth->spread_own, stride, tokens, w->lighter[i], slope * w->gram[i]);
    over += slope * rounding * w->mass[i] + uncoded * fresh_mass;
    double by_norm = sqrt(grown_square) * (double)g->operator_[r], by_radius = of[2];
    double lengths = (before->of[1] + before->of[2] + fresh_size) / read_mass, count = (double)g->count[r];
    double floor = count * exp(LEAST + widest), log_mass = (double)w->top[i] + log(whole_mass);
    double told = TERMS * (before->mass + fresh_mass) / whole_mass + 4 * UNIT * (fabs(log_mass) + 1);
    double slack = (1 + UNIT * (count / 64 + 4 * (double)dv + 256)) * (1 + told);
    double by_values = least_of(by_norm, by_radius), off = (about + by_values + floor * (known->widest + length)) / whole_mass;
    off = (off + 2 * TERMS * lengths * exp(widest)) * slack; /* 2: codes and half steps are summed apart */
    w->whole[i] = whole_mass;
    w->rest[i] = off - w->left[i] * (known->widest + length) / whole_mass * slack;
    double wide_off = ((over + floor) / whole_mass + told) * slack;
    double checked = off + wide_off + by_norm + by_radius + length + known->widest;
    if (widest >= DOUBT || !(checked < INFINITY)) off = wide_off = INFINITY;
    g->log_mass[at] = (float)log_mass;
    g->error[at] = (float)off, g->spread[at] = (float)wide_off;
    g->largest[at] = (float)(known->largest * (1 - UNIT));
    g->unread[at] = (float)(w->left[i] / whole_mass);
    double most = 0.8 * allowed(g, at);
    int64_t taken = w->needed[i] = 0;
    while (off > most && taken < tokens) { /* about what fetching the first ones makes of it, four more at a time */
        for (int64_t next = taken + 4 < tokens ? taken + 4 : tokens; taken < next; taken++) {
            double grown = sqrt(worth[taken].spread_own) + worth[taken].spread_each;
            grown_square -= grown * grown;
        }
        double fewer = deviation(&worth[taken].each, &worth[taken].own, stride, tokens - taken, rest, slope * w->gram[i]);
        fewer += least_of(sqrt(most_of(grown_square, 0)) * (double)g->operator_[r], by_radius);
        w->needed[i] = taken;
        if (off - (by_tokens + by_values - fewer) / whole_mass * slack <= most) break;
    }
}

/* Write what is known of all values that query i of row r sees. */
static void read_all_lengths(const struct given *g, struct work *w, int64_t r, int64_t i, struct known *known) {
    double fresh_rounding = known[i].fresh_rounding;
    int wild = known[i].wild;
    if (i > 0 && !g->hide) {
        known[i] = known[0];
        known[i].fresh_rounding = fresh_rounding, known[i].wild = wild;
        return;
    }
    read_lengths(g, r, i, &known[i], w->sums.codes);
    for (int64_t f = 0; f < w->fresh.count; f++) {
        if (!sees(g, r, i, w->fresh.position[f])) continue;
        note_length(g, &known[i], w->fresh.size[f]);
    }
}

/* Return about what the light tokens' codes make of query i's answer, relative to `largest`: no bound, but a guess.

   whole: the mass of all tokens. What the heavy tokens add is lessened by fetching them. */
static double likely(const struct given *g, const struct work *w, int64_t r, int64_t i, double whole) {
    const struct known *known = &w->known[i];
    double root = sqrt(w->lighter[i]), by_norm = root * (double)g->operator_[r], by_radius = w->mass[i] * known->radius;
    return (w->gram[i] * root * known->typical + least_of(by_norm, by_radius)) / (whole * most_of(known->largest, 1e-30));
}

/* Return whether the answer to query i of row r is within epsilon. */
static int sure(const struct given *g, int64_t r, int64_t i) {
    return (double)g->error[r * g->m + i] <= allowed(g, r * g->m + i);
}

/* Lower the cut of query i of row r if its answer is not within epsilon, but would be if more values were read.

   Return whether it was lowered: at first to what seems enough, then to 0. */
static int lowered(const struct given *g, struct work *w, int64_t r, int64_t i) {
    if (!(w->cut[i] > 0) || sure(g, r, i) || !(w->rest[i] <= allowed(g, r * g->m + i))) return 0;
    int64_t n = g->coded[r];
    double unread = (double)g->error[r * g->m + i] - w->rest[i], most = allowed(g, r * g->m + i) - w->rest[i];
    float cut = w->tries[i]++ ? 0.0f : cut_of(w->x + i * n, n, 0.8 * w->left[i] * most / unread, LANES);
    w->cut[i] = cut < w->cut[i] ? cut : 0.0f;
    return 1;
}

/* Sum over the values of all tokens above the queries' cuts. */
static void read_values(const struct given *g, struct work *w, int64_t r) {
    add_values(g, &w->sums, g->offset[r], g->coded[r], w->x, w->cut, w->limit, w->grown, w->list, w->left);
    for (int64_t i = 0; i < g->m; i++) {
        memcpy(w->before[i].of, w->sums.of[i], sizeof w->before[i].of);
        w->before[i].left = w->left[i];
    }
}

/* Answer the queries of row r. */
static void answer_row(const struct given *g, struct work *w, int64_t r) {
    int64_t m = g->m, d = g->d, n = g->coded[r], pages = n / g->group, place = g->offset[r];
    struct known *known = w->known;
    for (int64_t c = 0; c < m * d; c++) {
        w->exact[c] = (double)g->q[r * m * d + c] * g->scale;
        w->asked[c] = (float)w->exact[c];
    }
    double size = read_fresh(g, r, w->asked, &w->fresh), reach = g->reach[r];
    for (int64_t i = 0; i < m; i++) {
        w->fetched[i].mass = w->fetched[i].size = 0;
        w->needed[i] = w->tries[i] = w->deeper[i] = 0;
        memset(w->fetched[i].values, 0, (size_t)g->dv * sizeof(double));
    }
    for (int64_t i = 0; i < m; i++) {
        double square = 0;
        for (int64_t c = 0; c < d; c++) square += w->exact[i * d + c] * w->exact[i * d + c];
        double norm = w->norm[i] = sqrt(square);
        w->rounding[i] = UNIT * (14 + 0.3 * (double)d) * norm * reach + fixed_rounding(g);
        w->gram[i] = gram_bound(g, r, w->exact + i * d, w->vector);
        known[i].fresh_rounding = plain_rounding(g, norm * size);
        known[i].wild = !(norm * reach < 1e6 && norm * size < 1e6);
    }
    MARK(-1);
    for (int64_t page = 0; page < pages; page++) {
        write_steps(g, r * g->groups + page, &w->page);
        for (int64_t i = 0; i < m; i++) {
            double half = fold(g, &w->page, w->asked + i * d, i) + w->norm[i] * (double)g->excess[r];
            half = half * (1 + 4e-6) < w->gram[i] ? half * (1 + 4e-6) : w->gram[i];
            w->doubt[i * pages + page] = (float)((half + w->rounding[i]) * (1 + UNIT));
        }
        page_logits(g, &w->page, place + page * g->group, g->group, w->x + page * g->group, n);
    }
    MARK(0);
    for (int64_t i = 0; i < m; i++) {
        read_all_lengths(g, w, r, i, known);
        float *x = w->x + i * n, *fresh = w->fresh.logits + i * w->fresh.room, *grown = w->grown + i * n / BLOCK;
        double square = 0, fresh_mass = 0, ignored = 0;
        w->mass[i] = w->lighter[i] = 0;
        w->top[i] = HIDDEN, w->cut[i] = 0, w->limit[i] = INFINITY;
        if (known[i].wild) {
            memset(x, 0, (size_t)n * sizeof *x);
            continue;
        }
        for (int64_t t = 0; t < n; t++)
            if (t < g->first || (g->hide && !sees(g, r, i, t))) x[t] = HIDDEN;
            else if (!g->hide) break;
        numbers top = every(HIDDEN);
        for (int64_t t = 0; t < n; t += LANES) top = larger(load(x + t), top);
        for (int64_t f = 0; f < w->fresh.room; f += LANES) top = larger(load(fresh + f), top);
        w->top[i] = highest(top);
        for (int64_t t = 0; t < n; t += BLOCK) {
            float doubt = w->doubt[i * pages + t / g->group];
            grown[t / BLOCK] = (float)exp(doubt < DOUBT ? doubt : DOUBT) * (float)(1 + 2 * UNIT);
        }
        weigh(x, n, w->top[i], &w->mass[i], &square);
        weigh(fresh, w->fresh.room, w->top[i], &fresh_mass, &ignored);
        w->lighter[i] = square;
        w->limit[i] = limit_of(x, n, &w->lighter[i]);
        double whole = w->mass[i] + fresh_mass, most = g->epsilon - likely(g, w, r, i, whole);
        most = most > 0 ? most : g->epsilon / 4; /* tokens are fetched, and then so much may be left */
        float cut = cut_of(x, n, g->share * most * whole, n < 4096 ? LANES : 8 * LANES);
        w->cut[i] = cut < w->limit[i] ? cut : w->limit[i];
        w->before[i].mass = w->mass[i], w->before[i].lighter = w->lighter[i];
    }
    MARK(1);
    for (int again = 1; again;) {
        again = 0;
        read_values(g, w, r);
        for (int64_t i = 0; i < m; i++) {
            answer(g, w, r, i, &known[i]);
            again |= lowered(g, w, r, i);
        }
    }
    MARK(2);
}

/* ---- all rows ---------------------------------------------------------------------------------------------------- */

/* Set the arrays of `work` to parts of the memory from `at` on, unless it is NULL; return how many bytes all take. */
static size_t arranged(const struct given *g, struct work *w, char *at) {
    size_t taken = (sizeof *w + 63) / 64 * 64;
    int64_t m = g->m, d = g->d, dv = g->dv, n = g->longest_row;
    double *values = 0;
    w->fresh.room = (g->first + g->ring + LANES - 1) / LANES * LANES;
#define ROOM(array, count) \
    do { \
        if (at) array = (void *)(at + taken); \
        taken += ((size_t)(count) * sizeof *(array) + 63) / 64 * 64; \
    } while (0)
    ROOM(w->page.begin, d);
    ROOM(w->page.wide, d);
    ROOM(w->page.step, d);
    ROOM(w->page.coarse_step, d);
    ROOM(w->page.fine_step, d);
    ROOM(w->page.coarse, m * d);
    ROOM(w->page.fine, m * d);
    ROOM(w->page.start, m);
    ROOM(w->sums.codes, BLOCK * dv);
    ROOM(w->sums.weight, 2 * m * BLOCK);
    ROOM(w->sums.part, 2 * m * dv);
    ROOM(w->sums.total, 2 * m * dv);
    ROOM(w->sums.of, m);
    ROOM(w->sums.heavy, m);
    ROOM(w->sums.heavies, m);
    ROOM(w->fresh.position, w->fresh.room);
    ROOM(w->fresh.slot, w->fresh.room);
    ROOM(w->fresh.size, w->fresh.room);
    ROOM(w->fresh.logits, m * w->fresh.room);
    ROOM(w->x, m * n);
    ROOM(w->doubt, m * n / g->group);
    ROOM(w->grown, m * n / BLOCK);
    ROOM(w->list, n);
    ROOM(w->asked, m * d);
    ROOM(w->cut, m);
    ROOM(w->limit, m);
    ROOM(w->top, m);
    ROOM(w->exact, m * d);
    ROOM(w->vector, d);
    ROOM(w->centre, dv);
    ROOM(w->plain, dv);
    ROOM(w->left, m);
    ROOM(w->mass, m);
    ROOM(w->lighter, m);
    ROOM(w->gram, m);
    ROOM(w->rounding, m);
    ROOM(w->norm, m);
    ROOM(w->rest, m);
    ROOM(w->whole, m);
    ROOM(w->known, m);
    ROOM(w->before, m);
    ROOM(w->fetched, m);
    ROOM(w->worth, m);
    ROOM(w->needed, m);
    ROOM(w->tries, m);
    ROOM(w->deeper, m);
    ROOM(values, m * dv);
    for (int64_t i = 0; at && i < m; i++) w->fetched[i].values = values + i * dv;
#undef ROOM
    return taken;
}

/* Return memory for answering a row; NULL if there is none. */
static struct work *opened(const struct given *g) {
    struct work layout = {0};
    char *memory = aligned_alloc(64, arranged(g, &layout, 0));
    if (!memory) return 0;
    struct work *w = (struct work *)memory;
    memset(w, 0, sizeof *w);
    arranged(g, w, memory);
    return w;
}

/* Answer the queries of the rows begin .. stop - 1; return 0, or 1 if there is no memory. */
int certify(int64_t begin, int64_t stop, const struct given *g) {
    struct work *w = 0;
    for (int64_t r = begin; r < stop; r++) {
        if (!w) w = opened(g);
        if (!w) return 1;
        answer_row(g, w, r);
        for (int64_t i = 0; g->kept && w && i < g->m; i++)
            if (!sure(g, r, i)) g->kept[r] = w, w = 0;
    }
    free(w);
    return 0;
}

/* ---- fetching ---------------------------------------------------------------------------------------------------- */

/* Some queries of a row, those i with i % positions == position, and the tokens that are fetched for them. */
struct fetch {
    int64_t count, positions, room; /* how many such sets; positions of a row; most tokens of a set */
    const int64_t *row, *position;  /* (count) */
    int64_t *token, *found;         /* (count, room) and (count) */
    const float *k, *v;             /* (count, room, d and dv) the tokens as they were given */
};

/* Find the heavy tokens among those that are left, as all that there were are fetched; return whether there are any. */
static int deepened(const struct given *g, struct work *w, int64_t r, int64_t i) {
    if (w->sums.heavies[i] || sure(g, r, i) || w->known[i].wild || w->deeper[i] == DEEPEST) return 0;
    w->deeper[i]++;
    const float *x = w->x + i * g->coded[r];
    int64_t count = 0, n = g->coded[r];
    heavier(x, n, INFINITY, &w->lighter[i]);
    w->limit[i] = limit_of(x, n, &w->lighter[i]); /* if none stand out, the heaviest ones do as well */
    for (float lower = (float)sqrt(w->lighter[i] / HEAVY); lower > w->cut[i] && count < HEAVY / 2; lower /= 1.25f) {
        double rest;
        count = heavier(x, n, lower, &rest);
        if (count > HEAVY) break;
        w->limit[i] = lower, w->lighter[i] = rest;
    }
    w->before[i].lighter = w->lighter[i];
    w->cut[i] = w->cut[i] < w->limit[i] ? w->cut[i] : w->limit[i];
    return w->limit[i] < INFINITY;
}

/* Write the heavy tokens that widen the bounds of unsure queries most, about as many as are enough. */
void want(const struct given *g, const struct fetch *fetch) {
    for (int64_t a = 0; a < fetch->count; a++) {
        struct work *w = g->kept[fetch->row[a]];
        for (int changed = 1; changed;) {
            int64_t again[8], many = 0;
            for (int64_t i = fetch->position[a]; i < g->m; i += fetch->positions)
                if (lowered(g, w, fetch->row[a], i) || deepened(g, w, fetch->row[a], i)) again[many++] = i;
            if (many) read_values(g, w, fetch->row[a]);
            for (int64_t n = 0; n < many; n++) answer(g, w, fetch->row[a], again[n], &w->known[again[n]]);
            changed = many > 0;
        }
        int64_t *token = fetch->token + a * fetch->room, found = 0, at[8] = {0};
        while (found < fetch->room) {
            int64_t best = -1;
            double most = 0;
            for (int64_t i = fetch->position[a]; i < g->m; i += fetch->positions) {
                if (sure(g, fetch->row[a], i) || w->known[i].wild || at[i] >= w->needed[i]) continue;
                double worth = w->worth[i][at[i]].each / w->whole[i];
                if (best < 0 || worth > most) best = i, most = worth;
            }
            if (best < 0) break;
            int64_t t = w->worth[best][at[best]++].token, n = 0;
            while (n < found && token[n] != t) n++;
            if (n == found) token[found++] = t;
        }
        fetch->found[a] = found;
    }
}

/* Take a coded token out of all sums of query i of row r. */
static void leave_out(const struct given *g, struct work *w, int64_t r, int64_t i, int64_t t) {
    int64_t n = g->coded[r], place = g->offset[r] + t, dv = g->dv, kept = 0;
    struct sums *s = &w->sums;
    const uint8_t *codes = g->value_packed + place * dv;
    double weight = w->x[i * n + t], more = weight * (double)w->grown[(i * n + t) / BLOCK], step = step_of(g, place);
    double size = norm_of(g, place, s->codes), two = w->x[i * n + t] > w->limit[i] ? 0 : weight * weight;
    double *of = s->of[i], *total = s->total + i * dv, *light = s->total + (g->m + i) * dv;
    w->mass[i] -= weight, w->lighter[i] -= two;
    if (w->x[i * n + t] > w->cut[i]) {
        of[0] -= weight, of[1] -= weight * size, of[2] -= more * (double)from_short(g->radius[place]);
        of[3] -= two * size * size, of[4] -= two, of[5] -= two > 0 ? more * more : 0;
        of[6] -= weight * step, of[7] -= two * step;
        for (int64_t c = 0; c < dv; c++) {
            double steps = step * ((double)codes[c] - 128);
            total[c] -= weight * steps, light[c] -= two * steps;
        }
    } else w->left[i] -= more;
    for (int64_t h = 0; h < s->heavies[i]; h++)
        if (s->heavy[i][h] != t) s->heavy[i][kept++] = s->heavy[i][h];
    s->heavies[i] = kept;
    w->x[i * n + t] = 0;
}

/* Add a token as it was given, key (d) and value (dv), to what is fetched for query i. */
static void take_in(const struct given *g, struct work *w, int64_t i, const float *key, const float *value) {
    struct known *known = &w->known[i];
    struct fetched *fetched = &w->fetched[i];
    double key_square = 0, square = 0;
    for (int64_t c = 0; c < g->d; c++) key_square += (double)key[c] * (double)key[c];
    double norm = w->norm[i] * sqrt(key_square);
    double weight = exp(plain_logit(g, w->asked + i * g->d, key) - (double)w->top[i]);
    for (int64_t c = 0; c < g->dv; c++) {
        square += (double)value[c] * (double)value[c];
        fetched->values[c] += weight * (double)value[c];
    }
    double size = sqrt(square);
    fetched->mass += weight, fetched->size += weight * size;
    known->fresh_rounding = most_of(known->fresh_rounding, plain_rounding(g, norm));
    note_length(g, known, size);
    known->wild |= !(norm < 1e6);
}

/* Allow a query's sums over coded tokens what float32 made of them before any token was left out. */
static void widen(struct work *w, int64_t i) {
    const struct before *before = &w->before[i];
    for (int n = 1; n < 6; n++) w->sums.of[i][n] += 2 * TERMS * before->of[n];
    w->lighter[i] += 2 * TERMS * before->lighter;
    w->left[i] += 2 * TERMS * before->left;
}

/* Answer the unsure queries again, with the tokens of `fetch` read as they were given. */
void refine(const struct given *g, const struct fetch *fetch) {
    for (int64_t a = 0; a < fetch->count; a++) {
        int64_t r = fetch->row[a];
        struct work *w = g->kept[r];
        for (int64_t i = fetch->position[a]; i < g->m; i += fetch->positions) {
            if (sure(g, r, i) || w->known[i].wild || w->top[i] <= HIDDEN) continue;
            if (!(w->fetched[i].mass > 0)) widen(w, i);
            for (int64_t f = 0; f < fetch->found[a]; f++) {
                int64_t at = a * fetch->room + f;
                if (!sees(g, r, i, fetch->token[at])) continue;
                leave_out(g, w, r, i, fetch->token[at]);
                take_in(g, w, i, fetch->k + at * g->d, fetch->v + at * g->dv);
            }
            answer(g, w, r, i, &w->known[i]);
        }
    }
}

/* Free what `certify` kept. */
void release(const struct given *g) {
    for (int64_t r = 0; r < g->rows; r++) free(g->kept[r]), g->kept[r] = 0;
}
