/* Compute certified attention over packed codes, read in place.

   kernel.py says when it is used, `certify.glimpse` defines what it computes, and docs/certificates.md has the bounds
   and what it allows for the rounding of sums in their order here.

   A row is one (batch item, kv head) stream, a slot the place of one held token, a page `group` tokens of a row that
   are coded together, a channel one entry of a key or value. The kernel goes through a row's coded slots twice: for all
   logits, and for the values of the tokens whose weights count. Heavy tokens, those of large weight, are bounded one by
   one, all others together. Vectors have eight numbers; arithmetic on them is that of GCC's and Clang's vector types,
   with instructions named where the processor for which this is compiled has AVX2. */

#include "near.h"

int64_t size_of_given(void) { return sizeof(struct given); }

/* For tests. */
void exponentials(const float *x, float *out, int64_t n) {
    for (int64_t t = 0; t + LANES <= n; t += LANES) store(out + t, exponential(load(x + t)));
}

/* Answer the queries of the rows begin .. stop - 1; return 0, or 1 if there is no memory. */
int certify(int64_t begin, int64_t stop, const struct given *g) {
    struct work *w = 0;
    for (int64_t r = begin; r < stop; r++) {
        if (!w) w = opened(g);
        if (!w) return 1;
        answer_row(g, w, r);
        if (g->near) fetch_near(g, w, r);
        for (int64_t i = 0; g->kept && w && i < g->m; i++)
            if (!sure(g, r, i)) g->kept[r] = w, w = 0;
    }
    free(w);
    return 0;
}

/* Some queries of a row, those i with i % positions == position, and the tokens that are fetched for them. */
struct fetch {
    int64_t count, positions, room; /* how many such sets; positions of a row; most tokens of a set */
    const int64_t *row, *position;  /* (count) */
    int64_t *token, *found;         /* (count, room) and (count) */
    const float *k, *v;             /* (count, room, d and dv) the tokens as they were given */
};

/* Write the sets of queries that have an unsure one, by their rows and positions; return how many there are.

   skip (rows, positions): nonzero for sets that are left out */
int64_t unsure(const struct given *g, int64_t positions, const uint8_t *skip, int64_t *row, int64_t *position) {
    int64_t count = 0;
    for (int64_t r = 0; r < g->rows; r++)
        for (int64_t p = 0; g->kept[r] && p < positions; p++)
            if (!skip[r * positions + p] && some_unsure(g, r, p, positions)) row[count] = r, position[count++] = p;
    return count;
}

/* Write the tokens that each set wants. */
void want(const struct given *g, const struct fetch *fetch) {
    for (int64_t a = 0; a < fetch->count; a++)
        fetch->found[a] = wanted(g, g->kept[fetch->row[a]], fetch->row[a], fetch->position[a], fetch->positions,
                                 fetch->room, fetch->token + a * fetch->room);
}

/* Answer the unsure queries of each set again, with its tokens read as they were given. */
void refine(const struct given *g, const struct fetch *fetch) {
    for (int64_t a = 0; a < fetch->count; a++)
        refined(g, g->kept[fetch->row[a]], fetch->row[a], fetch->position[a], fetch->positions, fetch->found[a],
                fetch->token + a * fetch->room, fetch->k + a * fetch->room * g->d, fetch->v + a * fetch->room * g->dv);
}

/* Free what `certify` kept. */
void release(const struct given *g) {
    for (int64_t r = 0; r < g->rows; r++) free(g->kept[r]), g->kept[r] = 0;
}
