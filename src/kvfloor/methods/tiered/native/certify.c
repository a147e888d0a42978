/* Compute certified attention over packed codes, read in place.

   kernel.py says when it is used, `certify.glimpse` defines what it computes, and docs/certificates.md has the bounds
   and what it allows for the rounding of sums in their order here.

   A row is one (batch item, kv head) stream, a slot the place of one held token, a page `group` tokens of a row that
   are coded together, a channel one entry of a key or value. The kernel goes through a row's coded slots twice: for all
   logits, and for the values of the tokens whose weights count. Heavy tokens, those of large weight, are bounded one by
   one, all others together. Vectors have eight numbers; arithmetic on them is that of GCC's and Clang's vector types,
   with instructions named where the processor for which this is compiled has AVX2. */

#include "fetch.h"

int64_t size_of_given(void) { return sizeof(struct given); }

/* For tests. */
void exponentials(const float *x, float *out, int64_t n) {
    for (int64_t t = 0; t + LANES <= n; t += LANES) store(out + t, exponential(load(x + t)));
}
