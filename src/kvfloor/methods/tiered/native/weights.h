/* Turn logits into weights, and choose by weight: which values are read, and which tokens are heavy. */

#pragma once

#include "given.h"

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
    for (int i = 0; i < 4; i++) {
        double rest, before = *square;
        if (heavier(x, n, lower, &rest) > HEAVY) break;
        limit = lower;
        *square = rest;
        if (rest > 0.9 * before) break; /* a lower limit would change little */
        lower = (float)sqrt(rest / HEAVY);
    }
    return limit;
}

/* Return a weight such that the weights up to it, of n, or their squares, add up to about `most`, or to less.

   stride: from one to the next of the LANES weights that are looked at */
INLINE float cut_of(const float *x, int64_t n, double most, int64_t stride, const int squares) {
    if (!(most > 0) || !n) return 0.0f;
    double low = most / (double)n, high = most;
    if (squares) low = sqrt(low), high = sqrt(high);
    for (int i = 0; i < 7; i++) {
        float middle = (float)sqrt(low * high);
        numbers below = {};
        for (int64_t t = 0; t < n; t += stride) {
            numbers weight = load(x + t);
            below += where(weight <= middle, squares ? weight * weight : weight);
        }
        if ((double)sum(below) * (double)(stride / LANES) <= most) low = middle;
        else high = middle;
    }
    return (float)low;
}
