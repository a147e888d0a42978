"""Play the spike game with bits hidden in the keys too: Alice streams a secret choice of n keys of a public codebook.

In the spike game, Alice hides a row of dv values under each key of a stream, and sends the bytes of a method's state
(the memory of a KV cache). Bob restores the state, and reads each row by a spike query, which gives one key nearly all
softmax mass. Here the keys come from a public codebook of M keys. The choice of n of these hides log2 C(M, n) bits
besides those of the values, where C(M, n) is the binomial coefficient: about n log2(2.718 M / n) bits.
Bob queries every key of the codebook. Before each query he appends a marker to a copy of the state: a token whose key
is a slightly shorter copy of the queried key, and whose value is -1. If the queried key was streamed, its token
outweighs the marker. If not, the marker outweighs all other tokens, and the answer is near -1 (docs/floors.md, "Bits in
the keys"; derived).
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from kvfloor.core.method import Method
from kvfloor.core.state import State
from kvfloor.floors.entropy import H2, log2_choose, row_bits
from kvfloor.floors.spike import spike_C
from kvfloor.game.engine import certificates
from kvfloor.game.engine.asking import by_appending
from kvfloor.game.engine.decode import Decoded, leak_ratio, nearest_levels, wrong_bits
from kvfloor.game.engine.instance import KeyedInstance, agreed, keys_for, pieces
from kvfloor.game.engine.play import Played, play_index
from kvfloor.game.engine.predict import log2_level_probability, log2_row_gain
from kvfloor.game.engine.result import SUCCESS, Result, conclude
from kvfloor.game.engine.secret import Hidden
from kvfloor.validation import whole

_MOST_KEYS = 16_384
_DOUBTS = (2.0**-20, 2.0**-10, 2.0**-5, 0.25)  # about a membership
_UNIFORM_SHARES = (2.0**-14, 2.0**-5)
_BELIEFS = (1.0 - 2.0**-20, 0.75)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Codebook(KeyedInstance):
    """Stream n of M public keys, chosen and ordered in secret, each with a hidden row of dv values.

    M is `codebook`. Hidden values are drawn for all M keys; those of keys that are not streamed are not used.
    """

    barrier: ClassVar[str] = "spike"
    n: int
    codebook: int

    @property
    def rows(self) -> int:
        """Return the number M of codebook keys: Bob, who decodes the hidden values, queries each key once."""
        return self.codebook

    @property
    def length(self) -> int:
        return self.n

    @property
    def hidden_bits(self) -> float:
        return int(log2_choose(self.codebook, self.n)) + self.n * self.dv * self.bits

    @property
    def floor_bits(self) -> float:
        """Return a lower bound on the bits of any message that tells a share SUCCESS of the keys and their bits."""
        return subset_bits(self.codebook, self.n, SUCCESS) + row_bits(self.n, self.dv, SUCCESS, self.bits)

    def stream(self, values: Tensor, hidden: Hidden) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = hidden.subset(self.codebook, self.n)
        yield from pieces(self.keys[chosen], values[:, chosen])

    def answers(self, state: State, copy: Tensor, row: Tensor) -> Tensor:
        ratio = leak_ratio(self.bits, self.eta)
        # Half of the gap separates the key from the marker, the other half the marker from all other keys.
        queries, gaps = self.public.aim(
            row, self.spec(), lambda gap, norm: spike_C(self.codebook, 1, gap / 2, norm, ratio)
        )
        norms = self.keys[row].double().square().sum(dim=1)
        shorter = 1.0 - torch.minimum(gaps, norms) / (2.0 * norms)
        markers = (self.keys[row].double() * shorter.unsqueeze(1)).to(self.keys.dtype)
        return by_appending(state, copy, queries, markers, markers.new_full((len(row), self.dv), -1.0))

    def judge(self, answers: Tensor, levels: Tensor, present: Tensor) -> Decoded:
        """Certify which keys were streamed, and their values, from the answers (M, dv) to one query per codebook key.

        M is the number of codebook keys. levels (M, dv) are the hidden values as whole numbers of `bits` bits; present
        (M,) bool is True for the keys that were streamed. Returns a `Decoded` of
            certified_bits  of the choice of keys and their values together, by the better of two certificates: log-loss
                            turns the probability that the answers give to both into bits (`certificates.log_loss`),
                            rows counts the streamed keys that did not come back whole (`subset_rows`)
            bit_error       share of value bits of streamed keys decoded wrong
            row_success     the lesser of two shares: of streamed keys decoded as streamed and with all their bits
                            right, and of other keys decoded as not streamed
        """
        believed = answers.double().mean(dim=1) > -0.5  # a marker answers -1, a streamed key at least 0
        right = believed == present
        both = believed & present
        base = log2_choose(self.codebook, self.n)
        doubts = [
            right.sum().item() * math.log2(1.0 - doubt) + (~right).sum().item() * math.log2(doubt) for doubt in _DOUBTS
        ]
        gains = []
        for width in (2.0**power for power in range(-6, self.bits)):
            for share in _UNIFORM_SHARES:
                centre = answers[both].double() * (2**self.bits - 1)
                entries = log2_level_probability(centre, levels[both], 2**self.bits, width, share)
                row_gain = (self.bits + entries).sum(dim=1)
                for belief in _BELIEFS:
                    total = log2_row_gain(row_gain, torch.full_like(row_gain, belief)).sum().item()
                    gains += [base + doubt + total for doubt in doubts]
        wrong = wrong_bits(nearest_levels(answers, self.bits, self.eta), levels, self.bits)
        missed = self.n - int((both & (wrong == 0)).sum())
        told = {
            "log-loss": certificates.log_loss(gains),
            "rows": subset_rows(self.codebook, self.n, self.dv * self.bits, int(believed.sum()), missed),
        }
        kind, certified = max(told, key=lambda name: told[name]), certificates.certified(list(told.values()))
        wrong_values = wrong[both].sum() + self.dv * self.bits * (present & ~believed).sum()
        # Markers answer below 0, where (1±eta) means nothing: a row is right if all its bits are.
        shares = [(believed & (wrong == 0))[present], ~believed[~present]]
        success = min(share.double().mean().item() for share in shares if len(share))
        return Decoded(certified, kind, int(wrong_values) / (self.n * self.dv * self.bits), success)

    def details(self) -> dict[str, Any]:
        return {
            **super().details(),
            "codebook": self.codebook,
            "key_bits": log2_choose(self.codebook, self.n),
            "value_bits": self.n * self.dv * self.bits,
        }


def play(
    method: Method | str,
    *,
    codebook: int,
    n: int = 256,
    d: int = 64,
    dv: int | None = None,
    bits: int = 1,
    eta: float = 0.5,
    seed: int = 0,
    dtype: str = "float32",
    hidden_seed: int | str | None = None,
    family: str | None = None,
    isolated: bool = True,
) -> Result:
    """Play the spike game with bits hidden in the keys too: Alice streams n keys, chosen in secret, of a public set.

    method       a method or its text, such as "h2o@16"
    codebook     size of the public set, in n..16,384
    n, d, dv     number of streamed keys, width of a key, width of a value (dv = d by default)
    bits         hidden bits per value, 1 to 24
    eta          relative error that answers may have, in [0, 1)
    seed         gives the public keys and, by a one-way derivation, the seed that the method receives
    dtype        float32, float16 or bfloat16: type of the keys and values that the method receives
    hidden_seed  repeats the hidden values; by default they are fresh from the operating system
    family       rule that makes the keys ("chirp", "sphere", ...); by default the one that separates the keys best
    isolated     False: restore the state in this process; quick, but data kept outside its bytes goes undetected
    Returns a `Result`: the bits that the state's bytes provably carry (certified bits), the sizes in bytes and the
    verdict: "holds" (enough answers are right), "breaks" (too few are) or "cheats" (the bytes cannot explain them).
    Its row_success is the lesser of two shares: of streamed keys decoded as streamed and with all their bits right, and
    of other keys decoded as not streamed. Its bits_per_value leaves out the bits hidden in the keys. Raises ValueError
    naming the argument that is out of its domain.
    """
    shared = agreed(d=d, dv=dv, bits=bits, eta=eta, seed=seed, dtype=dtype)
    n, codebook = whole("n", n), whole("codebook", codebook)
    if not n <= codebook <= _MOST_KEYS:
        raise ValueError(f"codebook must lie in n..{_MOST_KEYS} = {n}..{_MOST_KEYS}, got {codebook}")
    instance = Codebook(**shared, n=n, codebook=codebook, public=keys_for(shared, codebook, family))
    played = play_index(method, instance, Hidden(hidden_seed), isolated=isolated)
    present = torch.zeros(codebook, dtype=torch.bool)
    present[Hidden(played.hidden_seed).subset(codebook, n)] = True

    def judged(answers: Tensor, played: Played) -> Decoded:
        return instance.judge(answers, played.hidden, present)

    result = conclude(played, instance, seed=seed, judge=judged)
    values = max(0.0, result.certified_bits - log2_choose(codebook, n))
    return dataclasses.replace(result, n=n, bits_per_value=values / (n * instance.dv))


def subset_rows(codebook: int, n: int, row_bits: int, believed: int, missed: int) -> float:
    """Return the gain T, in bits, of naming keys of a secret set with their rows, where `missed` did not come back.

    codebook  number M of keys of which the secret set has n, each with a row of `row_bits` hidden bits
    believed  number of keys that the answers name, each with one decoded row; it may depend on the answers alone
    missed    number of the set's keys that are not named, or named with a wrong row
    T - log2(1/alpha) is a lower bound on the message's length at confidence 1 - alpha.
    Law: log2 C(M, n) + n row_bits - log2 sum over w <= missed of C(believed, n-w) C(M-n+w, w) 2^(w row_bits). The sum
    counts the sets with their rows that agree with the answers in all but w keys: n-w of those named, with the decoded
    rows, and any w others of the M keys, with any rows. T is at least 0.
    """
    few = [w for w in range(missed + 1) if n - w <= believed]
    if not few:
        raise ValueError(f"at least n - believed = {n - believed} keys of the set are missed, got missed={missed}")
    counts = [_log2_choose(believed, n - w) + _log2_choose(codebook - n + w, w) + w * row_bits for w in few]
    most = max(counts)
    alike = most + math.log2(math.fsum(2.0 ** (count - most) for count in counts))
    return max(0.0, _log2_choose(codebook, n) + n * row_bits - alike)


def _log2_choose(n: int, k: int) -> float:
    """Return log2 of the binomial coefficient, 0 <= k <= n, to the precision of a float."""
    return (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)) / math.log(2.0)


def subset_bits(codebook: int, n: int, p: float) -> float:
    """Return a lower bound on the bits of a message from which the members of a secret set of keys are decoded.

    The set has n of the M keys of a public codebook; M is `codebook`. A share p >= 1/2 of the set's keys must be
    decoded as members, and a share p of the other keys as non-members.
    Law: log2 C(M, n) - M (H2(f) + H2(p) - H2(f p + (1-f)(1-p))), and at least 0, with f = n/M, C(M, n) the binomial
    coefficient and H2 the binary entropy. The reason: whether a key is a member is decoded like a bit sent over a
    binary channel with error 1-p. The factor of M is the entropy of one key's membership that is left after the
    decoding. As entropy is concave, M times it bounds the entropy left for all keys together.
    """
    f = n / codebook
    left_open = H2(f) + H2(p) - H2(f * p + (1.0 - f) * (1.0 - p))
    return max(0.0, log2_choose(codebook, n) - codebook * left_open)
