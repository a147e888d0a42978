/* Answer again, with tokens as they were given: which ones, and what they change. */

#pragma once

#include "rows.h"

/* Allow query i's sums over coded tokens what float32 made of them, once, before any token is taken out of them. */
static void widen(struct work *w, int64_t i) {
    const struct before *before = &w->before[i];
    if (w->widened[i]) return;
    w->widened[i] = 1;
    for (int n = 1; n < 9; n++) w->sums.of[i][n] += n < 6 || n == 8 ? 2 * TERMS * before->of[n] : 0;
    w->lighter[i] += 2 * TERMS * before->lighter;
    w->left[i] += 2 * TERMS * before->left;
}

/* Take a coded token that was read out of the sums over query i's light tokens. */
static void leave_light(const struct given *g, struct work *w, int64_t r, int64_t i, int64_t t) {
    int64_t n = g->coded[r], place = g->offset[r] + t, dv = g->dv;
    const uint8_t *codes = g->value_packed + place * dv;
    double weight = w->x[i * n + t], more = weight * (double)w->grown[(i * n + t) / BLOCK], step = step_of(g, place);
    double size = norm_of(g, place, w->sums.codes), two = weight * weight;
    double *of = w->sums.of[i], *light = w->sums.total + (g->m + i) * dv;
    of[3] -= two * size * size, of[4] -= two, of[5] -= more * more, of[7] -= two * step;
    for (int64_t c = 0; c < dv; c++) light[c] -= two * step * ((double)codes[c] - 128);
}

/* Find the heavy tokens among those that are left, as all that there were are fetched.

   Return 0 if there are none, 1 if they were taken out of the sums over light tokens, 2 to read the values again. */
static int deepened(const struct given *g, struct work *w, int64_t r, int64_t i) {
    if (w->sums.heavies[i] || sure(g, r, i) || w->known[i].wild) return 0;
    if (w->deeper[i] == DEEPEST) return w->widened[i] ? 2 : 0; /* what float32 made of the sums may be the reason */
    w->deeper[i]++;
    const float *x = w->x + i * g->coded[r];
    int64_t count = 0, n = g->coded[r];
    float before = w->limit[i];
    heavier(x, n, INFINITY, &w->lighter[i]);
    w->limit[i] = limit_of(x, n, &w->lighter[i]); /* if none stand out, the heaviest ones do as well */
    for (float lower = (float)sqrt(w->lighter[i] / HEAVY); lower > w->cut[i] && count < HEAVY / 2; lower /= 1.25f) {
        double rest;
        count = heavier(x, n, lower, &rest);
        if (count > HEAVY) break;
        w->limit[i] = lower, w->lighter[i] = rest;
    }
    w->before[i].lighter = w->lighter[i];
    if (!(w->limit[i] < INFINITY)) return 0;
    if (w->limit[i] < w->cut[i] || w->limit[i] < w->small[i] || STALE * w->sums.of[i][3] < w->before[i].of[3]) {
        w->cut[i] = w->cut[i] < w->limit[i] ? w->cut[i] : w->limit[i];
        return 2;
    }
    widen(w, i);
    for (int64_t start = 0; start < n; start += LANES) {
        numbers weight = load(x + start);
        for (unsigned bits = marked((weight > w->limit[i]) & (weight <= before)); bits; bits &= bits - 1) {
            int64_t t = start + __builtin_ctz(bits);
            leave_light(g, w, r, i, t);
            w->sums.heavy[i][w->sums.heavies[i]++] = t;
        }
    }
    return 1;
}

/* Return whether some query of row r at a position, i.e. i % positions == position, is unsure. */
static int some_unsure(const struct given *g, int64_t r, int64_t position, int64_t positions) {
    for (int64_t i = position; i < g->m; i += positions)
        if (!sure(g, r, i)) return 1;
    return 0;
}

/* Write the heavy tokens that widen the bounds of the unsure queries of row r at a position most, about as many as are
   enough and at most `room`; return how many. */
static int64_t wanted(const struct given *g, struct work *w, int64_t r, int64_t position, int64_t positions,
                      int64_t room, int64_t *token) {
    for (int changed = 1; changed;) {
        int64_t again[MOST_QUERIES], many = 0, anew = 0;
        for (int64_t i = position; i < g->m; i += positions) {
            int how = lowered(g, w, r, i) ? 2 : deepened(g, w, r, i);
            if (how) again[many++] = i;
            anew |= how == 2;
        }
        if (anew) read_values(g, w, r);
        for (int64_t n = 0; n < many; n++) answer(g, w, r, again[n], &w->known[again[n]]);
        changed = many > 0;
    }
    int64_t found = 0, at[MOST_QUERIES] = {0};
    while (found < room) {
        int64_t best = -1;
        double most = 0;
        for (int64_t i = position; i < g->m; i += positions) {
            if (sure(g, r, i) || w->known[i].wild || at[i] >= w->needed[i]) continue;
            double worth = w->worth[i][at[i]].each / w->whole[i];
            if (best < 0 || worth > most) best = i, most = worth;
        }
        if (best < 0) break;
        int64_t t = w->worth[best][at[best]++].token, n = 0;
        while (n < found && token[n] != t) n++;
        if (n == found) token[found++] = t;
    }
    return found;
}

/* Take a coded token out of all sums of query i of row r. */
static void leave_out(const struct given *g, struct work *w, int64_t r, int64_t i, int64_t t) {
    int64_t n = g->coded[r], place = g->offset[r] + t, dv = g->dv, kept = 0;
    struct sums *s = &w->sums;
    const uint8_t *codes = g->value_packed + place * dv;
    double weight = w->x[i * n + t], more = weight * (double)w->grown[(i * n + t) / BLOCK], step = step_of(g, place);
    double size = norm_of(g, place, s->codes), *of = s->of[i], *total = s->total + i * dv;
    int heavy = w->x[i * n + t] > w->limit[i];
    w->mass[i] -= weight, w->lighter[i] -= heavy ? 0 : weight * weight;
    if (w->x[i * n + t] > w->cut[i]) {
        of[0] -= weight, of[1] -= weight * size, of[2] -= more * (double)from_short(g->radius[place]);
        of[6] -= weight * step;
        for (int64_t c = 0; c < dv; c++) total[c] -= weight * step * ((double)codes[c] - 128);
        if (!heavy) leave_light(g, w, r, i, t);
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

/* Answer the unsure queries of row r at a position again, with `count` tokens read as they were given.

   token (count), k (count, d), v (count, dv) */
static void refined(const struct given *g, struct work *w, int64_t r, int64_t position, int64_t positions,
                    int64_t count, const int64_t *token, const float *k, const float *v) {
    for (int64_t i = position; i < g->m; i += positions) {
        if (sure(g, r, i) || w->known[i].wild || w->top[i] <= HIDDEN) continue;
        widen(w, i);
        for (int64_t f = 0; f < count; f++) {
            if (!sees(g, r, i, token[f])) continue;
            leave_out(g, w, r, i, token[f]);
            take_in(g, w, i, k + f * g->d, v + f * g->dv);
        }
        answer(g, w, r, i, &w->known[i]);
    }
}
