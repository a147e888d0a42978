"""The parts of verified decoding against plain oracles: the rule of acceptance, the window's memory, both caches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfloor import Spec, parse
from kvfloor.hf import generate_verified, prepare
from kvfloor.hf.verified import rule
from kvfloor.hf.verified.both import ExactAndBounded
from kvfloor.hf.verified.choosing import Choosing
from kvfloor.hf.verified.window import WindowTokens
from survey.tiny import tiny_model

# ---- the law of sampled tokens ---------------------------------------------------------------------------------


def z_of(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Return how many standard deviations the counts lie from their law, by Pearson's chi-square.

    It is inf if an outcome of probability 0 was counted. Outcomes expected less than 8 times count as one. The
    statistic is turned to a normal one (Wilson and Hilferty).
    """
    n = counts.total()
    if any(law.get(outcome, 0.0) == 0.0 for outcome in counts):
        return math.inf
    cells = [(counts[outcome], n * p) for outcome, p in law.items() if n * p >= 8]
    rare = [(counts[outcome], n * p) for outcome, p in law.items() if n * p < 8]
    if rare:
        cells.append((sum(seen for seen, _ in rare), sum(due for _, due in rare)))
    cells = [(seen, due) for seen, due in cells if due >= 1]
    freedom = len(cells) - 1
    chi = sum((seen - due) ** 2 / due for seen, due in cells)
    return ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def law_of(model: PreTrainedModel, prompt: list[int], new: int, choosing: Choosing) -> dict[tuple[int, ...], float]:
    """Return the probability of every continuation of `new` tokens, by plain forwards without a cache."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(new):
        longer: dict[tuple[int, ...], float] = {}
        paths = [path for path, p in law.items() if p > 0]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *path] for path in paths])).logits[:, -1:]
        for path, row in zip(paths, choosing.probabilities(logits.float())[:, 0], strict=True):
            longer |= {(*path, token): law[path] * p for token, p in enumerate(row.tolist()) if p > 0}
        law = longer
    return law


@pytest.mark.parametrize(("changed", "instead"), [(None, None), ("always", None), ("residual", lambda p, q: p)])
def test_the_rule_gives_the_targets_law(changed: str | None, instead: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two drafts of four tokens, 40,000 times; targets depend on the drafts before them. The mutants are far off."""
    make, n = torch.Generator().manual_seed(0), 40_000
    target, draft = (torch.softmax(torch.randn(5, 4, generator=make), -1) for _ in range(2))  # by the token before
    drafts = torch.zeros(n, 3, dtype=torch.int64)  # the token before them is 0
    for i in range(2):
        drafts[:, i + 1] = rule.draw(draft[drafts[:, i]], make)
    accept = accept_always if changed == "always" else rule.sampled
    if changed == "residual":
        monkeypatch.setattr(rule, "residual", instead)
    count, following = accept(drafts[:, 1:], draft[drafts[:, :2]], target[drafts], make)
    said = [
        [*row[:count], token]
        for row, count, token in zip(drafts[:, 1:].tolist(), count.tolist(), following.tolist(), strict=True)
    ]
    first = z_of(Counter((row[0],) for row in said), {(a,): p for a, p in enumerate(target[0].tolist())})
    likely = max(range(4), key=lambda a: sum(row[0] == a for row in said if len(row) > 1))
    second = z_of(
        Counter((row[1],) for row in said if len(row) > 1 and row[0] == likely),
        {(a,): p for a, p in enumerate(target[likely].tolist())},
    )
    third = Counter(len(row) for row in said)
    if changed is None:
        assert abs(first) < 4 and abs(second) < 4 and len(third) == 3
    else:
        assert first > 8 and second > 8


def drawn(model: PreTrainedModel, prompt: list[int], new: int, n: int, **sampling: Any) -> Counter[tuple[int, ...]]:
    """Return the counts of n drawn continuations of `new` tokens."""
    given = {"draft": 2, "max_new_tokens": new, "eos_token_id": (), "do_sample": True, "seed": 1}
    ids = generate_verified(model, torch.tensor([prompt] * n), "window(block=4)@4", **given, **sampling)
    assert isinstance(ids, Tensor)
    return Counter(map(tuple, ids[:, len(prompt) :].tolist()))


