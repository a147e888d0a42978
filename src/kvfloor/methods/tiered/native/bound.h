/* Answer a query from the sums over its tokens, with bounds on its error. */

#pragma once

#include "logits.h"
#include "uncoded.h"
#include "weights.h"

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

/* Write the product of the transpose of a matrix (w, w) and a vector to out. */
static void turned(const double *turn, const double *vector, double *out, int64_t w) {
    memset(out, 0, (size_t)w * sizeof *out);
    for (int64_t a = 0; a < w; a++)
        for (int64_t b = 0; b < w; b++) out[b] += turn[a * w + b] * vector[a];
}

/* Sums over a query's coded tokens before any of them was fetched: what float32 makes of sums is a share of these. */
struct before {
    double of[9], mass, lighter, left;
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
    float *doubt, *growths, *grown;                 /* (m, pages) errors of logits; (pages), (m, tokens / BLOCK) exp */
    int32_t *list;                                  /* (2, coded tokens) */
    float *asked, *cut, *limit, *small, *top;       /* (m, d), then (m) */
    double *exact, *vector, *centre, *plain;        /* (m, d) the queries times the scale; (d), (dv), (dv) */
    double *back;                                   /* (dv, dv) the transpose of `turn` */
    double *left, *mass, *lighter, *gram, *rounding, *norm; /* (m) */
    double *rest, *whole;                           /* (m) an answer's error without unread values; the mass of all */
    struct known *known;                            /* (m) */
    struct before *before;                          /* (m) */
    struct fetched *fetched;                        /* (m) */
    struct heavy (*worth)[HEAVY + 1];               /* (m) the heavy tokens, those of the largest `each` first */
    int64_t *needed, *tries, *deeper, *widened;     /* (m) how many of them to fetch; how often a cut was lowered, and
                                                       heavy tokens were found anew; whether `widen` was called */
    int64_t *near_token;                            /* (MOST_FETCHED) tokens that are fetched from `given.near_k` */
    float *near_k, *near_v;                         /* (MOST_FETCHED, d and dv) what they were given as */
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
    turned(w->back, plain, centre, dv);
    for (int64_t c = 0; c < dv; c++) {
        centre[c] = (total[c] + of[6] / 2 + centre[c]) / read_mass;
        square += centre[c] * centre[c];
        near += centre[c] * (light[c] + of[7] / 2);
    }
    turned(g->turn, centre, plain, dv);
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
        double aways[LANES] = {0}, sizes[LANES] = {0};
        for (int64_t c = 0; c < dv; c += LANES)
            for (int64_t e = 0; e < LANES; e++) {
                double number = step * ((double)codes[c + e] - MIDDLE), apart = number - centre[c + e];
                aways[e] += apart * apart;
                sizes[e] += number * number;
            }
        for (int64_t e = 0; e < LANES; e++) away += aways[e], size += sizes[e];
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
    rest += of[8] * (1 + TERMS) * (known->decoded + length) * (known->decoded + length);
    const int64_t stride = sizeof *worth / sizeof(double);
    double by_tokens = deviation(&worth->each, &worth->own, stride, tokens, rest, slope * w->gram[i]);
    double about = by_tokens + slope * rounding * (of[1] + length * of[0]);
    about += uncoded * (fresh_size + length * fresh_mass);
    about += w->left[i] * (known->widest + length);
    double over = deviation(&worth->spread_each, &worth->spread_own, stride, tokens, w->lighter[i], slope * w->gram[i]);
    over += slope * rounding * w->mass[i] + uncoded * fresh_mass;
    double by_norm = sqrt(grown_square) * (double)g->operator_[r], by_radius = of[2];
    double lengths = (before->of[1] + before->of[2] + fresh_size) / read_mass, count = (double)g->count[r];
    double floor = count * exp(LEAST + widest), log_mass = (double)w->top[i] + log(whole_mass);
    double told = TERMS * (before->mass + fresh_mass) / whole_mass + 4 * UNIT * (fabs(log_mass) + 1);
    double slack = (1 + UNIT * (count / 64 + 4 * (double)dv + 256)) * (1 + told);
    double by_values = least_of(by_norm, by_radius);
    double off = (about + by_values + floor * (known->widest + length)) / whole_mass;
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
        double fewer =
            deviation(&worth[taken].each, &worth[taken].own, stride, tokens - taken, rest, slope * w->gram[i]);
        fewer += least_of(sqrt(most_of(grown_square, 0)) * (double)g->operator_[r], by_radius);
        w->needed[i] = taken;
        if (off - (by_tokens + by_values - fewer) / whole_mass * slack <= most) break;
    }
}

/* Return whether the answer to query i of row r is within epsilon. */
static int sure(const struct given *g, int64_t r, int64_t i) {
    return (double)g->error[r * g->m + i] <= allowed(g, r * g->m + i);
}
