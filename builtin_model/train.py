"""Train the built-in model: `python -m builtin_model.train --out DIR --seed 0 --steps N --decay M`.

The seed and the step number decide everything, so a run that was stopped and resumed equals one that was not. A run may
be resumed with another number of steps: up to the start of the decay both runs are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from builtin_model.architecture import small_llama
from builtin_model.curriculum import EXERCISES, LENGTHS, Curriculum
from builtin_model.examples import Batch, batch
from builtin_model.forward import answer_logits
from builtin_model.initialise import initialise
from kvfloor.tasks import TASKS
from kvfloor.tasks.randomness import stream
from kvfloor.tasks.tokenizer import build_tokenizer

BF16_FROM = 256  # tokens from which bfloat16 products are faster than float32 on a CPU that has them
STRETCH_FROM, STRETCH = 128, 0.5  # this share of sequences of so many tokens get gaps in positions: cheap distance
TRAINING_SEED = 1_000_000_000  # added to the seed: no training sample is an evaluation sample


@dataclass(frozen=True)
class ModelRecipe:
    """Hold everything that decides the weights."""

    seed: int = 0
    steps: int = 9500
    decay: int = 2500
    warmup: int = 100
    lr: float = 2e-3
    tokens: int = 2048
    longest: int = LENGTHS[-1]
    layers: int = 4
    hidden: int = 128
    focus: float = 1.5
    share: float = 0.7
    floor: int = 3072  # from step `lift` on, every task has reached at least this context length
    lift: int = 6000
    tasks: str = ",".join(TASKS)

    def rate(self, step: int) -> float:
        """Return the learning rate: linear warm-up, constant, linear decay to zero over the last `decay` steps."""
        left = (self.steps - step) / self.decay if self.decay else 1.0
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


class Trainer:
    """Hold the model, the optimiser and the curriculum, and train, save and resume them."""

    def __init__(self, recipe: ModelRecipe) -> None:
        torch.manual_seed(recipe.seed)
        self.recipe = recipe
        self.tokenizer = build_tokenizer()
        self.model = new_model(self.tokenizer, recipe)
        decayed = [p for p in self.model.parameters() if p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)
        self.curriculum = Curriculum(recipe.longest, recipe.focus, recipe.share, recipe.tasks.split(","))
        self.stages = [(0, " ".join(flags(recipe)))]
        self.done = 0
        self.seen = 0
        self.seconds = 0.0

    def step(self) -> float:
        """Make one optimiser step, and return the weighted mean loss per answer token (nats)."""
        started = time.perf_counter()
        recipe, n = self.recipe, self.done
        rng = stream("training", recipe.seed, n)
        if n >= recipe.lift:
            self.curriculum.raise_to(recipe.floor)
        length, examples = self.curriculum.draw(recipe.seed + TRAINING_SEED, n, rng, recipe.tokens)
        stretched = length >= STRETCH_FROM and rng.random() < STRETCH
        data = batch(examples, recipe.longest + recipe.longest // 8, rng if stretched else None)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate(n)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=length >= BF16_FROM):
            logits = answer_logits(self.model, data.ids, data.positions, data.where)
        losses = F.cross_entropy(logits.transpose(1, 2), data.targets, reduction="none")
        loss = (losses * data.weights).sum() / data.weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for task, right in answers(logits, data):
            self.curriculum.record(task, length, right)
        self.done += 1
        self.seen += data.ids.numel()
        self.seconds += time.perf_counter() - started
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write a checkpoint and rename it into place, so that a run stopped here leaves a whole one."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "curriculum": self.curriculum.state(),
            "progress": (self.done, self.seen, self.seconds),
            "stages": self.stages,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def resume(self, path: Path) -> None:
        """Load a checkpoint, and continue its run."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.curriculum.restore(state["curriculum"])
        self.done, self.seen, self.seconds = state["progress"]
        self.stages = [*state["stages"], (self.done, self.stages[0][1])]

    def command(self) -> str:
        """Return the commands that make these weights, in order; a resumed run gives the steps it was stopped at."""
        ends = [start for start, _ in self.stages[1:]] + [self.done]
        starts = ["python -m builtin_model.train --out OUT"] + ["python -m builtin_model.train --out OUT --resume"] * (
            len(ends) - 1
        )
        return " && ".join(
            f"{start} {given} --stop {end}" for start, (_, given), end in zip(starts, self.stages, ends, strict=True)
        )

    def export(self, out: Path) -> None:
        """Write the model, the tokenizer and `training.json` in the layout of transformers."""
        self.model.save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        facts = {
            "command": self.command(),
            "seed": self.recipe.seed,
            "steps": self.done,
            "tokens": self.seen,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "wall_minutes": round(self.seconds / 60, 1),
            "torch": torch.__version__,
        }
        (out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


def new_model(tokenizer: Any, recipe: ModelRecipe) -> LlamaForCausalLM:
    """Return a newly initialised model; the caller seeds torch."""
    config = small_llama(
        len(tokenizer),
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        layers=recipe.layers,
        hidden=recipe.hidden,
    )
    model = LlamaForCausalLM(config)
    initialise(model)
    return model


def answers(logits: torch.Tensor, data: Batch) -> list[tuple[str, bool]]:
    """Return (task, right) of every answer: right if each of its tokens is the most likely one."""
    hits = logits.argmax(-1) == data.targets
    return [(task, bool(hits[i, a:b].all())) for i, row in enumerate(data.spans) for task, a, b in row]


def flags(recipe: ModelRecipe) -> list[str]:
    """Return the command-line flags that give this recipe."""
    names = (
        "seed",
        "steps",
        "decay",
        "warmup",
        "lr",
        "tokens",
        "longest",
        "layers",
        "hidden",
        "focus",
        "share",
        "floor",
        "lift",
        "tasks",
    )
    return [f"--{name} {getattr(recipe, name)}" for name in names]


def main() -> None:
    """Train from the command line."""
    usual = ModelRecipe()
    parser = argparse.ArgumentParser(prog="python -m builtin_model.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and its checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (results depend on it)")
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    for name in ("seed", "steps", "decay", "warmup", "tokens", "longest", "layers", "hidden", "floor", "lift"):
        parser.add_argument(f"--{name}", type=int, default=getattr(usual, name))
    for name in ("lr", "focus", "share"):
        parser.add_argument(f"--{name}", type=float, default=getattr(usual, name))
    parser.add_argument("--tasks", default=usual.tasks, help="tasks to draw, with commas")
    parser.add_argument("--stop", type=int, help="steps after which to stop early, for a resumption")
    given = vars(parser.parse_args())
    out, resume, threads, every, stop = (given.pop(key) for key in ("out", "resume", "threads", "every", "stop"))
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(ModelRecipe(**given))
    if resume:
        trainer.resume(out / "checkpoint.pt")
    mean = 0.0
    last = trainer.recipe.steps if stop is None else min(stop, trainer.recipe.steps)
    while trainer.done < last:
        mean += (trainer.step() - mean) / min(50, trainer.done)
        if trainer.done % 50 == 0:
            report(trainer, mean)
        if trainer.done % every == 0 or trainer.done == last:
            trainer.save(out / "checkpoint.pt")
            trainer.export(out)


def report(trainer: Trainer, mean: float) -> None:
    """Print one line of progress to stderr."""
    state = trainer.curriculum
    levels = " ".join(f"{n}:{LENGTHS[state.level[n]]}:{100 * state.score(n):.0f}" for n in TASKS)
    levels += " " + " ".join(f"{n}:{100 * state.score(n):.0f}" for n in EXERCISES)
    print(
        f"step {trainer.done} loss {mean:.3f} tokens {trainer.seen / 1e6:.2f}M min {trainer.seconds / 60:.1f} {levels}",
        file=sys.stderr,
        flush=True,
    )


if __name__ == "__main__":
    main()