def accept_always(
    drafts: Tensor, drawn_from: Tensor, target: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    del drawn_from
    return torch.full((len(drafts),), drafts.shape[1]), rule.draw(target[:, -1], generator)


def small() -> PreTrainedModel:
    """Build a model of five tokens, with peaked attention and logits, whose bounded cache predicts otherwise."""
    return prepare(tiny_model("llama", vocab_size=5, eos_token_id=4))


SMALL = [1, 2, 3, 0, 2, 2, 4, 1, 3, 3, 0, 1]


def test_sampled_tokens_have_the_exact_caches_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """All 125 continuations of three tokens, enumerated; drafts that are accepted unseen are far off."""
    model, warm = small(), {"temperature": 2.0}
    law = law_of(model, SMALL, 3, Choosing(**warm))
    assert math.isclose(sum(law.values()), 1, rel_tol=1e-4)
    assert abs(z_of(drawn(model, SMALL, 3, 2000, **warm), law)) < 4
    monkeypatch.setattr(rule, "sampled", accept_always)
    assert z_of(drawn(model, SMALL, 3, 1000, **warm), law) > 6


def test_the_built_in_models_distribution_is_kept(builtin: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = builtin
    prompt = tokenizer("the mayor keeps the key under the red mat . the mayor keeps").input_ids
    warm = {"temperature": 3.0, "top_k": 6, "top_p": 0.9}
    law = law_of(model, prompt, 3, Choosing(**warm))
    assert abs(z_of(drawn(model, prompt, 3, 2000, **warm), law)) < 4
    monkeypatch.setattr(rule, "sampled", accept_always)
    assert z_of(drawn(model, prompt, 3, 1000, **warm), law) > 6


def test_greedy_acceptance_ends_at_the_first_other_choice() -> None:
    scores = torch.zeros(3, 4, 5)
    for row, best in enumerate(([1, 2, 3, 4], [1, 0, 3, 2], [4, 2, 3, 1])):
        scores[row, range(4), best] = 1.0
    count, following = rule.greedy(torch.tensor([[1, 2, 3]] * 3), scores)
    assert count.tolist() == [3, 1, 0] and following.tolist() == [4, 0, 4]


def test_a_draft_as_likely_as_its_target_is_accepted() -> None:
    p = torch.softmax(torch.randn(50, 3, 9, generator=torch.Generator().manual_seed(0)), -1)
    drafts = torch.multinomial(p[:, :2].flatten(0, 1), 1).view(50, 2)
    count, following = rule.sampled(drafts, p[:, :2], p, torch.Generator().manual_seed(1))
    assert count.tolist() == [2] * 50 and following.shape == (50,)


def test_a_residual_of_nothing_is_the_target() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.8, 0.0]]), torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0]])
    assert torch.allclose(rule.residual(p, q), torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.3, 0.0]]))


# ---- memories --------------------------------------------------------------------------------------------------

ROWS, GROUP, WIDTH = 3, 2, 8


