/* Fetch tokens that lie in memory as they were given. */

#pragma once

#include "fetch.h"

/* Copy `width` numbers from `at` on of an array to out, in float32. */
static void copied(const struct given *g, const void *from, int64_t at, int64_t width, float *out) {
    if (!g->halves) memcpy(out, (const float *)from + at, (size_t)width * sizeof *out);
    else
        for (int64_t c = 0; c < width; c++) out[c] = from_short(((const uint16_t *)from)[at + c]);
}

/* Fetch tokens for the queries of row r until each is sure, or no token helps it. */
static void fetch_near(const struct given *g, struct work *w, int64_t r) {
    for (int64_t p = 0; p < g->positions; p++)
        while (!g->idle[r * g->positions + p] && some_unsure(g, r, p, g->positions)) {
            int64_t count = wanted(g, w, r, p, g->positions, MOST_FETCHED, w->near_token);
            if (!count) break;
            for (int64_t f = 0; f < count; f++) {
                int64_t place = g->near[r] + w->near_token[f];
                copied(g, g->near_k, place * g->d, g->d, w->near_k + f * g->d);
                copied(g, g->near_v, place * g->dv, g->dv, w->near_v + f * g->dv);
            }
            refined(g, w, r, p, g->positions, count, w->near_token, w->near_k, w->near_v);
            g->fetched[r * g->positions + p] += count;
        }
}
