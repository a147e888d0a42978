"""Texts read under a method, against the model's own attention with the same tokens hidden."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvfloor.audit.nats import TextCell, figures
from kvfloor.audit.plan import settings
from kvfloor.audit.reading import Reader, text_row
from kvfloor.audit.texts import GENERATED, SHIPPED, Excerpt, check_scored, excerpts, text_of
from kvfloor.hf import prepare
from kvfloor.models import load
from kvfloor.tasks.task import builtin_count

CONTEXT, SCORED, KEPT = 90, 140, 40


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load()


@pytest.fixture(scope="module")
def excerpt(loaded: tuple[Any, Any]) -> Excerpt:
    return excerpts(GENERATED[:1], [CONTEXT], SCORED, lambda text: loaded[1](text).input_ids)[0]


def test_exact_has_no_divergence_and_a_window_that_of_a_masked_model(loaded: tuple[Any, Any], excerpt: Excerpt) -> None:
    model = prepare(loaded[0])
    plan = settings([f"window(block=1)@{KEPT}"], ["16"])
    reader = Reader(model, 0)
    reference = reader.reference(excerpt)
    reads = {one.text: (one, reader.read(one.method, excerpt, reference)) for one in plan}
    sizes = reads["exact"][1].state_bytes, reads["exact"][1].state_16_bit_bytes
    found = {text: text_row(one, excerpt, read, sizes, 49) for text, (one, read) in reads.items()}
    assert max(found["exact"].kl) < 1e-6
    plain, _ = load()
    ids = torch.tensor([excerpt.context + excerpt.continuation])
    place = torch.arange(ids.shape[1])
    behind = place.unsqueeze(1) - place  # a query's distance to a key
    seen = (behind >= 0) & (behind <= KEPT)  # a token is evicted after the KEPT-th token behind it was answered
    with torch.inference_mode():
        exact = plain(ids).logits[0, CONTEXT - 1 : -1]
        masked = plain(ids, attention_mask=seen[None, None]).logits[0, CONTEXT - 1 : -1]
    wanted = figures([exact], [masked], [ids[0, CONTEXT:]])
    window = found[f"window(block=1)@{KEPT}"]
    assert max(wanted.kl) > 0.1
    torch.testing.assert_close(torch.tensor(window.kl), torch.tensor(wanted.kl), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(torch.tensor(window.loss), torch.tensor(wanted.loss), atol=1e-4, rtol=1e-4)
    assert window.state_bytes < window.exact_bytes < 2 * window.exact_16_bit_bytes  # positions do not shrink
    assert window.budget_tokens == KEPT


def test_texts_are_cut_into_context_and_continuation() -> None:
    found = excerpts(["speech"], [3, 5], 4, lambda text: list(range(20)))
    assert [(one.context, one.continuation) for one in found] == [
        ([0, 1, 2], [3, 4, 5, 6]),
        ([0, 1, 2, 3, 4], [5, 6, 7, 8]),
    ]
    assert found[0].cell == TextCell("speech", 3, 4)
    with pytest.raises(ValueError, match=r"'speech' has 8 tokens; .* need 9"):
        excerpts(["speech"], [3, 5], 4, lambda text: list(range(8)))


def test_too_few_scored_tokens_are_refused_before_the_model_is_loaded() -> None:
    check_scored(3, 192, limited=False)
    check_scored(0, 1, limited=False)
    with pytest.raises(ValueError, match=r"--continuation 128: .*on 3 texts.* at least 192"):
        check_scored(3, 128, limited=False)
    with pytest.raises(ValueError, match=r"one text must do alone.* at least 512"):
        check_scored(3, 511, limited=True)


def test_texts_come_from_the_package_the_generator_or_a_file(tmp_path: Any) -> None:
    assert all(len(text_of(name, 1)) > 40_000 for name in SHIPPED)
    assert builtin_count()(text_of(GENERATED[1], 700)) >= 700
    assert text_of(GENERATED[1], 300) != text_of(GENERATED[2], 300)
    (tmp_path / "mine.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert text_of(str(tmp_path / "mine.txt"), 1) == "one\ntwo\n"
    (tmp_path / "wide.txt").write_text("one", encoding="utf-16")
    with pytest.raises(ValueError, match="as UTF-8"):
        text_of(str(tmp_path / "wide.txt"), 1)
    with pytest.raises(ValueError, match=r"no text 'novle': give a file, or one of speech, novel"):
        text_of("novle", 1)
    (tmp_path / "speech.txt").write_text("another")
    with pytest.raises(ValueError, match="two of the texts are named 'speech'"):
        excerpts(["speech", str(tmp_path / "speech.txt")], [1], 1, lambda text: [])