def stream(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    q = torch.randn(ROWS, GROUP, n, WIDTH, generator=make, dtype=torch.float64)
    k, v = (torch.randn(ROWS, n, WIDTH, generator=make, dtype=torch.float64) for _ in range(2))
    return q, k, v


def spec() -> Spec:
    return Spec(ROWS, WIDTH, WIDTH, 0.5, dtype=torch.float64)


def plain(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """Return causal attention (g, n, dv) of q (g, n, d) over one row's k, v, whose newest n tokens are its own."""
    n, s = q.shape[1], k.shape[0]
    own = torch.arange(s - n, s).unsqueeze(1)
    slot = torch.arange(s)
    seen = (slot <= own) if window is None else (slot <= own) & (slot > own - window)
    logits = (q @ k.T * 0.5).masked_fill(~seen, -torch.inf)
    return torch.softmax(logits, -1) @ v


@pytest.mark.parametrize("window", [1, 2, 5, 300])
def test_a_window_is_plain_windowed_attention_of_every_row(window: int) -> None:
    """A padded prompt, then rounds of drafts and verifications of which each row keeps another number."""
    q, k, v = stream(700)
    present = torch.rand(ROWS, 400, generator=torch.Generator().manual_seed(3)) < 0.9
    tokens = WindowTokens(spec(), window)
    out = tokens.take(
        q[:, :, :400], k[:, :400].masked_fill(~present.unsqueeze(-1), torch.nan), v[:, :400], present
    ).mean
    held = [[(k[row, i], v[row, i]) for i in range(400) if present[row, i]] for row in range(ROWS)]
    for row in range(ROWS):
        keys, values = (torch.stack(x) for x in zip(*held[row], strict=True))
        expected = plain(q[row, :, :400][:, present[row]], keys, values, window)
        assert torch.allclose(out[row][:, present[row]], expected) and not out[row][:, ~present[row]].any()
    at = 400
    for counts in ((3, 1, 4), (1, 1, 1), (4, 4, 2)):
        new = slice(at, at + 4)
        for n in (1, 2, 3):  # drafts: the queries of the last uncommitted token alone
            drafted = tokens.attend(q[:, :, at + n - 1 : at + n], k[:, at : at + n], v[:, at : at + n]).mean
            for row in range(ROWS):
                keys, values = _beside(held[row], k[row, at : at + n], v[row, at : at + n])
                assert torch.allclose(drafted[row], plain(q[row, :, at + n - 1 : at + n], keys, values, window))
        out = tokens.attend(q[:, :, new], k[:, new], v[:, new]).mean
        for row, count in enumerate(counts):
            keys, values = _beside(held[row], k[row, new], v[row, new])
            assert torch.allclose(out[row], plain(q[row, :, new], keys, values, window))
            if window > 2:
                assert not torch.allclose(out[row], plain(q[row, :, new], keys, values, window - 1))
            held[row] += [(k[row, at + i], v[row, at + i]) for i in range(count)]
        kept = torch.arange(4) < torch.tensor(counts).unsqueeze(1)
        tokens.commit(q[:, :, new], k[:, new], v[:, new], None if bool(kept.all()) else kept)
        at += 4
    assert tokens.held.tolist() == [min(window - 1, len(row)) for row in held]


def _beside(held: list[tuple[Tensor, Tensor]], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = (torch.stack(x) for x in zip(*held, strict=True))
    return torch.cat([keys, k]), torch.cat([values, v])


def test_uncommitted_tokens_are_read_and_change_nothing() -> None:
    q, k, v = stream(40)
    both = ExactAndBounded(parse("exact").open(spec()), parse("h2o(recent=2,block=1)@8").open(spec()))
    both.take(q[:, :, :30], k[:, :30], v[:, :30], None)
    both.seal()
    before = both.exact.to_bytes(), both.bounded.to_bytes()
    out = both.attend(q[:, :, 30:35], k[:, 30:35], v[:, 30:35], drafting=False).mean
    for row in range(ROWS):
        assert torch.allclose(out[row], plain(q[row, :, 30:35], k[row, :35], v[row, :35]))
    slots = both.bounded.slots
    assert slots is not None
    held = slots.positions(None, 8)
    for n in (1, 3):
        last = 30 + n
        out = both.attend(q[:, :, last - 1 : last], k[:, 30:last], v[:, 30:last], drafting=True).mean
        for row in range(ROWS):
            index = [*held[row].tolist(), *range(30, last)]
            assert torch.allclose(out[row], plain(q[row, :, last - 1 : last], k[row, index], v[row, index]))
    assert before == (both.exact.to_bytes(), both.bounded.to_bytes())


@pytest.mark.parametrize("method", ["snapkv(window=4,block=4)@12", "sinks(2,block=4)@12", "h2o(recent=2,block=4)@12"])
def test_tokens_whose_queries_do_not_matter_are_appended_without_them(method: str) -> None:
    """The same tokens are held as if every token had come with its query."""
    q, k, v = stream(60)
    both, own = ExactAndBounded(parse("exact").open(spec()), parse(method).open(spec())), parse(method).open(spec())
    asked: list[int] = []
    step: Callable[..., Any] = both.bounded.step
    both.bounded.step = lambda q, *rest: asked.append(q.shape[2]) or step(q, *rest)  # type: ignore[method-assign]
    both.take(q[:, :, :50], k[:, :50], v[:, :50], None)
    both.seal()
    own.step(q[:, :, :50], k[:, :50], v[:, :50])
    own.seal()
    both.commit(q[:, :, 50:], k[:, 50:], v[:, 50:], None)
    own.step(q[:, :, 50:], k[:, 50:], v[:, 50:])
    assert both.bounded.slots is not None and own.slots is not None
    width = int(own.held.max())
    assert torch.equal(both.bounded.slots.positions(None, width), own.slots.positions(None, width))
    assert asked == {"snapkv": [8], "sinks": [], "h2o": [50, 10]}[method.partition("(")[0]]
