"""Decode hidden values from answers, using the answers and public numbers only."""

import dataclasses

import torch
from torch import Tensor

from kvfloor.floors.separation import eps_s, level_eps_s, tau
from kvfloor.game.engine import certificates
from kvfloor.game.engine.predict import predictor_gains

_ROUNDING = 2.0**-20  # error that float32 arithmetic may add to an answer in [0, 1], also at eta = 0
_LARGEST_ANSWER = 0.3  # a row whose largest answer is below it is no spike, whatever its pattern
_OFF_LEVEL = 0.15  # mean distance to the nearest level, in level spacings, from which a row is not trusted
_SPREAD = 0.15  # standard deviation in [0, 1] below which a row is an average of many tokens


def leak_ratio(bits: int, eta: float) -> float:
    """Return the eps_s that the game uses: (1-eta)/4 for single bits; for finer values also at most 2^-(bits+3)."""
    return eps_s(eta) if bits == 1 else min(eps_s(eta), level_eps_s(bits))


def nearest_levels(answers: Tensor, bits: int, eta: float) -> Tensor:
    """Decode the hidden levels (m, dv), int64 in [0, 2^bits): single bits by `tau`, finer values by the nearest level.

    An answer that is not finite decodes as level 0.
    """
    answers = torch.nan_to_num(answers.double(), nan=0.0, posinf=0.0, neginf=0.0)
    if bits == 1:
        return (answers > tau(eta, leak_ratio(bits, eta))).long()
    top = 2**bits - 1
    return (answers * top).round().clamp(0, top).long()


def trusted_rows(answers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Find the rows whose answers look like one token's own values; return (trusted (m,) bool, levels (m, dv)).

    A row of single bits is first divided by its largest answer, because sampling methods return scaled answers. The
    answers of a trusted row are finite, large enough and close to levels. They are not the flat average that a query
    for an evicted token gets.
    """
    answers = answers.double()
    finite = torch.isfinite(answers).all(dim=1)
    answers = torch.nan_to_num(answers, nan=0.0, posinf=0.0, neginf=0.0)
    largest = answers.amax(dim=1, keepdim=True)
    if bits == 1:
        answers = answers / largest.clamp_min(_LARGEST_ANSWER)
    top = 2**bits - 1
    levels = (answers * top).round().clamp(0, top)
    off = (answers * top - levels).abs().mean(dim=1)
    spread = answers.std(dim=1, correction=0)
    trusted = finite & (largest[:, 0] > _LARGEST_ANSWER) & (off < _OFF_LEVEL) & (spread > _SPREAD)
    return trusted, levels.long()


def wrong_bits(decoded: Tensor, hidden: Tensor, bits: int) -> Tensor:
    """Count the wrong bits per row (m,) under the Gray code, in which neighbouring levels differ in one bit."""
    differing = (decoded ^ (decoded >> 1)) ^ (hidden ^ (hidden >> 1))
    return sum(((differing >> place) & 1).sum(dim=1) for place in range(bits))  # type: ignore[return-value]


def answered_rows(answers: Tensor, hidden: Tensor, bits: int, eta: float) -> Tensor:
    """Mark the rows (m,), bool, whose answers a (1±eta)-accurate method could have returned.

    For single bits, the whole row must decode right. For finer values x, every coordinate must lie between (1-eta)
    times the least and (1+eta) times the largest value that exact attention gives when the spike leaks at most
    `leak_ratio`, up to float32 rounding.
    """
    if bits == 1:
        return (nearest_levels(answers, bits, eta) == hidden).all(dim=1)
    leak, x = leak_ratio(bits, eta), hidden.double() / (2**bits - 1)
    least, most = (1.0 - leak) * x, x + leak * (1.0 - x)
    answers = answers.double()
    inside = (answers >= (1.0 - eta) * least - _ROUNDING) & (answers <= (1.0 + eta) * most + _ROUNDING)
    return inside.all(dim=1)


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Record the decoding of one set of answers: certified bits, certificate, share of wrong bits and of good rows."""

    certified_bits: float
    certificate: str
    bit_error: float
    row_success: float


def judge(answers: Tensor, hidden: Tensor, bits: int, eta: float, *, sampled_from: int | None = None) -> Decoded:
    """Compare answers (m, dv) with the hidden levels (m, dv), and certify the bits that the message held.

    All rows once, in order, give the best of the hard, erasure and log-loss certificates. `sampled_from` = n means that
    the rows were drawn with replacement from n; then the share of whole rows decoded right gives the certificate.
    """
    m, dv = hidden.shape
    decoded = nearest_levels(answers, bits, eta)
    wrong = wrong_bits(decoded, hidden, bits)
    if sampled_from is not None:
        kind = "sampled rows"
        value = certificates.certified_from_sample(sampled_from, dv * bits, int((wrong > 0).sum()), m)
    else:
        trusted, trusted_levels = trusted_rows(answers, bits)
        gains = {
            "hard": certificates.hard(m * dv * bits, int(wrong.sum())),
            "erasure": certificates.erasure(dv * bits, wrong_bits(trusted_levels, hidden, bits), trusted),
            "log-loss": certificates.log_loss(predictor_gains(answers, trusted, hidden, bits)),
        }
        kind, value = max(gains, key=lambda name: gains[name]), certificates.certified(list(gains.values()))
    success = answered_rows(answers, hidden, bits, eta).double().mean().item()
    return Decoded(value, kind, int(wrong.sum()) / (m * dv * bits), success)
