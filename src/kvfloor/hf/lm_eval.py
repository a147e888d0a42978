"""Run lm-eval with a compressed cache: register the model class "kvfloor", and stand in for the command `lm_eval`.

lm-eval finds a third party's model class only once its module was imported, and its own command line has no option for
that. So this module is a command line too: it registers the class, then runs `lm_eval` with the same arguments.

    python -m kvfloor.hf.lm_eval --model kvfloor --model_args pretrained=builtin,method=h2o@512 \\
        --include_path tasks --tasks mine

Each request has a cache of its own. All tokens of a request's context but the last are fed to this cache as the prompt.
Then `seal` marks the end of the prompt, and the last context token and the continuation are fed as decoded tokens. So
every scored token is predicted from the tokens that the method kept, even if the method compresses only at the end of
the prompt.
"""

# pyright: reportMissingImports=false
# lm-eval comes with the extra kvfloor[eval] and is not part of a development environment.

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvfloor.hf.cache import CompressedCache
from kvfloor.hf.decode import Dialogue, padded
from kvfloor.hf.prepare import prepare
from kvfloor.hf.usage import Usage
from kvfloor.methods.grammar import parse
from kvfloor.models import load
from kvfloor.version import __version__

_MOST_NEW_TOKENS = 256  # where a task sets no number, as in lm-eval's own classes


