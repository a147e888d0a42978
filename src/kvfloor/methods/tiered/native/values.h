/* Sum over coded values.

   Tokens of large weight are added one way, with the norms of their values, and those of small weight another way,
   which takes half of the time. */

#pragma once

#include "given.h"

/* What a block of tokens adds to the sums over values, and the sums, for all queries. */
struct sums {
    int64_t place[BLOCK];
    int32_t token[BLOCK];
    int8_t *codes;                     /* (BLOCK, dv) the values' codes less 128: half a step below the values */
    float step[BLOCK], radius[BLOCK], size[BLOCK];
    float *weight;                     /* (2 m, BLOCK) weights times steps; light ones' squares, times steps */
    float *part;                       /* (2 m, dv) sums of at most CHUNK tokens */
    double *total;                     /* (2 m, dv) */
    double (*of)[9];                   /* (m) what `add_block` says */
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

/* Add the values of a block, weighted by `rows` rows from `first` on, to `part`.

   rows, wide  literal numbers: how many rows, and of how many vectors of entries a sum is kept in registers */
INLINE void add_rows(const struct given *g, struct sums *s, int64_t first, const int rows, const int wide) {
    for (int64_t c = 0; c < g->dv; c += wide * LANES) {
        numbers totals[ROWS][4];
        float *part = s->part + first * g->dv + c;
        const float *weight = s->weight + first * BLOCK;
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int v = 0; v < wide; v++) totals[i][v] = load(part + i * g->dv + v * LANES);
        for (int t = 0; t < BLOCK; t++) {
            numbers value[4], one[ROWS]; /* whichever are fewer stay in registers beside the sums */
            if (rows > wide) {
                UNROLL for (int v = 0; v < wide; v++) value[v] = from_signed(s->codes + t * g->dv + c + v * LANES);
                UNROLL for (int i = 0; i < rows; i++)
                    UNROLL for (int v = 0; v < wide; v++) totals[i][v] += value[v] * weight[i * BLOCK + t];
                continue;
            }
            UNROLL for (int i = 0; i < rows; i++) one[i] = every(weight[i * BLOCK + t]);
            UNROLL for (int v = 0; v < wide; v++) {
                value[v] = from_signed(s->codes + t * g->dv + c + v * LANES);
                UNROLL for (int i = 0; i < rows; i++) totals[i][v] += value[v] * one[i];
            }
        }
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int v = 0; v < wide; v++) store(part + i * g->dv + v * LANES, totals[i][v]);
    }
}

/* Add the values of a block, weighted by `rows` rows, to `part`. */
static void add_all_rows(const struct given *g, struct sums *s, int64_t rows) {
    for (int64_t i = 0, left = rows; left > 0; left = rows - i) {
        if (left >= 6) add_rows(g, s, i, 6, 2), i += 6;
        else if (left == 4) add_rows(g, s, i, 4, 2), i += 4;
        else if (left >= 3) add_rows(g, s, i, 3, 4), i += 3;
        else if (left == 2) add_rows(g, s, i, 2, 4), i += 2;
        else add_rows(g, s, i, 1, 4), i += 1;
    }
}

/* Add n numbers of `part` to `total`, and clear them. */
static void flush(struct sums *s, int64_t n) {
    for (int64_t i = 0; i < n; i++) s->total[i] += (double)s->part[i];
    memset(s->part, 0, (size_t)n * sizeof *s->part);
}

/* Copy the codes of `many` values side by side, less 128. */
INLINE void copy_codes(const struct given *g, const uint8_t *codes, int8_t *less_128, int64_t many) {
    for (int64_t c = 0; c < many * g->dv; c += 4 * LANES) {
#ifdef __AVX2__
        __m256i code = _mm256_loadu_si256((const __m256i *)(codes + c));
        _mm256_storeu_si256((__m256i *)(less_128 + c), _mm256_xor_si256(code, _mm256_set1_epi8(-128)));
#else
        for (int i = 0; i < 4 * LANES; i++) less_128[c + i] = (int8_t)(codes[c + i] ^ 128);
#endif
    }
}

/* What sums over the values of a row's tokens are made from. */
struct weighted {
    int64_t place, n;          /* the slot of token 0; how many tokens */
    const float *x;            /* (m, n) weights */
    const float *cut, *limit;  /* (m) weights up to which a token is not read, and above which it is heavy */
    const float *small;        /* (m) weights up to which a token is of small weight, if that holds for all queries */
    const float *grown;        /* (m, n / BLOCK) at least exp of the bound on the logits' errors */
    double longest;            /* at least the norms of what all values are decoded to */
    int32_t *list;             /* room for 2 n indices */
    double *left;              /* (m) is filled with the mass of the tokens that are not read, grown */
};

/* Copy the codes of BLOCK tokens, and what else is known of their values.

   small, run  literal: whether their norms are not computed; whether they are side by side */
