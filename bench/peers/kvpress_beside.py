"""Compare kvpress with kvfloor in one process, on the same model, prompts and kept tokens: `make peers`

The model is a random Llama of 4 layers, hidden 256, 8 heads on 2 kv heads. Prompts have 1,024 tokens unless stated
otherwise, half of the tokens are kept, one thread runs. The comparisons are:

padding   a row in a left-padded batch against the same row alone: the largest difference of the last logits, as a share
          of their spread. Zero means that the other row and the pads make no difference.
chunks    the prompt in chunks of 128: tokens kept afterwards, and the most tokens stored on the way.
turns     a second prompt of 512 tokens after the first: tokens kept.
heads     two budgets for the two kv heads, 768 and 256 of 1,024 tokens: bytes of the cache, against all tokens' bytes.
time      prefill with compression, and one decoded token: median milliseconds in turn, and kvfloor's over kvpress's.
Prints no figures while the tests of the timed code fail.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from kvpress import AdaKVPress, BasePress, KnormPress, SnapKVPress, StreamingLLMPress
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from kvfloor.hf import CompressedCache, prepare

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gate import green

TIMED = ["tests/hf/test_compressed.py", "tests/hf/test_generate.py", "tests/hf/test_budgets.py"]
PROMPT, KEPT, CHUNK, TURN, REPEATS, DECODED = 1024, 512, 128, 512, 15, 64
# Name -> the press, kvfloor's method that compresses at the prompt's end, and the one that compresses from its start.
PAIRS: dict[str, tuple[Callable[[], BasePress], str, str]] = {
    "key norm": (lambda: KnormPress(0.5), "knorm(prefill=dense)", "knorm"),
    "sinks and window": (lambda: StreamingLLMPress(0.5, n_sink=4), "sinks(4,prefill=dense)", "sinks(4)"),
    "SnapKV": (
        lambda: SnapKVPress(0.5, window_size=32, kernel_size=5),
        "snapkv(window=32,kernel=5)",
        "snapkv(window=32,kernel=5,decode=evict,prefill=stream)",
    ),
}


def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, pad_token_id=0, max_position_embeddings=8192,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def ids(batch: int, n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(2, 999, (batch, n), generator=torch.Generator().manual_seed(seed))


class Theirs:
    """Run a press on the stock model, and count the positions, which a compressed cache no longer gives."""

    def __init__(self, press: BasePress) -> None:
        self.net, self.press, self.cache, self.seen = STOCK, press, DynamicCache(), 0

    def feed(self, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        n = tokens.shape[1]
        at = torch.arange(self.seen, self.seen + n).unsqueeze(0)
        if mask is not None:
            at = (mask.cumsum(1) - 1).clamp_min(0)[:, -n:]
        self.seen += n
        arguments: dict[str, Any] = {"position_ids": at, "past_key_values": self.cache, "logits_to_keep": 1}
        if mask is not None:
            arguments["attention_mask"] = mask
        with self.press(self.net):
            return self.net(tokens, **arguments).logits[:, -1]

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        at = torch.tensor([[self.seen]])
        self.seen += 1
        return self.net(token, position_ids=at, past_key_values=self.cache).logits[:, -1]

    @property
    def stored(self) -> int:
        return max(layer.keys.shape[2] for layer in self.cache.layers)

    @property
    def nbytes(self) -> int:
        return sum(
            layer.keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
            for layer in self.cache.layers
        )


class Ours:
    """Run a compressed cache on the prepared model."""

    def __init__(self, method: str, **how: Any) -> None:
        self.net, self.cache = PREPARED, CompressedCache(PREPARED.config, method, **how)

    def feed(self, tokens: torch.Tensor, mask: torch.Tensor | None = None, seal: bool = True) -> torch.Tensor:
        arguments: dict[str, Any] = {"past_key_values": self.cache, "logits_to_keep": 1}
        if mask is not None:
            arguments |= {
                "attention_mask": mask,
                "position_ids": (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens.shape[1] :],
            }
        out = self.net(tokens, **arguments).logits[:, -1]
        if seal:
            self.cache.seal()
        return out

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        return self.net(token, past_key_values=self.cache).logits[:, -1]

    @property
    def stored(self) -> int:
        return max(max(entry["held"]) for entry in self.cache.report())

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes


def padding(make: Callable[[], Theirs | Ours]) -> str:
    """Compare the logits of a batch's padded row, after one more token, with those of the row alone."""
    tokens, short = ids(2, PROMPT), PROMPT * 3 // 4
    mask = torch.ones_like(tokens)
    mask[0, : PROMPT - short] = 0
    both, alone = make(), make()
    more = torch.cat([mask, torch.ones(2, 1, dtype=torch.int64)], 1)
    both.feed(tokens, mask)
    alone.feed(tokens[:1, PROMPT - short :])
    token = torch.tensor([[7], [8]])
    at = (more.cumsum(1) - 1)[:, -1:]
    if isinstance(both, Ours):
        batch = both.net(token, attention_mask=more, position_ids=at, past_key_values=both.cache).logits[:1, -1]
    else:  # no mask, as in kvpress's own pipeline: every slot that the press kept is attended to
        batch = both.net(token, position_ids=at, past_key_values=both.cache).logits[:1, -1]
    single = alone.decode(token[:1])
    return f"{float((batch - single).abs().max() / single.std()):.1e}"


