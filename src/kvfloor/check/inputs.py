"""Check that a state's calls refuse wrong input, leave their inputs unchanged, and share no storage with them.

A method is a KV-cache compressor; its state is the cache of the tokens that it was given, empty when `Method.open`
makes it. A check tests one law of docs/contract.md on a method under a setting `at` (dtype of the cache, size of the
GQA group, seed), and raises `Broken` if the law fails. An answer is the attention output for a query. A state's calls:
`append` stores keys k and values v; `step` stores tokens and returns the answers to their queries q; `read` and
`attend` return the answers to queries without storing tokens. The mask `present` is False for padding.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from kvfloor.check.law import Broken, Setting, require
from kvfloor.check.streams import play, prompt_length, require_same_memory, spec_for, stream_for
from kvfloor.check.tolerance import require_agreement
from kvfloor.core.method import Method
from kvfloor.core.state import State

Call = Callable[[], object]


def _require_refusal(state: State, calls: dict[str, Call], kinds: tuple[type[Exception], ...]) -> None:
    """Raise Broken unless every call raises an exception of one of `kinds` and leaves the state as it was.

    calls: {description: call}; the error names the call by its description.
    """
    before = state.to_bytes()
    wanted = " or ".join(kind.__name__ for kind in kinds)
    for what, call in calls.items():
        try:
            call()
        except kinds as cause:
            require(bool(str(cause)), f"{what} was refused without a word")
        except Exception as cause:
            raise Broken(f"{what} must raise {wanted}, it raised {type(cause).__name__}: {cause}") from cause
        else:
            raise Broken(f"{what} was accepted; it must raise {wanted}")
        require(state.to_bytes() == before, f"{what} was refused, but the state has changed")


def check_wrong_input(method: Method, at: Setting) -> None:
    """Require that wrong input raises ValueError or TypeError and leaves the state unchanged.

    Wrong are, for example, a list instead of a tensor, another dtype or width, and too few rows or queries.
    """
    state, stream = method.open(spec_for(method, at)), stream_for(method, at)
    middle = prompt_length(method) + 5
    play(state, stream, stop=middle)
    q, k, v = stream.q[:, :, middle : middle + 3], stream.k[:, middle : middle + 3], stream.v[:, middle : middle + 3]
    flat = q[:, 0]
    other = torch.float64 if at.dtype != torch.float64 else torch.float32
    present = torch.ones(k.shape[:2], dtype=torch.bool)
    calls: dict[str, Call] = {}
    for name, bad in (
        ("a list", k.tolist()),
        ("two axes", k[0]),
        ("four axes", k.unsqueeze(1)),
        ("too few rows", k[1:]),
        ("too many rows", torch.cat([k, k])),
        ("another width", k[..., 1:]),
        ("more tokens than v", torch.cat([k, k], 1)),
        ("another float dtype", k.to(other)),
        ("integers", k.to(torch.int64)),
        ("complex numbers", k.to(torch.complex64)),
        ("a sparse tensor", k.to_sparse()),
        ("a nested tensor", _nested(k)),
        ("a tensor without data", k.to("meta")),
    ):
        calls[f"append with k as {name}"] = lambda bad=bad: state.append(bad, v)  # type: ignore[arg-type]
        calls[f"append with v as {name}"] = lambda bad=bad: state.append(k, bad)  # type: ignore[arg-type]
        calls[f"step with k as {name}"] = lambda bad=bad: state.step(q, bad, v)  # type: ignore[arg-type]
        calls[f"step with v as {name}"] = lambda bad=bad: state.step(q, k, bad)  # type: ignore[arg-type]
    for name, bad in (
        ("a list", flat.tolist()),
        ("two axes", flat[0]),
        ("four axes", q),
        ("too few rows", flat[1:]),
        ("another width", flat[..., 1:]),
        ("another float dtype", flat.to(other)),
        ("integers", flat.to(torch.int64)),
        ("a nested tensor", _nested(flat)),
        ("a tensor without data", flat.to("meta")),
    ):
        calls[f"read with q as {name}"] = lambda bad=bad: state.read(bad)  # type: ignore[arg-type]
    for name, bad in (
        ("three axes", flat),
        ("too few rows", q[1:]),
        ("another width", q[..., 1:]),
        ("another float dtype", q.to(other)),
        ("a nested tensor", _nested(q)),
        ("a tensor without data", q.to("meta")),
    ):
        calls[f"attend with q as {name}"] = lambda bad=bad: state.attend(bad)
        calls[f"step with q as {name}"] = lambda bad=bad: state.step(bad, k, v)
    calls["step with fewer queries than tokens"] = lambda: state.step(q[:, :, :2], k, v)
    calls["step with an empty group"] = lambda: state.step(q[:, :0], k, v)
    calls["attend with an empty group"] = lambda: state.attend(q[:, :0])
    for name, bad in (
        ("a list", present.tolist()),
        ("numbers", present.to(torch.int64)),
        ("too few rows", present[1:]),
        ("too few tokens", present[:, 1:]),
        ("a sparse mask", present.to_sparse()),
        ("a nested mask", _nested(present)),
        ("a mask without data", present.to("meta")),
    ):
        calls[f"append with present as {name}"] = lambda bad=bad: state.append(k, v, bad)  # type: ignore[arg-type]
        calls[f"step with present as {name}"] = lambda bad=bad: state.step(q, k, v, bad)  # type: ignore[arg-type]
    for name, bad in (
        ("nothing", torch.zeros(0, dtype=torch.int64)),
        ("fractions", torch.zeros(2)),
        ("a matrix", torch.zeros(1, 1, dtype=torch.int64)),
        ("a row below 0", torch.tensor([-1])),
        ("a row too high", torch.tensor([state.spec.rows])),
        ("None", None),
        ("a sparse tensor", torch.tensor([0]).to_sparse()),
        ("a tensor without data", torch.zeros(1, dtype=torch.int64, device="meta")),
    ):
        calls[f"select_rows with {name}"] = lambda bad=bad: state.select_rows(bad)  # type: ignore[arg-type]
    _require_refusal(state, calls, (ValueError, TypeError))
    before = state.to_bytes()
    require(state.attend(q[:, :, :0]).shape[2] == 0, "`attend` answers no query with something")
    require(state.read(flat[:, :0]).log_mass.shape[1] == 0, "`read` answers no query with something")
    require(state.to_bytes() == before, "no query was asked, but the state has changed")
    other = torch.cat([q, q], 1)
    for tokens in (1, q.shape[2]):
        try:
            state.step(other[:, :, :tokens], k[:, :tokens], v[:, :tokens])
            break
        except (ValueError, TypeError):  # a method may hold on to its group's size, or not
            require(state.to_bytes() == before, "another group size was refused, but the state has changed")


def _nested(x: Tensor) -> Tensor:
    """Return x as a nested torch tensor, a list of rows of different lengths: every other row is one item shorter."""
    rows = [row[: len(row) - i % 2] for i, row in enumerate(x)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that nested tensors are a prototype
        return torch.nested.nested_tensor(rows)


def check_non_finite(method: Method, at: Setting) -> None:
    """Require that NaN or infinity in keys, values or queries raises ValueError and leaves the state unchanged."""
    state, stream = method.open(spec_for(method, at)), stream_for(method, at)
    middle = prompt_length(method) + 5
    play(state, stream, stop=middle)
    q, k, v = stream.q[:, :, middle : middle + 3], stream.k[:, middle : middle + 3], stream.v[:, middle : middle + 3]
    one_q, one_k, one_v = q[:, :, -1:], k[:, -1:], v[:, -1:]
    calls: dict[str, Call] = {}
    for number in (torch.nan, torch.inf, -torch.inf):
        bad_q, bad_k, bad_v = q.clone(), k.clone(), v.clone()
        for bad in (bad_q, bad_k, bad_v):
            bad[-1, ..., -1, 0] = number
        calls[f"append with {number} in k"] = lambda bad=bad_k: state.append(bad, v)
        calls[f"append with {number} in v"] = lambda bad=bad_v: state.append(k, bad)
        calls[f"step with {number} in q"] = lambda bad=bad_q: state.step(bad, k, v)
        calls[f"step with {number} in k"] = lambda bad=bad_k: state.step(q, bad, v)
        calls[f"step with {number} in v"] = lambda bad=bad_v: state.step(q, k, bad)
        calls[f"a one-token step with {number} in q"] = lambda bad=bad_q[:, :, -1:]: state.step(bad, one_k, one_v)
        calls[f"a one-token step with {number} in k"] = lambda bad=bad_k[:, -1:]: state.step(one_q, bad, one_v)
        calls[f"a one-token step with {number} in v"] = lambda bad=bad_v[:, -1:]: state.step(one_q, one_k, bad)
        calls[f"attend with {number} in q"] = lambda bad=bad_q: state.attend(bad)
        calls[f"read with {number} in q"] = lambda bad=bad_q: state.read(bad[:, 0])
    _require_refusal(state, calls, (ValueError,))


def check_inputs_untouched(method: Method, at: Setting) -> None:
    """Require that calls do not change their inputs, and that a state shares no storage with inputs and answers.

    So a caller may overwrite both after the call without changing the state.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    for start, size in ((0, 1), (0, 7), (prompt_length(method), 1), (prompt_length(method), 7)):
        state = method.open(spec)
        if start:
            play(state, stream, stop=start)
        for call in (_append, _step, _attend, _read):
            inputs = [x[..., start : start + size, :].clone() for x in (stream.q, stream.k, stream.v)]
            inputs.append(torch.ones(spec.rows, size, dtype=torch.bool))
            copies = [x.clone() for x in inputs]
            outputs = call(state, *inputs)
            what = f"{call.__name__.removeprefix('_')} of {size} tokens"
            for name, x, copy in zip(("q", "k", "v", "present"), inputs, copies, strict=True):
                require(torch.equal(x, copy), f"{what} changed its input {name}")
            message = state.to_bytes()
            for x in (*inputs, *outputs):
                _overwrite(x)
            shares = "overwriting the inputs and answers of"
            require(state.to_bytes() == message, f"{shares} {what} changed the state: it shares their storage")


