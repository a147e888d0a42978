"""Record the queries, keys and values of real models on texts, one forward a text, and keep them on disk.

A stream is one kv head of one layer on one text: its keys, its values and the queries of its group's heads, after RoPE.
In shapes, rows are kv heads, g query heads per kv head, n tokens, d the width of a key and of a value.

A recording has all layers in float32, 1 GB for SmolLM2 at 8,192 tokens, and is kept in the folder `recorded` beside the
converted models (`kvfloor.models.gguf.cache_folder`). Since attention is causal, the first tokens of a long recording
are the recording of a shorter text. Delete the folder to record again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvfloor import Spec
from kvfloor.audit.chat import Template
from kvfloor.audit.texts import GENERATED, SHIPPED, excerpts
from kvfloor.core.bounded import BoundedState
from kvfloor.core.method import Method
from kvfloor.hf import prepare
from kvfloor.hf.layers import watched_cache
from kvfloor.hf.recording import Recorder
from kvfloor.models import load
from kvfloor.models.gguf import cache_folder
from kvfloor.tasks.turns import TURNS_TASK

SYNTHETIC = "synthetic"
CHAT = "chat"
"""Name of a text that is a conversation: an essay that hides numbers, and at its end the question for one of them."""


@dataclass(frozen=True)
class Streams:
    """Hold streams: q (rows, g, n, d), k and v (rows, n, d), the factor `scale` on q.k, and what the rows are.

    places has the (layer, kv head) of each row, texts the name of its text.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    places: tuple[tuple[int, int], ...] = ()
    texts: tuple[str, ...] = ()

    def spec(self, **changed: Any) -> Spec:
        """Return the spec of a state for these rows; `changed` are further fields of it."""
        rows, _, d = self.k.shape
        given = {"dtype": self.k.dtype, "places": self.places or None} | changed
        return Spec(rows, d, self.v.shape[2], self.scale, **given)

    def asked(self, last: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the queries of the `last` tokens, (rows, g * last, d), and the keys and values of all tokens before.

        So every query may attend to all of these keys, and none has its own token among them.
        """
        return self.q[:, :, -last:].flatten(1, 2), self.k[:, :-last], self.v[:, :-last]


@dataclass(frozen=True)
class RealKeys:
    """Name a source of streams: a model and the first `tokens` tokens of each of `texts`; `recorded` tokens on disk.

    The text `CHAT` has at most `recorded` tokens, and its question is at its end, so `tokens` must not be fewer.
    """

    name: str
    model: str
    texts: tuple[str, ...]
    tokens: int
    recorded: int

    def together(self, layers: int | None = None) -> Streams:
        """Return the rows of all texts and of `layers` layers at once."""
        parts = list(self.streams(layers))
        q, k, v = (torch.cat([getattr(part, name) for part in parts]) for name in "qkv")
        places, texts = (sum((getattr(part, name) for part in parts), ()) for name in ("places", "texts"))
        return Streams(q, k, v, parts[0].scale, places, texts)

    def streams(self, layers: int | None = None) -> Iterator[Streams]:
        """Yield the streams, text by text and layer by layer: `layers` layers from the first to the last, None: all."""
        for text in self.texts:
            path = _recording(self.model, text, self.recorded)
            with safe_open(path, framework="pt") as file:
                scale = float(file.metadata()["scale"])
                recorded = sorted(int(name.split(".")[0]) for name in file.keys() if name.endswith(".q"))  # noqa: SIM118
                for layer in (recorded[i] for i in spaced(len(recorded), layers or len(recorded))):
                    q = file.get_slice(f"{layer}.q")[:, :, : self.tokens]
                    k, v = (file.get_slice(f"{layer}.{name}")[:, : self.tokens] for name in "kv")
                    places = tuple((layer, head) for head in range(len(k)))
                    yield Streams(q, k, v, scale, places, (text,) * len(k))


REAL = (
    RealKeys("built-in 2k", "builtin", GENERATED, 2048, 2048),
    RealKeys("SmolLM2 2k", "smollm2", SHIPPED, 2048, 8192),
    RealKeys("SmolLM2 8k", "smollm2", SHIPPED, 8192, 8192),
)
KEYS = (SYNTHETIC, *(source.name for source in REAL))


def after(method: Method, streams: Streams, last: int) -> BoundedState:
    """Return an evicting method's state after all tokens but the `last` ones.

    Queries come with the tokens only if the policy learns from attention: without them the same tokens are held.
    """
    _, k, v = streams.asked(last)
    state = method.open(streams.spec())
    assert isinstance(state, BoundedState)
    if state.method.policy.wants_weights:
        state.step(streams.q[:, :, :-last], k, v)
    else:
        state.append(k, v)
    return state


def chosen(description: str | None, available: Sequence[str] = KEYS) -> tuple[str, ...]:
    """Read the option --keys of a script: the names of the sources of keys to measure, with commas; all by default."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--keys", default=",".join(available), help=f"of {', '.join(available)}; with commas")
    names = tuple(parser.parse_args().keys.split(","))
    for name in names:
        if name not in available:
            parser.error(f"no keys {name!r}; give some of {', '.join(available)}")
    return names


def real(name: str) -> RealKeys:
    """Return the source of real keys with this name."""
    return next(source for source in REAL if source.name == name)


def spaced(count: int, wanted: int) -> list[int]:
    """Return `wanted` of the numbers 0 .. count - 1, evenly spaced, the first and the last included."""
    if wanted >= count:
        return list(range(count))
    return [round(i * (count - 1) / max(1, wanted - 1)) for i in range(wanted)]


def record(model_name: str, text: str, tokens: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Run a model over the first tokens of a text; return "LAYER.q", "LAYER.k", "LAYER.v" by name, and what they are.

    Shapes are those of `Streams`. Raises ValueError for a text of fewer tokens; the text `CHAT` is as long as it fits.
    """
    model, tokenizer = load(model_name)
    if text == CHAT:
        ids = conversation(tokenizer, tokens)
    else:
        (excerpt,) = excerpts([text], [tokens], 0, lambda given: tokenizer(given).input_ids)
        ids = excerpt.context
    prepare(model)
    cache, layers = watched_cache(model.config)
    seen = Recorder(layers)
    with torch.inference_mode():
        model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1)
    found: dict[str, Tensor] = {}
    scale = 0.0
    for layer in layers:
        one = seen.of(layer.index)
        assert one.softcap is None
        scale = one.scale
        found |= {f"{layer.index}.{name}": x.contiguous() for name, x in zip("qkv", one.by_row, strict=True)}
    digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
    return found, {"scale": repr(scale), "layers": str(len(layers)), "ids_sha256": digest}


def conversation(tokenizer: Any, tokens: int) -> list[int]:
    """Return token ids, at most `tokens`, of the text `CHAT` up to where the model is to name the number."""
    template = Template(tokenizer)
    sample = TURNS_TASK.generate(0, 0, tokens, count=template.count)
    return tokenizer("".join(template.first(sample.context, sample.questions[0])), add_special_tokens=False).input_ids


def _recording(model_name: str, text: str, tokens: int) -> Path:
    """Return the file of a recording, which is made first if it is missing."""
    path = cache_folder() / "recorded" / f"{model_name}-{text}-{tokens}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors, about = record(model_name, text, tokens)
        save_file(tensors, path.with_suffix(".part"), metadata=about)
        path.with_suffix(".part").rename(path)
    return path