def chunks(make: Callable[[], Theirs | Ours]) -> str:
    run, most = make(), 0
    for part in ids(1, PROMPT).split(CHUNK, 1):
        if isinstance(run, Ours):
            run.feed(part, seal=False)
        else:
            run.feed(part)
        most = max(most, run.stored)
    return f"{run.stored} kept, {most} at most"


def turns(make: Callable[[], Theirs | Ours]) -> str:
    run = make()
    run.feed(ids(1, PROMPT))
    run.decode(torch.tensor([[7]]))
    run.feed(ids(1, TURN, seed=2))
    return f"{run.stored} kept"


def times(theirs: Callable[[], Theirs], ours: Callable[[], Ours]) -> tuple[list[float], list[float]]:
    """Return the (prefill, decode) medians in milliseconds of both sides, which take turns."""
    spent: list[list[list[float]]] = [[[], []], [[], []]]
    prompt, token = ids(1, PROMPT), torch.tensor([[7]])
    for repeat in range(REPEATS + 1):
        runs: list[Theirs | Ours] = [theirs(), ours()]
        for which, run in enumerate(runs):
            begin = time.perf_counter()
            run.feed(prompt)
            if repeat:
                spent[which][0].append((time.perf_counter() - begin) * 1e3)
        for _ in range(DECODED // REPEATS + 1):
            for which, run in enumerate(runs):
                begin = time.perf_counter()
                run.decode(token)
                if repeat:
                    spent[which][1].append((time.perf_counter() - begin) * 1e3)
    medians = [[statistics.median(kind) for kind in side] for side in spent]
    return medians[0], medians[1]


def tried(call: Callable[[Any], str], make: Callable[[], Any]) -> str:
    """Return the text of a comparison, or the error that it raised."""
    try:
        with torch.no_grad():
            return call(make)
    except Exception as error:  # a peer may raise any error; the table shows it and goes on
        return f"{type(error).__name__}: {str(error).splitlines()[0][:40]}"


def main() -> int:
    if not green(*TIMED):
        return 1
    torch.set_num_threads(1)
    import kvpress

    version = getattr(kvpress, "__version__", "0.5.5")
    print(f"kvpress {version}, transformers {transformers.__version__}, torch {torch.__version__}, one thread")
    print(f"{'':<18}{'':<10}{'kvpress':>38}{'kvfloor':>38}")
    for name, (press, dense, stream) in PAIRS.items():
        theirs = lambda press=press: Theirs(press())  # noqa: E731
        pair = (theirs, lambda dense=dense: Ours(f"{dense}@{KEPT}"))
        bounded = (theirs, lambda stream=stream: Ours(f"{stream}@{KEPT}"))
        for title, call, sides in (("padding", padding, pair), ("chunks", chunks, bounded), ("turns", turns, bounded)):
            print(f"{name:<18}{title:<10}" + "".join(f"{tried(call, side):>38}" for side in sides))
        with torch.no_grad():
            medians = times(*pair)
        for kind, a, b in zip(("prefill", "decode"), *medians, strict=True):
            print(f"{name:<18}{kind:<10}{a:>35.2f} ms{b:>35.2f} ms   {b / a:.2f}x")
    full = Ours("exact")
    ragged, ada = Ours("knorm(prefill=dense,block=8)", budgets=[[768, 256]] * 4), Theirs(AdaKVPress(KnormPress(0.5)))
    with torch.no_grad():
        for run in (full, ragged, ada):
            run.feed(ids(1, PROMPT))
    cells = (f"{run.nbytes:,} of {2 * PROMPT * 4 * 2 * 32 * 4:,} bytes" for run in (ada, ragged))
    print(f"{'AdaKV, budgets=':<18}{'heads':<10}" + "".join(f"{cell:>38}" for cell in cells))
    return 0


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    STOCK, PREPARED = model(), prepare(model())
    sys.exit(main())
