// Take one block of tokens into SubGen's clusters and sampled pairs: what `Clusters.join` and `Reservoir.offer` of
// clusters.py define in torch, bit by bit. Every number that enters the state comes from additions, multiplications,
// divisions and square roots in the order of torch's definition, none of them fused (-ffp-contract=off). The products
// that search for the nearest centre may round as they like: they only rule out centres, by more than they err.
// Both functions allocate what they need before they write anything.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __FMA__
#include <immintrin.h>
#endif

enum { LANES = 8, KEYS = 16, CENTRES = 4, RINGS = 16, TERMS = 12, DONE = 0, NOT_HERE = 1, NO_MEMORY = 2 };

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float quarter __attribute__((vector_size(16)));
typedef int32_t marks __attribute__((vector_size(4 * LANES)));

struct joining {
    int64_t r, b, d, t, stride, cap;
    double delta;
    const int64_t *rows, *position, *lane;
    const float *k;
    float *centre;
    int64_t *count;
    float *sample;
    double *sample_key;
    uint8_t *overfull;
};

struct offering {
    int64_t r, b, d, dv, s;
    const int64_t *rows, *position, *lane;
    const float *k, *v;
    float *pair_k, *pair_v;
    double *key, *mu;
};

int64_t size_of_joining(void) { return sizeof(struct joining); }
int64_t size_of_offering(void) { return sizeof(struct offering); }

static uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
    return x ^ (x >> 31);
}

static double uniform(uint64_t key, uint64_t counter) {
    uint64_t bits = mix(mix(key + counter * 0x9E3779B97F4A7C15ull) ^ counter);
    return ((double)(bits >> 12) + 0.5) * 0x1p-52;
}

static double logarithm(double x) {
    int exponent;
    double fraction = frexp(x, &exponent);
    int small = fraction < sqrt(0.5);
    if (small) fraction = 2.0 * fraction;
    double s = (fraction - 1.0) / (fraction + 1.0), square = s * s, series = 1.0 / (2 * TERMS + 1);
    for (int k = TERMS - 1; k >= 0; k--) series = series * square + 1.0 / (2 * k + 1);
    return (double)(exponent - small) * 0.693147180559945309417 + 2.0 * s * series;
}

// `rowwise.total` of n numbers, which are overwritten: the second half is added to the first, again and again.
#define TOTAL(name, type)                                              \
    static type name(type *x, int64_t n) {                             \
        if (n < 1) return 0;                                           \
        int64_t half = 1;                                              \
        while (2 * half < n) half *= 2;                                \
        if (n > 1)                                                     \
            for (int64_t i = 0; i < n - half; i++) x[i] += x[half + i]; \
        while (half > 1) {                                             \
            half /= 2;                                                 \
            for (int64_t i = 0; i < half; i++) x[i] += x[half + i];    \
        }                                                              \
        return x[0];                                                   \
    }
TOTAL(total, double)
TOTAL(total_float, float)

static float distance(const float *x, const float *y, float *scratch, int64_t d) {
    for (int64_t i = 0; i < d; i++) {
        float apart = x[i] - y[i];
        scratch[i] = apart * apart;
    }
    return sqrtf(total_float(scratch, d));
}

static float rough_square(const float *x, int64_t d) {
    lanes sum = {0}, other = {0};
    int64_t i = 0;
    for (; i + 2 * LANES <= d; i += 2 * LANES) {
        lanes one = *(const lanes *)(x + i), two = *(const lanes *)(x + i + LANES);
        sum += one * one;
        other += two * two;
    }
    sum += other;
    quarter half[2];
    memcpy(half, &sum, sizeof sum);
    half[0] += half[1];
    float out = (half[0][0] + half[0][1]) + (half[0][2] + half[0][3]);
    for (; i < d; i++) out += x[i] * x[i];
    return out;
}

