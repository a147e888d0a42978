"""Report what verified decoding did: forwards, and how many drafted tokens were accepted at each draft position."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VerifiedReport:
    """Hold the counts of one call of `generate_verified`.

    tokens         new tokens of each batch item
    verifications  forwards over the exact cache, the prompt's own left out
    rounds         of each batch item, the verifications until it had all its tokens
    draft_steps    forwards over the bounded cache, one token per batch item each
    reached        for each batch item, by draft position: number of drafts whose earlier drafts were all accepted. A
                   draft behind the last token that an item needs is not counted
    accepted       for each batch item, by draft position: those of them that were accepted
    hot_bytes      bytes of the bounded states at the end: what each draft step reads at most
    cold_bytes     bytes of the exact states, and of sliding windows, at the end: what each verification reads
    least_margin   least difference of the two largest logits over all tokens chosen greedily; None while sampling.
                   Where it is larger than the rounding of two logits together, plain decoding chooses the same tokens
    """

    tokens: tuple[int, ...]
    verifications: int
    rounds: tuple[int, ...]
    draft_steps: int
    reached: tuple[tuple[int, ...], ...]
    accepted: tuple[tuple[int, ...], ...]
    hot_bytes: int
    cold_bytes: int
    least_margin: float | None

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Return, by draft position, the share of reached drafts that were accepted, over all batch items.

        It is nan where no draft was reached.
        """
        accepted, reached = ([sum(column) for column in zip(*x, strict=True)] for x in (self.accepted, self.reached))
        return tuple(yes / of if of else float("nan") for yes, of in zip(accepted, reached, strict=True))

    @property
    def tokens_per_verification(self) -> float:
        """Return the new tokens of a batch item per verification, without the first token, which the prompt gives.

        It is the mean over all items and their rounds, and nan if there was no verification.
        """
        rounds = sum(self.rounds)
        return (sum(self.tokens) - len(self.tokens)) / rounds if rounds else float("nan")
