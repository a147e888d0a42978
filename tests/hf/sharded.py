"""Use compressed caches on a sharded model, in one process per rank, and write down what was seen.

`test_ranks.py` runs `python -m torch.distributed.run --standalone --nproc-per-node 2 tests/hf/sharded.py FOLDER few`.
FOLDER has the models, and gets one file per rank. `few` or `more` is the group of caches to use.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM

from kvfloor.core.bounded import Bounded
from kvfloor.hf import CompressedCache, Eviction, opener, prepare, ranks

Arguments = dict[str, Any]
CACHES: dict[str, tuple[str, Arguments]] = {
    "random": ("random@40", {"seed": 5}),
    "bytes": ("h2o@256KiB", {}),
    "snapkv": ("snapkv@40", {}),
    "subgen_sketch": ("subgen_sketch(delta=0.5,t=4,s=16,radius=9)", {"seed": 5}),
    "by head": ("sinks(4)", {"budgets": [[40, 56, 40, 72], [48]], "pinned": [(10, 20)]}),
    "floor": ("window@48", {"allocate": "floor"}),
    "ranked": ("sinks(4)@40", {"positions": "cache"}),
    "exact": ("exact", {}),
}
FEW = ("random", "bytes", "by head")  # each has a mutant that must be noticed
MORE = tuple(name for name in CACHES if name not in FEW)
NEW = 12


def prompt() -> dict[str, torch.Tensor]:
    """Return two prompts of 100 and 120 tokens; the shorter one is left-padded."""
    ids = torch.randint(2, 90, (2, 120), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    return {"input_ids": ids, "attention_mask": mask}


def made(model: Any, name: str) -> CompressedCache:
    """Return the empty cache that CACHES describes under this name."""
    method, arguments = CACHES[name]
    if arguments.get("allocate") == "floor":
        arguments = {**arguments, "calibration": prompt()["input_ids"][1]}
    return CompressedCache(model, method, **arguments)


def said(model: Any, cache: CompressedCache) -> list[list[int]]:
    """Return the tokens that the model generates after the prompt."""
    out = model.generate(**prompt(), past_key_values=cache, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    return out[:, 120:].tolist()


def went_on(model: Any, cache: CompressedCache) -> list[int]:
    """Return the likeliest tokens after one more token was fed to a filled cache."""
    slots = cache.get_seq_length() + 1
    mask = torch.ones(2, slots, dtype=torch.int64)
    mask[0, :20] = 0
    ids = torch.full((2, 1), 7)
    with torch.inference_mode():
        where = (mask.sum(1, keepdim=True) - 1).long()
        return (
            model(ids, attention_mask=mask, position_ids=where, past_key_values=cache).logits[:, -1].argmax(-1).tolist()
        )


def figures(model: Any, name: str) -> dict[str, Any]:
    """Return what a cache says, keeps and reports after a conversation; collective on a sharded model."""
    cache, left = made(model, name), []

    def on_evict(event: Eviction) -> None:
        for item, head, position in zip(event.item, event.head, event.position, strict=True):
            left.append((event.layer, int(item), int(head), int(position)))

    if isinstance(cache.method, Bounded):
        cache.call_on_evict(on_evict)
    asked: list[str] = []
    gather = ranks.Ranks.gather
    with patch.object(ranks.Ranks, "gather", lambda self, what, mine: asked.append(what) or gather(self, what, mine)):
        tokens = said(model, cache)
    return {
        "asked": asked,
        "tokens": tokens,
        "left": sorted(left),
        "nbytes": cache.nbytes,
        "peak": cache.peak_nbytes,
        "read": cache.bytes_read,
        "kinds": cache.bytes,
        "report": cache.report(),
    }


def mutant(name: str) -> Any:
    """Return a context in which a sharded cache has the fault that the check of this cache is there for."""
    if name == "random":  # rows are numbered, and so seeded, by the heads of this rank

        def local(ranks: Any, batch: int, kv_heads: int) -> torch.Tensor:
            return torch.arange(batch * kv_heads).view(batch, ranks.count, -1)[:, 0].flatten()

        return patch.object(opener, "own_rows", local)
    if name == "bytes":  # each rank has the whole budget
        sized = opener.Opening._sized

        def by_rank(self: Any, spec: Any, place: int, batch: int, kv_heads: int, g: int) -> Any:
            mine = spec.select(torch.arange(spec.rows // self.ranks.count))
            return sized(self, mine, place, batch, kv_heads // self.ranks.count, g)

        return patch.object(opener.Opening, "_sized", by_rank)
    return patch.object(ranks.Ranks, "gather", lambda self, what, mine: [mine] * self.count)  # one rank's report


def refused(call: Callable[[], Any]) -> str:
    """Return the line with which a call is refused."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def loaded(folder: Path) -> Any:
    """Return the model in a folder, sharded over all ranks if there are several."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    more: dict[str, Any] = {}
    if count > 1:
        from transformers.distributed.configuration_utils import DistributedConfig

        more["distributed_config"] = DistributedConfig(tp_size=count)
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", **more).eval()


def _saved(model: Any, folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Save caches, load them again and those of the unsharded model, and go on with each."""
    found: dict[str, Any] = {}
    for name in names:
        cache = made(model, name)
        said(model, cache)
        cache.save(folder / f"sharded {name}")
        for written in ("sharded", "whole"):
            again = CompressedCache.load(folder / f"{written} {name}", model)
            before = again.nbytes, again.peak_nbytes
            found[f"{written} {name}"] = {"bytes": before, "next": went_on(model, again), "report": again.report()}
        found[f"unsaved {name}"] = {"next": went_on(model, cache)}
    return found


