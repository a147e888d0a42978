"""Hold the arguments of an audit, and refuse those that are out of range, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kvfloor.audit.chat import Wish, check_wish
from kvfloor.audit.plan import BUDGETS, METHODS, TASKS, check_protocols
from kvfloor.audit.recommend import KL_LIMIT, WEAK_EXACT_SCORE
from kvfloor.audit.texts import GENERATED, SHIPPED, check_scored, check_texts
from kvfloor.core.budget import size_bytes
from kvfloor.methods.grammar import parse
from kvfloor.methods.mixed.auto import Auto
from kvfloor.models.load import BUILTIN
from kvfloor.splitting import shortened
from kvfloor.statistics import MIN_SAMPLES
from kvfloor.validation import whole

DEFAULT_SAMPLES = 40
DEFAULT_CONTEXT = {True: 512, False: 1024}
"""Tokens of context for the built-in model (True) and any other (False)."""
_FEWEST_SCORED = 512
_USUAL_SHEETS = 2
MOST_SHEETS = 100
ENGINES = ("local", "ray")
LEAST_BYTES = "limit"
"""Entry of `mixed` that asks for the fewest bytes within the limit of divergence."""


@dataclass(frozen=True)
class AuditRequest:
    """Hold the arguments of an audit: every field has the command line's default.

    A row is the result of one method under one budget on one text or cell; a cell is a task at a context length under a
    protocol. The exact cache keeps every token.

    model         "builtin", a local folder, a GGUF file or the name of a published model
    methods       texts of methods, e.g. `h2o`; the baselines, e.g. `exact`, `window` and `random`, always run too
    mixed         what settings with one method per layer the audit adds, chosen from costs that it measures first, on
                  text that it does not read: "limit": of the fewest bytes whose predicted divergence is within the
                  limit; a size such as "8MiB": of the least predicted divergence in these bytes of one request's cache
    budgets       texts of budgets: tokens, shares or bytes; None: 64 and 192 tokens for the built-in model, a quarter
                  and a half of the context for any other
    tasks         names of tasks, or `module:TASK` for one in the user's own module; not used if `prompts` is given.
                  None: the default tasks for the built-in model, none for any other
    prompts       file of the user's own samples as JSON lines, used in place of tasks; None: tasks
    texts         names or files of texts to compare next-token distributions on; None: the generated ones for the
                  built-in model, the shipped ones for any other
    contexts      lengths of contexts in tokens; None: 512 for the built-in model, 1,024 for any other
    continuation  number of tokens that are predicted after each text's context; None: as many as the longest context
                  has, at least 512
    facts         sheets of hidden facts per context: prompts of up to 32 facts, which are asked back from each cache.
                  None: 2 where texts are read, else none
    kl_limit      largest tolerated divergence from the exact cache, nats per token
    accept_terms  True if the user accepts the terms of use of a published model
    n             number of samples per cell, at least 32
    seed          seed of the samples and of the methods' random draws
    protocols     "after": the question follows the compression; "visible": it is compressed with the context
    require       conditions on the rows, such as "h2o@192:recall.score>=0.9"; None: no conditions
    out           folder for the rows and the report; rows that are in it already are not measured again
    command       command line that the report shows
    allow_beyond  True if contexts may be longer than the positions that the model was trained for
    minutes       time limit in minutes: texts and cells that do not fit are left out; None: no limit
    fresh         True if rows that are in `out` already are measured again
    shard         (i, n): measure the i-th of n parts only, 1 <= i <= n; None: measure everything
    chat          "on": put all samples into the model's chat template; "off": none; "auto": if the tokenizer has a
                  template, the user's own prompts, and the samples of tasks whose questions ask an assistant for an
                  answer instead of leaving a text to be continued
    least_exact   score of the exact cache (share of right answers) below which a cell is left out; 0: keep all cells
    engine        "local": this process measures; "ray": the workers of a Ray cluster do
    workers       number of Ray workers; None: as many as the cluster has processors for
    ray_address   address of a running Ray cluster; None: the one in RAY_ADDRESS, or one that is started here
    tp            number of processes (ranks) that share the model by tensor parallelism. The caller has started them,
                  and each has the same arguments. None: one process
    device_map    how transformers spreads the model's layers over devices, such as "auto"; None: all on one
    """

    model: str = "builtin"
    methods: Sequence[str] = METHODS
    mixed: Sequence[str] = ()
    budgets: Sequence[str] | None = None
    tasks: Sequence[str] | None = None
    prompts: Path | None = None
    texts: Sequence[str] | None = None
    contexts: Sequence[int] | None = None
    continuation: int | None = None
    facts: int | None = None
    kl_limit: float = KL_LIMIT
    accept_terms: bool = False
    protocols: Sequence[str] = ("after",)
    n: int = DEFAULT_SAMPLES
    seed: int = 0
    require: str | None = None
    out: Path = Path("out/audit")
    command: str = "kvfloor audit"
    allow_beyond: bool = False
    minutes: float | None = None
    fresh: bool = False
    shard: tuple[int, int] | None = None
    chat: Wish = "auto"
    least_exact: float = WEAK_EXACT_SCORE
    engine: str = ENGINES[0]
    workers: int | None = None
    ray_address: str | None = None
    tp: int | None = None
    device_map: str | None = None

    @property
    def is_builtin(self) -> bool:
        return self.model == BUILTIN

    @property
    def budget_texts(self) -> Sequence[str]:
        """Return the budgets as text, given or default, under which every method without a budget of its own runs."""
        return BUDGETS[self.is_builtin] if self.budgets is None else self.budgets

    @property
    def task_names(self) -> Sequence[str]:
        """Return the names of the tasks to run; none if the user's own prompts are used in their place."""
        if self.prompts is not None or (self.tasks is None and not self.is_builtin):
            return ()
        return TASKS if self.tasks is None else self.tasks

    @property
    def text_names(self) -> Sequence[str]:
        """Return the names of the texts to read."""
        if self.texts is not None:
            return self.texts
        return GENERATED if self.is_builtin else SHIPPED

    @property
    def context_lengths(self) -> Sequence[int]:
        """Return the context lengths in tokens."""
        return (DEFAULT_CONTEXT[self.is_builtin],) if self.contexts is None else self.contexts

    @property
    def scored(self) -> int:
        """Return the number of tokens that are predicted after each text's context."""
        return max(*self.context_lengths, _FEWEST_SCORED) if self.continuation is None else self.continuation

    @property
    def sheets(self) -> int:
        """Return the number of sheets of hidden facts per context."""
        if self.facts is None:
            return _USUAL_SHEETS if self.text_names else 0
        return self.facts

    @property
    def racing(self) -> bool:
        """Return True if the audit is a race, i.e. if it has a time limit, and texts or tasks.

        In a race, settings that clearly lose stop early, and undecided ones have further passages and samples. A user's
        own prompts are all asked at once, so an audit of them alone is no race.
        """
        return self.minutes is not None and bool(self.text_names or self.task_names)

    def check(self) -> None:
        """Raise ValueError with one line for an argument that is out of range."""
        if not self.kl_limit > 0:
            raise ValueError(f"--kl-limit {self.kl_limit}: give a number of nats above 0, such as {KL_LIMIT}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes {self.minutes:g}: give a number above 0, or leave it out for no limit")
        if not 0 <= self.least_exact <= 1:
            raise ValueError(f"--least-exact {self.least_exact:g}: give a score from 0 (keep all cells) to 1")
        check_wish(self.chat)
        whole("--facts", self.sheets, least=0, most=MOST_SHEETS)
        if self.n < MIN_SAMPLES:
            raise ValueError(f"--n {self.n}: a row needs at least {MIN_SAMPLES} samples; leave cells out, not samples")
        self._check_shard()
        self._check_engine()
        check_protocols(self.protocols)
        if not (self.task_names or self.prompts or self.text_names):
            raise ValueError("an audit needs texts or tasks: leave --texts out, or name --tasks")
        check_texts(self.text_names)
        self._check_chosen()
        check_scored(len(self.text_names), self.scored, self.minutes is not None)

    @cached_property
    def autos(self) -> dict[str, Auto]:
        """Return the methods that are chosen by layer from a file of costs: text -> method."""
        parsed = ((text, parse(text)) for text in self.methods)
        return {text: method for text, method in parsed if isinstance(method, Auto)}

    def _check_chosen(self) -> None:
        if self.autos and (self.prompts is not None or self.tp is not None):
            raise ValueError(
                f"{next(iter(self.autos))}: with --prompts or --tp, choose first (kvfloor.hf.choose_layers) and give "
                f"the layers(...)"
            )
        for wish in self.mixed:
            if wish != LEAST_BYTES and size_bytes(wish) is None:
                raise ValueError(f"--mixed {shortened(wish)}: give {LEAST_BYTES}, or a size such as 8MiB")
        others = (self.prompts, self.tp, self.minutes, self.shard)
        names = ("--prompts", "--tp", "--minutes", "--shard")
        if self.mixed and (given := [name for name, value in zip(names, others, strict=True) if value is not None]):
            raise ValueError(
                f"--mixed measures costs in this process before the audit: leave it out with {given[0]}, and give what "
                f"it proposes, the layers(...), to --methods"
            )

    def _check_shard(self) -> None:
        if self.shard is None:
            return
        i, n = self.shard
        if not 1 <= i <= n:
            raise ValueError(f"--shard {i}/{n}: give I/N with I from 1 to N, such as 1/4")
        if self.minutes is not None:
            raise ValueError("--minutes plans whole audits: leave it out with --shard, and raise N for shorter parts")
        if self.require is not None:
            raise ValueError("--require is about whole audits: give it to `kvfloor merge` instead of a part")

    def _check_engine(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"--engine {self.engine!r}: choose from {', '.join(ENGINES)}")
        if self.engine == "local" and not (self.workers is None and self.ray_address is None):
            raise ValueError("--workers and --ray-address are for --engine ray")
        if self.engine == "ray" and self.minutes is not None:
            raise ValueError("--minutes plans for one process: leave it out with --engine ray")
        if self.tp is not None and self.tp < 2:
            raise ValueError(f"--tp {self.tp}: give at least 2 processes, or leave it out")
        if self.engine == "ray" and not (self.tp is None and self.device_map is None):
            raise ValueError("--engine ray has the whole model in each worker: leave out --tp and --device-map")
        if self.tp is not None and self.device_map is not None:
            raise ValueError("--tp divides every layer, --device-map puts each on one device: give one of them")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"--workers {self.workers}: give at least 1")