INLINE void copy_block(const struct given *g, struct sums *s, const int small, const int run) {
    int64_t first = s->place[0];
    for (int64_t t = 0; t < BLOCK; t += LANES) {
        if (run) {
            store(s->step + t, from_shorts(g->value_widest + first + t) * (2.0f / 255));
            store(s->radius + t, from_shorts(g->radius + first + t));
        }
        for (int64_t e = t; !run && e < t + LANES; e++) {
            s->step[e] = step_of(g, s->place[e]);
            s->radius[e] = from_short(g->radius[s->place[e]]);
        }
    }
    if (small && run) copy_codes(g, g->value_packed + first * g->dv, s->codes, BLOCK);
    for (int64_t t = 0; small && !run && t < BLOCK; t++)
        copy_codes(g, g->value_packed + s->place[t] * g->dv, s->codes + t * g->dv, 1);
    for (int64_t start = 0; !small && start < BLOCK; start += 4) {
        numbers square[4];
        UNROLL for (int64_t t = start; t < start + 4; t++)
            square[t - start] = as_floats(square_of(g, g->value_packed + s->place[t] * g->dv, s->codes + t * g->dv));
        numbers size = sums_of_four(square[0], square[1], square[2], square[3]);
        memcpy(s->size + start, &size, 4 * sizeof *s->size);
    }
    for (int64_t t = 0; !small && t < BLOCK; t++) s->size[t] = s->step[t] / 2 * sqrtf(s->size[t]);
}

/* Add BLOCK tokens of small weight to query i's sums, by their weights and those grown. */
INLINE void add_small(struct sums *s, int64_t i, const float *weight, const float *more, double longest) {
    numbers mass = {}, radii = {}, light = {}, wide = {}, steps = {}, none = {};
    for (int64_t t = 0; t < BLOCK; t += LANES) {
        numbers one = load(weight + t), grown = load(more + t), all = one * load(s->step + t);
        store(s->weight + i * BLOCK + t, all);
        steps += all;
        mass += one;
        radii += grown * load(s->radius + t);
        light += one * one;
        wide += grown * grown;
    }
    numbers one = sums_of_four(mass, radii, wide, steps), two = sums_of_four(light, none, none, none);
    double *of = s->of[i];
    of[0] += (double)one[0], of[1] += (double)one[0] * longest, of[2] += (double)one[1];
    of[5] += (double)one[2], of[6] += (double)one[3], of[8] += (double)two[0];
}

/* Add BLOCK tokens to query i's sums, by their weights and those grown. */
INLINE void add_large(const struct given *g, struct sums *s, int64_t i, const float *weight, const float *more,
                      float limit) {
    numbers mass = {}, sizes = {}, radii = {}, far = {}, light = {}, wide = {}, steps = {}, light_steps = {};
    for (int64_t t = 0; t < BLOCK; t += LANES) {
        numbers one = load(weight + t), grown = load(more + t), step = load(s->step + t), size = load(s->size + t);
        integers heavy = one > limit;
        numbers two = where(~heavy, one * one);
        store(s->weight + i * BLOCK + t, one * step);
        store(s->weight + (g->m + i) * BLOCK + t, two * step);
        steps += one * step;
        light_steps += two * step;
        mass += one;
        sizes += one * size;
        radii += grown * load(s->radius + t);
        far += two * (size * size);
        light += two;
        wide += where(~heavy, grown * grown);
        for (unsigned bits = marked(heavy); bits; bits &= bits - 1) {
            if (s->heavies[i] < HEAVY) s->heavy[i][s->heavies[i]] = s->token[t + __builtin_ctz(bits)];
            s->heavies[i]++;
        }
    }
    numbers one = sums_of_four(mass, sizes, radii, far), two = sums_of_four(light, wide, steps, light_steps);
    for (int n = 0; n < 4; n++) s->of[i][n] += (double)one[n], s->of[i][4 + n] += (double)two[n];
}

/* Add a block of tokens to the sums.

   list, many  the tokens, at most BLOCK; NULL for BLOCK tokens side by side
   start       the first of these; those marked in `other`, lane 0 being `start`, are left out
   small       literal: whether all have small weights. The cut then counts for listed tokens alone

   of[i] has sums over the tokens that are read: of weights, of weights times sizes, of grown weights times radii; over
   those that are not heavy: of squared weights times squared sizes, of squared weights, of squared grown weights; of
   what `weight` holds of this query, of all and of the light ones; and over tokens of small weight, which the sums of
   squared weights leave out, of their squared weights */
