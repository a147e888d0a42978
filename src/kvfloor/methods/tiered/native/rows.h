/* Answer the queries of a row. */

#pragma once

#include "bound.h"

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
    double about = w->gram[i] * root * known->typical + least_of(by_norm, by_radius);
    return about / (whole * most_of(known->largest, 1e-30));
}

/* Lower the cut of query i of row r if its answer is not within epsilon, but would be if more values were read.

   Return whether it was lowered: at first to what seems enough, then to 0. */
static int lowered(const struct given *g, struct work *w, int64_t r, int64_t i) {
    if (!(w->cut[i] > 0) || sure(g, r, i) || !(w->rest[i] <= allowed(g, r * g->m + i))) return 0;
    int64_t n = g->coded[r];
    double unread = (double)g->error[r * g->m + i] - w->rest[i], most = allowed(g, r * g->m + i) - w->rest[i];
    float cut = w->tries[i]++ ? 0.0f : cut_of(w->x + i * n, n, 0.8 * w->left[i] * most / unread, LANES, 0);
    w->cut[i] = cut < w->cut[i] ? cut : 0.0f;
    return 1;
}

/* Sum over the values of all tokens above the queries' cuts. */
static void read_values(const struct given *g, struct work *w, int64_t r) {
    double longest = 0;
    for (int64_t i = 0; i < g->m; i++) longest = most_of(w->known[i].decoded, longest);
    struct weighted from = {g->offset[r], g->coded[r], w->x, w->cut, w->limit, w->small, w->grown, longest, w->list,
                            w->left};
    add_values(g, &w->sums, &from);
    for (int64_t i = 0; i < g->m; i++) {
        memcpy(w->before[i].of, w->sums.of[i], sizeof w->before[i].of);
        w->before[i].left = w->left[i];
        w->widened[i] = 0;
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
        float *growths = w->growths;
        for (int64_t page = 0; page < pages; page += LANES) { /* of doubts beyond the last page nothing is made */
            numbers doubt = load(w->doubt + i * pages + page);
            doubt = choose(doubt < (float)DOUBT, doubt, every((float)DOUBT));
            store(growths + page, (float)(1 + 4 * UNIT) / exponential(-doubt));
        }
        for (int64_t page = 0, blocks = g->group / BLOCK; page < pages; page++) {
            float growth = growths[page];
            for (int64_t block = 0; block < blocks; block++) grown[page * blocks + block] = growth;
        }
        weigh(x, n, w->top[i], &w->mass[i], &square);
        weigh(fresh, w->fresh.room, w->top[i], &fresh_mass, &ignored);
        w->lighter[i] = square;
        w->limit[i] = limit_of(x, n, &w->lighter[i]);
        double whole = w->mass[i] + fresh_mass, most = g->epsilon - likely(g, w, r, i, whole);
        most = most > 0 ? most : g->epsilon / 4; /* tokens are fetched, and then so much may be left */
        int64_t stride = n < 4096 ? LANES : 8 * LANES;
        float cut = cut_of(x, n, g->share * most * whole, stride, 0);
        w->cut[i] = cut < w->limit[i] ? cut : w->limit[i];
        w->small[i] = cut_of(x, n, SMALL * w->lighter[i], 4 * stride, 1);
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
    ROOM(w->doubt, m * n / g->group + LANES);
    ROOM(w->growths, n / g->group + LANES);
    ROOM(w->grown, m * n / BLOCK);
    ROOM(w->list, 2 * n);
    ROOM(w->asked, m * d);
    ROOM(w->cut, m);
    ROOM(w->limit, m);
    ROOM(w->small, m);
    ROOM(w->top, m);
    ROOM(w->exact, m * d);
    ROOM(w->vector, d);
    ROOM(w->centre, dv);
    ROOM(w->back, dv * dv);
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
    ROOM(w->widened, m);
    ROOM(w->near_token, g->near ? MOST_FETCHED : 0);
    ROOM(w->near_k, g->near ? MOST_FETCHED * d : 0);
    ROOM(w->near_v, g->near ? MOST_FETCHED * dv : 0);
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
    for (int64_t c = 0; c < g->dv * g->dv; c++) w->back[c] = g->turn[c % g->dv * g->dv + c / g->dv];
    return w;
}
