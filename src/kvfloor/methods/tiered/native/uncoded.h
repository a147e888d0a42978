/* Read the tokens that have no codes, and what is known of all tokens' lengths. */

#pragma once

#include "values.h"

/* What a query's bound takes from its row. */
struct known {
    double largest, widest; /* at most the largest norm of a value that the query sees; at least that of all values */
    double decoded;         /* at least the norms of what all coded values are decoded to */
    double typical, radius; /* a guess of the values' mean norm; the mean radius */
    double fresh_rounding;  /* of logits of uncoded tokens */
    int wild;               /* true if nothing is bounded */
};

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

/* Write what is known of the coded values that query i sees.

   Where tokens are hidden, a value's norm is computed only if its widest entry says that it may be longer than those
   before it; scratch: (dv). */
static void read_lengths(const struct given *g, int64_t r, int64_t i, struct known *known, int8_t *scratch) {
    const float shrink = (float)(1 - UNIT * (4 * (double)g->dv + 64)), root = (float)sqrt((double)g->dv);
    int64_t place = g->offset[r], n = g->coded[r];
    float least = g->coded[r] > g->first && !g->hide ? g->longest[r] * shrink : 0.0f;
    numbers radii = {}, widest = {}, most = {};
    for (int64_t start = 0; start < n; start += LANES) {
        numbers here = from_shorts(g->radius + place + start);
        radii += here;
        most = larger(here, most);
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
    known->decoded = (known->widest + (double)highest(most)) * (1 + UNIT);
    known->typical = (double)sum(widest) / (double)(n ? n : 1) * root / 2.5; /* as if entries were normal */
    known->radius = (double)sum(radii) / (double)(n ? n : 1);
}