INLINE void add_block(const struct given *g, struct sums *s, const struct weighted *from, const int32_t *list,
                      int64_t many, int64_t start, unsigned other, const int small, const int run) {
    for (int64_t t = 0; t < BLOCK; t++) {
        s->token[t] = run ? (int32_t)(start + t) : list[t < many ? t : 0]; /* with weight 0 */
        s->place[t] = from->place + s->token[t];
    }
    copy_block(g, s, small, run);
    for (int64_t i = 0; i < g->m; i++) {
        const float *x = from->x + i * from->n, *grown = from->grown + i * from->n / BLOCK;
        float weight[BLOCK], more[BLOCK];
        for (int64_t t = 0; t < BLOCK; t += LANES) {
            integers token = *(const loose_integers *)(s->token + t);
            numbers one = run ? where(unmarked(other >> t), load(x + start + t))
                              : where(lanes_from((int32_t)t) < (int32_t)many, numbers_at(x, token));
            if (!small || !run) one = where(one > from->cut[i], one);
            store(weight + t, one);
            store(more + t, one * (run ? every(grown[start / BLOCK]) : numbers_at(grown, token >> 5)));
        }
        if (small) add_small(s, i, weight, more, from->longest);
        else add_large(g, s, i, weight, more, from->limit[i]);
    }
    add_all_rows(g, s, small ? g->m : 2 * g->m);
}

/* Add the values of the tokens in a list; `small` is literal. */
INLINE void add_listed(const struct given *g, struct sums *s, const struct weighted *from, const int32_t *list,
                       int64_t found, const int small) {
    for (int64_t start = 0; start < found; start += BLOCK) {
        int64_t many = found - start < BLOCK ? found - start : BLOCK;
        for (int64_t t = start + BLOCK; t < start + 2 * BLOCK && t < found; t++)
            for (int64_t c = 0; c < g->dv; c += 64)
                __builtin_prefetch(g->value_packed + (from->place + list[t]) * g->dv + c);
        add_block(g, s, from, list + start, many, 0, 0, small, 0);
        if (start % CHUNK == CHUNK - BLOCK) flush(s, 2 * g->m * g->dv);
    }
    flush(s, 2 * g->m * g->dv);
}

/* Write the tokens marked in `bits`, lane 0 being token `start`, to a list; return how many these are. */
INLINE int64_t list_marked(unsigned bits, int64_t start, int32_t *list) {
    int64_t many = __builtin_popcount(bits);
    for (; bits; bits &= bits - 1) *list++ = (int32_t)start + __builtin_ctz(bits);
    return many;
}

/* Add the values of all tokens whose weight is above its query's cut, and of others beside them. */
static void add_values(const struct given *g, struct sums *s, const struct weighted *from) {
    int64_t large_ones = 0, small_ones = 0, runs = 0, sums = 2 * g->m * g->dv, n = from->n;
    int32_t *large_list = from->list, *small_list = from->list + n;
    numbers below[MOST_QUERIES], unread[MOST_QUERIES];
    memset(s->part, 0, (size_t)sums * sizeof *s->part);
    memset(s->total, 0, (size_t)sums * sizeof *s->total);
    memset(s->of, 0, (size_t)g->m * sizeof *s->of);
    memset(s->heavies, 0, (size_t)g->m * sizeof *s->heavies);
    memset(from->left, 0, (size_t)g->m * sizeof *from->left);
    for (int64_t start = 0; start < n; start += BLOCK) {
        unsigned read = 0, large = 0;
        if (start % CHUNK == 0) memset(unread, 0, sizeof unread);
        for (int64_t i = 0; i < g->m; i++) {
            float cut = from->cut[i], bound = from->small[i] < from->limit[i] ? from->small[i] : from->limit[i];
            bound = bound > cut ? bound : cut;
            below[i] = (numbers){};
            for (int64_t t = 0; t < BLOCK; t += LANES) {
                numbers weight = load(from->x + i * n + start + t);
                integers kept = weight > cut;
                below[i] += where(~kept, weight);
                read |= marked(kept) << t;
                large |= marked(weight > bound) << t;
            }
        }
        int together = __builtin_popcount(large) >= RUN, run = !together && __builtin_popcount(read & ~large) >= RUN;
        for (int64_t i = 0; i < g->m; i++) {
            numbers grown = every(from->grown[(i * n + start) / BLOCK]);
            if (!run) unread[i] += below[i] * grown;
            for (unsigned bits = run ? large : 0; bits; bits &= bits - 1) {
                float weight = from->x[i * n + start + __builtin_ctz(bits)];
                unread[i][0] += weight > from->cut[i] ? 0 : weight * grown[0];
            }
            if (start % CHUNK == CHUNK - BLOCK || start + BLOCK == n) from->left[i] += (double)sum(unread[i]);
        }
        if (together) add_block(g, s, from, 0, BLOCK, start, 0, 0, 1);
        else if (run) add_block(g, s, from, 0, BLOCK, start, large, 1, 1);
        if ((together || run) && ++runs % (CHUNK / BLOCK) == 0) flush(s, sums);
        if (!together) large_ones += list_marked(large, start, large_list + large_ones);
        if (!together && !run) small_ones += list_marked(read & ~large, start, small_list + small_ones);
    }
    flush(s, sums);
    add_listed(g, s, from, large_list, large_ones, 0);
    add_listed(g, s, from, small_list, small_ones, 1);
}