def _lone(folder: Path, rank: int) -> str:
    """Return how a call is refused that rank 0 makes while rank 1 does something else."""
    with patch.object(ranks, "WAIT_SECONDS", 2):
        other = ranks.Ranks(rank, 2, ranks._waiting.__wrapped__((0, 1)))
        done = folder / "lone"
        if rank == 0:
            told = refused(lambda: other.gather("cache.nbytes", 1))
            done.touch()
            return told
    for _ in range(600):
        if done.exists():
            break
        time.sleep(0.1)
    return ""


def _refusals(model: Any, old: Any, folder: Path, rank: int) -> dict[str, str]:
    cache = made(model, "exact")
    said(model, cache)
    return {
        "uneven": refused(lambda: prepare(loaded(folder / "uneven"))),
        "latent": refused(lambda: prepare(loaded(folder / "latent"))),
        "old configuration": refused(lambda: said(model, CompressedCache(old, "exact"))),
        "other calls": refused(lambda: cache.nbytes if rank == 0 else cache.report()),
        "one rank's file": refused(lambda: CompressedCache.load(folder / ("none" if rank else "whole exact"), model)),
        "pickle": refused(lambda: pickle.dumps(cache)),
        "lone": _lone(folder, rank),
    }


def main(folder: Path, group: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    unprepared = loaded(folder / "llama")
    old = unprepared.config
    model, names = prepare(unprepared), FEW if group == "few" else MORE
    found: dict[str, Any] = {"figures": {name: figures(model, name) for name in names}}
    found["saved"] = _saved(model, folder, names)
    if group == "few":
        found["mutants"] = {}
        for name in names:
            with mutant(name):
                found["mutants"][name] = figures(model, name)
        found["config"] = CompressedCache(model.config, "random@40", seed=5).ranks.count
        found["gathered keys"] = figures(prepare(loaded(folder / "olmo2")), "random")
        found["sliding"] = figures(prepare(loaded(folder / "gemma3")), "random")
        found["refused"] = _refusals(model, old, folder, rank)
    torch.save(found, folder / f"{group} {rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
