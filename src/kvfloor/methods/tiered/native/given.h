/* What the kernel is given, and its constants. */

#pragma once

#include "vectors.h"

enum {
    BLOCK = 32,       /* tokens whose values are decoded at a time */
    CHUNK = 256,      /* tokens that are summed in float32, before they are added to a sum in float64 */
    HEAVY = 64,       /* most tokens that are bounded one by one, for each query */
    ROWS = 6,         /* most sums of values that are made at once */
    RUN = 16,         /* so many of BLOCK tokens that are read alike are read where they are, not listed */
    MOST_QUERIES = 8, /* of a row */
    STALE = 256,      /* values are read again where so small a part of a sum is left */
    DEEPEST = 6,      /* how often a query's heavy tokens are found anew, once all that there were are fetched */
    MOST_FETCHED = 128, /* tokens that a set of queries fetches at once */
};

static const double MIDDLE = 127.5; /* of a value's codes: it stands for 0 */
static const double SMALL = 0.01;   /* the share of the squared weights that are bounded without their values' norms */
static const float HIDDEN = -1e30f; /* stands for the logit of a token that is not seen */
static const double DOUBT = 30.0;   /* bound on a logit's error from which on nothing is bounded */
static const double UNIT = 0x1p-23; /* the allowance for one rounding in float32, twice the largest relative error */
#define TERMS (UNIT * (CHUNK + 64)) /* for a sum of CHUNK terms in float32, and for its factors */

/* What `kernel.py` passes, in this order: numbers of 8 bytes, then addresses of arrays. */
struct given {
    int64_t rows, m, d, dv, first, group, ring, extra, fine_words, slots, groups, longest_row, positions, halves;
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
    const uint8_t *idle;                      /* (rows, positions) nonzero: for these queries nothing is fetched */
    const int64_t *near;                      /* (rows) place of a row's first token in `near_k`; or NULL */
    const void *near_k, *near_v;              /* (places, d and dv) tokens as they were given: float32; if `halves`,
                                                 bfloat16 */
    int64_t *fetched;                         /* (rows, positions) how many of them were fetched */
};

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

/* Return whether query i of row r sees the token in slot t. */
INLINE int sees(const struct given *g, int64_t r, int64_t i, int64_t t) {
    return !g->hide || !g->hide[(r * g->m + i) * g->slots + t];
}
