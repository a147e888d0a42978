/* Compute the logits of coded tokens, page by page. */

#pragma once

#include "given.h"

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
