"""Generate the exact cache's own output at a bounded cache's reads: draft with the bounded, verify with the exact one.

A round drafts up to `draft` tokens, one forward each, and verifies them in one forward (VeriCache, arXiv 2605.17613).
The pending token is the newest one, which no forward has taken in yet. A round feeds it and the drafts; what was
accepted is committed, i.e. both caches take it in. In shapes, B is the batch, k drafts, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvfloor.core.method import Method
from kvfloor.hf.verified import rule
from kvfloor.hf.verified.cache import VerifiedCache
from kvfloor.hf.verified.choosing import Choosing
from kvfloor.hf.verified.report import VerifiedReport
from kvfloor.hf.verified.request import Sampling, pad_of, prompts_of, require_room, require_streamable, stops_of
from kvfloor.hf.wrappers import unwrapped
from kvfloor.validation import count


@torch.inference_mode()
def generate_verified(
    model: PreTrainedModel,
    ids: Tensor,
    method: Method | str | VerifiedCache,
    *,
    draft: int = 8,
    max_new_tokens: int = 20,
    attention_mask: Tensor | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    generator: torch.Generator | None = None,
    logits_processor: Sequence[Any] = (),
    context: int | None = None,
    streamer: Any = None,
    return_report: bool = False,
) -> Tensor | tuple[Tensor, VerifiedReport]:
    """Generate tokens that a bounded cache drafts and the exact cache verifies; return ids with them (B, n + new).

    Greedy tokens are those of the exact cache, up to rounding where two logits nearly tie: a verification computes
    several tokens at once. Sampled tokens have the exact cache's distribution (arXiv 2211.17192). Both caches are kept:
    what is saved is what is read per token, not memory.

    model             a prepared decoder with full and sliding-window attention
    ids               (B, n) prompts, the whole conversation. attention_mask: (B, n), 0 in pads, wherever they are
    method            drafts: a Method or its text, such as "snapkv@512", "h2o:k4v4@25%" or "exact:k4v4". With a
                      VerifiedCache its conversation goes on: ids must begin with the tokens that it has, and have more
    draft             tokens drafted per verification
    max_new_tokens    most new tokens per batch item
    eos_token_id      a token id, or several, at which an item ends; None: those of model.generation_config; (): none
    pad_token_id      fills up items that end early
    do_sample         True: sample, with temperature, top_k (0: all tokens) and top_p, as transformers' generate() does,
                      from `generator`, or from one of its own with `seed`. The model's own sampling settings are not
                      used
    logits_processor  transformers' logits processors, called for each token with its item's ids alone
    context           tokens of which a budget such as "@25%" is a share; the prompt and max_new_tokens unless given
    streamer          transformers' BaseStreamer, for one batch item: gets the prompt, and each token that is certain
    return_report     True: return (ids, `VerifiedReport`)
    Raises TypeError and ValueError naming the argument, before the model runs. An error in the middle leaves a given
    VerifiedCache with the tokens that were certain by then (`VerifiedCache.tokens`), or, if some of its layers had
    changed and others had not, makes it refuse further use (BrokenState).
    """
    inner = unwrapped(model)
    count("generate_verified", least=1, draft=draft, max_new_tokens=max_new_tokens)
    sampling = Sampling(do_sample, temperature, top_k, top_p, seed, generator)
    prompts = prompts_of(ids, attention_mask, inner.config.get_text_config(decoder=True).vocab_size)
    require_streamable(streamer, len(prompts))
    stops = stops_of(inner, eos_token_id)
    pad = pad_of(inner, pad_token_id, stops)
    longest = max(map(len, prompts))
    require_room(inner, longest, longest + max_new_tokens - 1)
    if torch.is_autocast_enabled(inner.device.type):
        raise ValueError("generate_verified computes in the model's own dtype: leave torch.autocast")
    if isinstance(method, VerifiedCache):
        if context is not None:
            raise ValueError("context= is for a method; the VerifiedCache has its own")
        cache = method
    else:
        cache = VerifiedCache(model, method, context=longest + max_new_tokens if context is None else context)
    new = _beyond(cache, prompts)
    choosing = Choosing(logits_processor, temperature, top_k, top_p)
    drawn_by = sampling.drawn_by() if do_sample else None
    run = _VerifiedRun(model, cache, choosing, drawn_by, stops, max_new_tokens, draft, streamer)
    if streamer is not None:
        streamer.put(ids.cpu())
    run.begin(new)
    while not run.over:
        run.round()
    if streamer is not None:
        streamer.end()
    width = max(map(len, run.said))
    said = torch.tensor([[*one, *[pad] * (width - len(one))] for one in run.said], dtype=ids.dtype, device=ids.device)
    whole = torch.cat([ids, said], 1)
    return (whole, run.report()) if return_report else whole


def _beyond(cache: VerifiedCache, prompts: list[list[int]]) -> list[list[int]]:
    """Return the tokens of each prompt that the cache has not yet; raise ValueError if it holds others, or all."""
    cache.check_whole()
    if not cache.tokens:
        return prompts
    if len(cache.tokens) != len(prompts):
        raise ValueError(f"this cache holds a batch of {len(cache.tokens)}, and ids has {len(prompts)} items")
    new = []
    for row, (held, prompt) in enumerate(zip(cache.tokens, prompts, strict=True)):
        if prompt[: len(held)] != held or len(prompt) == len(held):
            raise ValueError(
                f"ids of item {row} must begin with the {len(held)} tokens that the cache has, and have more: give the "
                f"ids that generate_verified returned, and what comes next"
            )
        new.append(prompt[len(held) :])
    return new


class _VerifiedRun:
    """Generate for one call: hold what was said so far, and the counts for the report."""

    def __init__(
        self,
        model: Any,
        cache: VerifiedCache,
        choosing: Choosing,
        generator: torch.Generator | None,
        stops: Sequence[int],
        most: int,
        draft: int,
        streamer: Any,
    ) -> None:
        self.model, self.cache, self.choosing, self.generator = model, cache, choosing, generator
        self.stops, self.most, self.draft, self.streamer = set(stops), most, draft, streamer
        self.said: list[list[int]] = []
        self.verifications = self.draft_steps = 0
        self.rounds: list[int] = []
        self.reached: list[list[int]] = []  # by batch item and draft position, as in the report
        self.accepted: list[list[int]] = []
        self.least_margin = float("inf")

    @property
    def over(self) -> bool:
        return not any(self._left(row) for row in range(len(self.said)))

    def _left(self, row: int) -> int:
        """Return how many more tokens batch item `row` may get."""
        said = self.said[row]
        return 0 if said and said[-1] in self.stops else self.most - len(said)

    def begin(self, new: list[list[int]]) -> None:
        """Feed the prompt's new tokens, and choose the first token of each item from the exact logits."""
        logits = self.cache.feed(self.model, new).unsqueeze(1)
        last = torch.tensor([ids[-1:] for ids in self.cache.tokens])
        scores = self.choosing.scores(logits, [ids[:-1] for ids in self.cache.tokens], last)
        if self.generator is None:
            first = scores.argmax(-1).squeeze(1)
            self._note_margins(scores, [1] * len(new))
        else:
            first = rule.draw(self.choosing.probabilities(scores).squeeze(1), self.generator)
        self.said = [[] for _ in new]
        self.rounds = [0] * len(new)
        self.reached, self.accepted = ([[0] * self.draft for _ in new] for _ in range(2))
        for row, token in enumerate(first.tolist()):
            self._say(row, [token])

    def round(self) -> None:
        """Draft tokens, verify them, and commit what was accepted."""
        self.cache.drop()
        fed = torch.tensor([one[-1:] for one in self.said])
        fed, drawn_from = self._drafted(fed, min(self.draft, max(map(self._left, range(len(self.said)))) - 1))
        scores = self._scores(self.cache.verify(self.model, fed), fed)
        self.verifications += 1
        drafts = fed[:, 1:].to(scores.device)
        if self.generator is None:
            count, following = rule.greedy(drafts, scores)
        else:
            target = self.choosing.probabilities(scores)
            empty = target[:, :0] if not drawn_from else torch.stack(drawn_from, 1)
            count, following = rule.sampled(drafts, empty, target, self.generator)
        self._take(fed, scores, count.tolist(), following.tolist())

    def _drafted(self, fed: Tensor, most: int) -> tuple[Tensor, list[Tensor]]:
        """Draft at most `most` tokens after the pending ones (B, 1); return both (B, 1 + k), and k distributions.

        The distributions (B, V) are those that the drafts were drawn from; there are none if drafts are greedy.
        Drafting ends early where a stop token was drafted for every item.
        """
        drawn_from: list[Tensor] = []
        ended = torch.tensor([self._left(row) == 0 for row in range(len(fed))])
        for offset in range(most):
            logits = self.cache.draft(self.model, fed[:, -1:], offset)
            self.draft_steps += 1
            scores = self._scores(logits.unsqueeze(1), fed)
            if self.generator is None:
                token = scores.argmax(-1).squeeze(1)
            else:
                drawn_from.append(self.choosing.probabilities(scores).squeeze(1))
                token = rule.draw(drawn_from[-1], self.generator)
            token = token.cpu()
            fed = torch.cat([fed, token.unsqueeze(1)], 1)
            ended |= torch.isin(token, torch.tensor(sorted(self.stops), dtype=torch.int64))
            if bool(ended.all()):
                break
        return fed, drawn_from

    def _scores(self, logits: Tensor, fed: Tensor) -> Tensor:
        """Return the processed logits (B, n, V) of the last n of the uncommitted tokens `fed` (B, u)."""
        n = logits.shape[1]
        before = fed[:, : fed.shape[1] - n].tolist()
        histories = [[*held, *ids] for held, ids in zip(self.cache.tokens, before, strict=True)]
        return self.choosing.scores(logits, histories, fed[:, fed.shape[1] - n :])

    def _take(self, fed: Tensor, scores: Tensor, count: list[int], following: list[int]) -> None:
        """Commit what is certain of the fed tokens (B, 1 + k), and say the accepted drafts and the token after them.

        count      accepted drafts of each batch item
        following  the token after them
        """
        certain: list[list[int]] = []
        for row, ids in enumerate(fed[:, 1:].tolist()):
            left = self._left(row)
            tokens = [*ids[: count[row]], following[row]][:left]
            stop = next((i for i, token in enumerate(tokens) if token in self.stops), len(tokens))
            certain.append(tokens[: stop + 1])
            self.rounds[row] += left > 0
            for i in range(min(len(ids), len(certain[row]))):
                self.reached[row][i] += 1
                self.accepted[row][i] += i < count[row]
        if self.generator is None:
            self._note_margins(scores, [len(tokens) for tokens in certain])
        self.cache.commit(fed, torch.tensor([len(tokens) for tokens in certain]))
        for row, tokens in enumerate(certain):
            self._say(row, tokens)

    def _say(self, row: int, tokens: list[int]) -> None:
        for token in tokens:
            self.said[row].append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))

    def _note_margins(self, scores: Tensor, used: list[int]) -> None:
        """Record the least difference of the two largest scores (B, n, V), over the first used[b] positions of b."""
        top = scores.topk(2, -1).values
        wanted = torch.arange(scores.shape[1]) < torch.tensor(used).unsqueeze(1)
        margins = (top[..., 0] - top[..., 1])[wanted.to(top.device)]
        if len(margins):
            self.least_margin = min(self.least_margin, float(margins.min()))

    def report(self) -> VerifiedReport:
        """Return the counts of this call."""
        return VerifiedReport(
            tokens=tuple(map(len, self.said)),
            verifications=self.verifications,
            rounds=tuple(self.rounds),
            draft_steps=self.draft_steps,
            reached=tuple(map(tuple, self.reached)),
            accepted=tuple(map(tuple, self.accepted)),
            hot_bytes=self.cache.hot_bytes,
            cold_bytes=self.cache.cold_bytes,
            least_margin=self.least_margin if self.generator is None else None,
        )