static inline lanes plus_product(lanes sum, float a, lanes b) {
#ifdef __FMA__
    return (lanes)_mm256_fmadd_ps(_mm256_set1_ps(a), (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}

static inline lanes smaller(lanes a, lanes b) {
    marks first = a < b;
    return (lanes)((first & (marks)a) | (~first & (marks)b));
}

// Write |centre|^2 - 2 centre.key for all centres and KEYS keys, and the least of them for each key. `sized` tells
// whether |centre|^2 is known; it is written to `size` otherwise, while the centre is at hand.
static void rough_distances(const float *centre, float *size, int sized, const float *turned, int64_t used, int64_t d,
                            float *rough, float *least) {
    lanes low = {INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY, INFINITY}, high = low;
    for (int64_t c = 0; c < used; c += CENTRES) {
        lanes sum[CENTRES][2] = {0};
        const float *at[CENTRES];
        for (int j = 0; j < CENTRES; j++) at[j] = centre + (c + j < used ? c + j : used - 1) * d;
        for (int64_t i = 0; i < d; i++) {
            lanes one = *(const lanes *)(turned + i * KEYS), two = *(const lanes *)(turned + i * KEYS + LANES);
            for (int j = 0; j < CENTRES; j++) {
                sum[j][0] = plus_product(sum[j][0], at[j][i], one);
                sum[j][1] = plus_product(sum[j][1], at[j][i], two);
            }
        }
        for (int j = 0; j < CENTRES && c + j < used; j++) {
            if (!sized) size[c + j] = rough_square(at[j], d);
            lanes one = size[c + j] - 2 * sum[j][0], two = size[c + j] - 2 * sum[j][1];
            *(lanes *)(rough + (c + j) * KEYS) = one;
            *(lanes *)(rough + (c + j) * KEYS + LANES) = two;
            low = smaller(one, low);
            high = smaller(two, high);
        }
    }
    *(lanes *)least = low;
    *(lanes *)(least + LANES) = high;
}

// Find the nearest of the centres from before this block: distance (inf without centres) and index of each key.
static int search(const struct joining *g, int64_t line, int64_t used, float *size, float *turned, float *rough,
                  float *scratch, float *apart, int64_t *joined) {
    const float *centre = g->centre + g->rows[line] * g->stride * g->d, *k = g->k + line * g->b * g->d;
    float largest = 0;
    for (int64_t first = 0; first < g->b; first += KEYS) {
        int64_t keys = g->b - first < KEYS ? g->b - first : KEYS;
        memset(turned, 0, sizeof(float) * KEYS * g->d);
        float least[KEYS], reach[KEYS];
        for (int64_t j = 0; j < KEYS; j++) reach[j] = -INFINITY;
        for (int64_t j = 0; j < keys; j++)
            for (int64_t i = 0; i < g->d; i++) turned[i * KEYS + j] = k[(first + j) * g->d + i];
        rough_distances(centre, size, first > 0, turned, used, g->d, rough, least);
        for (int64_t c = 0; c < used && first == 0; c++) {
            if (!(size[c] < 1e30f)) return NOT_HERE;
            largest = size[c] > largest ? size[c] : largest;
        }
        for (int64_t j = 0; j < keys; j++) {
            float norm = rough_square(k + (first + j) * g->d, g->d);
            if (!(norm < 1e30f)) return NOT_HERE;
            reach[j] = least[j] + 4 * 0x1p-23f * (float)(g->d + 4) * (norm + largest);
            apart[first + j] = INFINITY;
            joined[first + j] = 0;
        }
        lanes one = *(lanes *)reach, two = *(lanes *)(reach + LANES);
        for (int64_t c = 0; c < used; c++) {
            const float *here = rough + c * KEYS;
            marks near = (*(const lanes *)here <= one) | (*(const lanes *)(here + LANES) <= two);
            int64_t any[LANES / 2];
            memcpy(any, &near, sizeof near);
            if (!(any[0] | any[1] | any[2] | any[3])) continue;
            for (int64_t j = 0; j < keys; j++) {
                if (!(here[j] <= reach[j])) continue;
                float far = distance(k + (first + j) * g->d, centre + c * g->d, scratch, g->d);
                if (far < apart[first + j]) apart[first + j] = far, joined[first + j] = c;
            }
        }
    }
    return DONE;
}

static void take(const struct joining *g, int64_t line, int64_t used, float *apart, int64_t *joined, int64_t *fresh,
                 float *scratch) {
    int64_t row = g->rows[line], d = g->d, t = g->t, count = 0;
    float *centre = g->centre + row * g->stride * d, delta = (float)g->delta;
    const float *k = g->k + line * g->b * d;
    for (int64_t j = 0; j < g->b; j++) {  // the keys that become centres, by age
        if (!(apart[j] > delta) || used + count >= g->cap) continue;
        int covered = 0;
        for (int64_t u = 0; u < count && !covered; u++)
            covered = distance(k + fresh[u] * d, k + j * d, scratch, d) <= delta;
        if (covered) continue;
        memcpy(centre + (used + count) * d, k + j * d, sizeof(float) * d);
        fresh[count++] = j;
    }
    uint8_t beyond = 0;
    for (int64_t j = 0; j < g->b; j++) {
        float nearest = INFINITY;
        int64_t which = 0;
        for (int64_t u = 0; u < count && fresh[u] <= j; u++) {
            float far = distance(k + j * d, k + fresh[u] * d, scratch, d);
            if (far < nearest) nearest = far, which = u;
        }
        if (nearest < apart[j]) apart[j] = nearest, joined[j] = used + which;
        beyond |= apart[j] > delta;
        int64_t place = row * g->stride + joined[j];
        g->count[place]++;
        for (int64_t i = 0; i < t; i++) {
            uint64_t counter = (uint64_t)g->position[line * g->b + j] * (uint64_t)t + (uint64_t)i;
            double key = uniform((uint64_t)g->lane[line], counter);
            if (!(key < g->sample_key[place * t + i])) continue;
            g->sample_key[place * t + i] = key;
            memcpy(g->sample + (place * t + i) * d, k + j * d, sizeof(float) * d);
        }
    }
    g->overfull[row] |= beyond;
}

int64_t join(const struct joining *g) {
    int64_t r = g->r, b = g->b, d = g->d, c = g->stride;
    float *apart = malloc(sizeof(float) * (size_t)(r * b + c + KEYS * d + (c + CENTRES) * KEYS + d + 1));
    int64_t *joined = malloc(sizeof(int64_t) * (size_t)(r * b + r + b + 1));
    int status = apart && joined ? DONE : NO_MEMORY;
    if (status == DONE) {
        float *size = apart + r * b, *turned = size + c, *rough = turned + KEYS * d;
        float *scratch = rough + (c + CENTRES) * KEYS;
        int64_t *used = joined + r * b, *fresh = used + r;
        for (int64_t line = 0; line < r && status == DONE; line++) {
            used[line] = 0;
            while (used[line] < c && g->count[g->rows[line] * c + used[line]] > 0) used[line]++;
            status = search(g, line, used[line], size, turned, rough, scratch, apart + line * b, joined + line * b);
        }
        for (int64_t line = 0; line < r && status == DONE; line++)
            take(g, line, used[line], apart + line * b, joined + line * b, fresh, scratch);
    }
    free(apart);
    free(joined);
    return status;
}

static double largest(const double *x, int64_t n) {
    double most = x[0];
    for (int64_t i = 1; i < n; i++) most = x[i] > most ? x[i] : most;
    return most;
}

int64_t offer(const struct offering *g) {
    int64_t b = g->b, d = g->d, dv = g->dv, s = g->s;
    double *scratch = malloc(sizeof(double) * (size_t)(dv + b + 1));
    int64_t *token = malloc(sizeof(int64_t) * (size_t)s);
    if (!scratch || !token) {
        free(scratch);
        free(token);
        return NO_MEMORY;
    }
    double *norms = scratch + dv;
    for (int64_t line = 0; line < g->r; line++) {
        int64_t row = g->rows[line];
        double *best = g->key + row * s, top = largest(best, s);
        const float *k = g->k + line * b * d, *v = g->v + line * b * dv;
        for (int64_t slot = 0; slot < s; slot++) token[slot] = -1;
        for (int64_t j = 0; j < b; j++) {
            for (int64_t i = 0; i < dv; i++) scratch[i] = (double)v[j * dv + i] * (double)v[j * dv + i];
            double norm = norms[j] = total(scratch, dv);
            if (!(norm > 0)) continue;
            double rate = (double)s * norm;
            uint64_t key = (uint64_t)g->lane[line], draw = ((uint64_t)g->position[line * b + j] << 24) * 2;
            double at = 0;
            while (at < top) {  // later events win no slot
                double time = at, passed = 0;
                for (int ring = 0; ring < RINGS; ring++, draw += 2) {
                    passed += -logarithm(uniform(key, draw)) / rate;
                    at = time + passed;
                    if (!(at < top)) break;
                    int64_t slot = (int64_t)(uniform(key, draw + 1) * (double)s);
                    if (!(at < best[slot])) continue;
                    int was_top = best[slot] == top;
                    best[slot] = at;
                    token[slot] = j;
                    if (was_top) top = largest(best, s);
                }
            }
        }
        for (int64_t slot = 0; slot < s; slot++) {
            if (token[slot] < 0) continue;
            memcpy(g->pair_k + (row * s + slot) * d, k + token[slot] * d, sizeof(float) * d);
            memcpy(g->pair_v + (row * s + slot) * dv, v + token[slot] * dv, sizeof(float) * dv);
        }
        g->mu[row] += total(norms, b);
    }
    free(scratch);
    free(token);
    return DONE;
}