def _overwrite(x: Tensor) -> None:
    """Fill the whole storage behind x with the number 3, also where x is a view of a part of it."""
    torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).fill_(3)


def _append(state: State, q: Tensor, k: Tensor, v: Tensor, present: Tensor) -> list[Tensor]:
    del q
    state.append(k, v, present)
    return []


def _step(state: State, q: Tensor, k: Tensor, v: Tensor, present: Tensor) -> list[Tensor]:
    return [state.step(q, k, v, present)]


def _attend(state: State, q: Tensor, k: Tensor, v: Tensor, present: Tensor) -> list[Tensor]:
    del k, v, present
    return [state.attend(q)]


def _read(state: State, q: Tensor, k: Tensor, v: Tensor, present: Tensor) -> list[Tensor]:
    del k, v, present
    part = state.read(q[:, 0])
    return [part.mean, part.log_mass]


def check_input_forms(method: Method, at: Setting) -> None:
    """Require that transposed, expanded, gradient-carrying and inference-mode inputs give the results of plain ones.

    Equal numbers in any memory layout must give the same answers and states up to rounding. Answers must carry no
    gradient.
    """
    spec, stream = spec_for(method, at), stream_for(method, at)
    middle = prompt_length(method)
    plain = method.open(spec)
    play(plain, stream, stop=middle)
    start = plain.clone()
    q, k, v = (x[..., middle : middle + 40, :] for x in (stream.q, stream.k, stream.v))
    outputs = plain.step(q, k, v)
    with torch.inference_mode():
        inference = [x.clone() for x in (q, k, v)]
    forms: dict[str, list[Tensor]] = {
        "transposed": [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)],
        "gradient-carrying": [x.clone().requires_grad_() for x in (q, k, v)],
        "inference-mode": inference,
    }
    for name, (form_q, form_k, form_v) in forms.items():
        state = start.clone()
        answer = state.step(form_q, form_k, form_v)
        require(not answer.requires_grad, f"the answer to {name} inputs carries a gradient")
        _require_twin(state, plain, answer, outputs, at, f"{name} and plain inputs")
        mine, theirs = state.read(form_q[:, 0]).mean.detach(), plain.read(q[:, 0]).mean
        require_agreement(mine, theirs, at.dtype, f"the answers of `read` to {name} and plain queries")
    one = [x[..., :1, :].expand(*x.shape[:-2], 9, x.shape[-1]) for x in (q, k, v)]
    expanded, written_out = start.clone(), start.clone()
    answer, outputs = expanded.step(*one), written_out.step(*(x.contiguous() for x in one))
    _require_twin(expanded, written_out, answer, outputs, at, "expanded and plain inputs")


def _require_twin(a: State, b: State, answer: Tensor, outputs: Tensor, at: Setting, what: str) -> None:
    require_agreement(answer.detach(), outputs, at.dtype, f"the outputs of {what}")
    require_same_memory(a, b, at, f"the states after {what}")