@register_model("kvfloor")
class CompressedLM(TemplateLM):
    """Evaluate a local transformers model whose cache is compressed by a kvfloor method.

    pretrained  "builtin" (kvfloor's own small model), the folder of a transformers model, or a model
    method      text such as "h2o(recent=64)@512", i.e. the policy h2o with a budget of 512 tokens per kv head; with
                commas in it, give --model_args as JSON
    context     length in tokens of which a budget such as "@25%" is a share
    chunk       prompt tokens per forward, which bounds the memory that a long prompt takes
    seed        seeds the method's own randomness
    batch_size  requests per forward, left-padded; pads are never stored
    device      such as "cuda:0", the default of lm-eval's command line; the CPU where there is no such device
    dtype       "float32", "bfloat16" or "float16"
    max_length  tokens that the model can see; taken from its configuration unless given
    tokenizer   the model's tokenizer, needed only if `pretrained` is a model
    max_batch_size, which lm-eval always passes, is not used.
    Raises ValueError naming the argument that is not allowed.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel = "builtin",
        method: str = "exact",
        *,
        context: int | None = None,
        chunk: int = 512,
        seed: int = 0,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        max_length: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        del max_batch_size  # lm-eval always passes it; it is about batch_size=auto
        model: Any = pretrained
        if isinstance(pretrained, str):
            model, tokenizer = load(pretrained)
        if tokenizer is None:
            raise ValueError("a model given as an object needs its tokenizer beside it: pass tokenizer=")
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}")
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of requests per forward, got {batch_size!r}")
        if not isinstance(chunk, int) or chunk < 1:
            raise ValueError(f"chunk must be a number of tokens per forward, got {chunk!r}")
        if not torch.cuda.is_available() and str(device).startswith("cuda"):
            device = "cpu"  # lm-eval's command line passes cuda:0 by default
        self.model: Any = prepare(model.to(device=device or "cpu", dtype=getattr(torch, dtype)).eval())
        self.tokenizer: Any = tokenizer
        self.method = parse(str(method))
        self.batch_size, self.chunk = int(batch_size), chunk
        self.max_length = max_length or resolve_max_length(self.model.config, tokenizer)
        self.usage = Usage()
        self._context, self._seed = context, seed
        self._cache([0])  # refuses now a method that cannot serve a model's cache
        self._device = self.model.device

    # ---- tokens ------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Return the id of the token that is put before a text without context: BOS if there is one, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.bos_token)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # ---- lm-eval's requests --------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return, per request, the log-probability of its continuation, and True if greedy decoding would give it.

        requests: (lm-eval's key of the request, token ids of the context, token ids of the continuation).
        disable_tqdm: True to show no progress bar.
        """
        answers: dict[int, tuple[float, bool]] = {}
        sizes = [len(context) + len(continuation) for _, context, continuation in requests]
        for batch in self._batches(sizes, disable_tqdm, "loglikelihood"):
            prompts, rests, asked = [], [], []
            for i in batch:
                _, context, continuation = requests[i]
                whole = (context + continuation)[-self.max_length - 1 :]
                start = max(1, len(whole) - len(continuation) - 1)
                prompts.append(whole[:start])
                rests.append(whole[start:])
                asked.append(min(len(continuation), len(whole) - 1))
            cache = self._cache(batch)
            dialogue = Dialogue.start(self.model, cache, len(batch))
            dialogue.feed(prompts, self.chunk)
            cache.seal()
            for i, count, (log_p, likeliest) in zip(batch, asked, dialogue.score(rests, self.chunk), strict=True):
                answers[i] = (float(log_p[len(log_p) - count :].sum()), bool(likeliest[len(log_p) - count :].all()))
                self.cache_hook.add_partial("loglikelihood", requests[i][0], answers[i])
            self.usage.record(cache)
        return [answers[i] for i in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, scored in windows of `max_length` tokens.

        Each window has a cache of its own. Only one token of a window is fed as the prompt. So nearly all of the text
        is predicted from tokens that the method kept. requests: lm-eval's request objects, with args (text,).
        disable_tqdm: True to show no progress bar.
        """
        windows: list[tuple[Any, list[int], list[int]]] = []
        owner: list[int] = []
        for i, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1):
                windows.append(((None, None), *make_disjoint_window(window)))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (log_p, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += log_p
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the text that generate() produces per request, up to a stop string or the task's limit of tokens.

        requests: lm-eval's request objects, with args (prompt, generation options). disable_tqdm: True to show no
        progress bar.
        """
        said: dict[int, str] = {}
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        alike = [repr(sorted(request.args[1].items())) for request in requests]
        for batch in self._batches([len(ids) for ids in prompts], disable_tqdm, "generate_until", alike):
            said |= zip(
                batch, self._generate([prompts[i] for i in batch], batch, requests[batch[0]].args[1]), strict=True
            )
            for i in batch:
                self.cache_hook.add_partial("generate_until", requests[i].args, said[i])
        return [said[i] for i in range(len(requests))]

    def get_model_info(self) -> dict[str, Any]:
        """Return the dict that lm-eval writes into its results: version, method, and totals of tokens and bytes."""
        return {"kvfloor": {"version": __version__, "method": str(self.method)} | self.usage.totals()}

    # ---- inside ------------------------------------------------------------------------------------------------

    def _cache(self, requests: list[int]) -> CompressedCache:
        return CompressedCache(self.model, self.method, context=self._context, seed=self._seed, requests=requests)

    def _batches(
        self, sizes: list[int], quiet: bool, title: str, alike: list[str] | None = None
    ) -> Iterator[list[int]]:
        """Yield batches, each a list of request indices, and show the progress.

        Among requests that may share a batch, the longest come first.

        sizes  tokens per request
        quiet  True to show no progress bar
        title  the progress bar's label, after the method
        alike  the generation options of each request, as text; requests share a batch only if their texts are equal.
               None: any requests may share a batch
        """
        kinds = alike or [""] * len(sizes)
        order = sorted(range(len(sizes)), key=lambda i: (kinds[i], -sizes[i]))
        with tqdm(total=len(sizes), disable=quiet, desc=f"{self.method} {title}") as bar:
            while order:
                batch = [i for i in order[: self.batch_size] if kinds[i] == kinds[order[0]]]
                order = order[len(batch) :]
                yield batch
                bar.update(len(batch))

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], batch: list[int], options: dict[str, Any]) -> list[str]:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(options, _MOST_NEW_TOKENS))
        most = wanted.pop("max_gen_toks")
        eos = self.tokenizer.decode([self.eot_token_id])
        until = handle_stop_sequences(wanted.pop("until", None), eos=eos)
        if not wanted["do_sample"]:
            wanted.pop("temperature", None)
        if most >= self.max_length:
            raise ValueError(f"the task wants {most} new tokens of a model that sees {self.max_length}")
        prompts = [ids[-(self.max_length - most) :] for ids in prompts]
        pad = self.eot_token_id if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id
        ids, mask = (x.to(self._device) for x in padded(prompts, pad))
        width = ids.shape[1]
        cache = self._cache(batch)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=most,
            pad_token_id=pad,
            stopping_criteria=stop_sequences_criteria(self.tokenizer, until, width, len(batch)),
            **({"prefill_chunk_size": self.chunk} if width > self.chunk else {}),
            **wanted,
        )
        self.usage.record(cache)
        texts = self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        return [postprocess_generated_text(text, until, None) for text in texts]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
