"""Divergences in nats against an independent computation, and the rows that hold them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kvfloor.audit.nats import divergence, figures, read_text_rows, summaries, write_text_rows
from tests.audit.made_up import text_row
from tests.support import Draw


def test_two_distributions_by_hand() -> None:
    exact, method = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    found = figures([exact], [method], [torch.tensor([1])])
    assert found.kl[0] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-5)
    assert found.loss[0] == pytest.approx(-math.log(0.1), rel=1e-5)
    assert found.exact_loss[0] == pytest.approx(math.log(2), rel=1e-5)
    assert found.same_top == (1,)  # the first of equals


def test_figures_equal_their_definition(draw: Draw) -> None:
    p_logits, q_logits = draw(150, 33, dtype=torch.float32, scale=3.0), draw(150, 33, dtype=torch.float32, scale=3.0)
    q_logits[:, 5] = p_logits[:, 5] = -math.inf  # a token that neither can predict
    tokens = torch.arange(150) % 5
    cuts = [70, 80]
    found = figures(p_logits.split(cuts), q_logits.split(cuts), tokens.split(cuts))
    p, q = (np.exp(x.double().numpy()) for x in (p_logits, q_logits))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.nansum(p * np.log(p / q), 1)
    np.testing.assert_allclose(found.kl, kl, atol=1e-5)
    np.testing.assert_allclose(found.loss, -np.log(q[np.arange(150), tokens]), rtol=1e-5)
    np.testing.assert_allclose(found.exact_loss, -np.log(p[np.arange(150), tokens]), rtol=1e-5)
    assert found.same_top == tuple((p.argmax(1) == q.argmax(1)).astype(int))


def test_a_divergence_sums_up_all_tokens_of_all_texts() -> None:
    rows = [text_row(text="a", seed=1), text_row(text="b", seed=2, scored=300)]
    every = np.array([x for one in rows for x in one.kl])
    found = divergence(rows)
    assert found.tokens == 940
    assert found.kl == pytest.approx(every.mean())
    assert found.kl_low < found.kl < found.kl_high
    assert found.kl_median == pytest.approx(np.quantile(every, 0.5, method="lower"))
    assert found.kl_999 == pytest.approx(np.quantile(every, 0.999))
    assert found.same_top == pytest.approx((every < 0.05).mean())
    assert found.loss_change == pytest.approx(every.mean())
    assert found.perplexity_ratio == pytest.approx(math.exp(every.mean()))
    with pytest.raises(ValueError, match="one setting"):
        divergence([text_row("h2o@8"), text_row("h2o@16")])


def test_summaries_are_means_over_texts() -> None:
    rows = [text_row("exact"), text_row("h2o@8", "a"), text_row("h2o@8", "b", state_bytes=2000)]
    exact, h2o = summaries(rows)
    assert (exact.setting, h2o.setting) == ("exact", "h2o@8")
    assert (h2o.state_bytes, h2o.peak_state_bytes, h2o.exact_bytes) == (1500.0, 2000, 4000.0)
    assert exact.figures.kl == exact.figures.kl_high == 0


def test_rows_are_written_and_read_again(tmp_path: Path) -> None:
    rows = [text_row("exact"), text_row("h2o@8")]
    write_text_rows(tmp_path / "nats.jsonl", rows)
    assert read_text_rows(tmp_path / "nats.jsonl") == rows
    (tmp_path / "nats.jsonl").write_text('{"method": "exact"}\n')
    with pytest.raises(ValueError, match=r"line 1 is not a row .*missing fields"):
        read_text_rows(tmp_path / "nats.jsonl")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"continuation": 639}, "one figure for each of the 639"),
        ({"kl": (math.nan,) * 640}, "not finite"),
        ({"peak_state_bytes": 999}, "below the end"),
    ],
)
def test_impossible_rows_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(text_row(), **changes)  # type: ignore[arg-type]
