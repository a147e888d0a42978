"""Calibrate the axes along which the keys and values of a model's saved caches are coded (`cache.save(coded=...)`).

A basis has one set of axes for the keys and one for the values of each compressed layer, of all kv heads together. The
axes are principal axes under a metric: a squared error along an axis counts as the divergence that it causes in the
model's predictions, in nats per token. To second order, the divergence of two distributions whose parameter differs by
e is e F e / 2, where F is the Fisher information. F is the mean of g g^T, where g is the gradient of the
log-probability of a token that the model itself draws (Kullback, "Information Theory and Statistics", 1959, chapter 2).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvfloor.core import message
from kvfloor.core.message import CorruptState
from kvfloor.core.rotation import Rotation
from kvfloor.files import named, replace_file
from kvfloor.hf.fingerprint import fingerprint
from kvfloor.hf.layers import watched_cache
from kvfloor.hf.positions import rotations
from kvfloor.hf.prepare import is_prepared
from kvfloor.hf.weights import input_device
from kvfloor.hf.wrappers import unwrapped
from kvfloor.methods.transform.basis import Basis
from kvfloor.methods.transform.transform import NEWEST, dequantised, quantised, sharp, step_for
from kvfloor.validation import whole

AIM = 0.01  # nats per token, at which the scale is measured
FIRST = 4  # tokens of each stream that are saved as they are: much attention rests on them
DRAWS = 4  # sets of tokens drawn from the model's predictions; gradients of more sets make the metric less noisy
MOST_BYTES = 1 << 33
_WHAT = "coding basis"


class CodingBasis:
    """Hold the axes of every compressed layer of one model, and save and load them.

    model    fingerprint of the model that the axes were calibrated for
    axes     {index of the layer in the model: {"k": basis of its keys, "v": of its values}}
    digest   SHA-256 of all numbers, in hex digits; a saved cache names the basis that it was coded in by it
    """

    def __init__(self, model: dict[str, Any], axes: Mapping[int, Mapping[str, Basis]]) -> None:
        self.model = model
        self.axes = {i: dict(kinds) for i, kinds in axes.items()}
        content = hashlib.sha256()
        for i, kinds in self.axes.items():
            for name, one in kinds.items():
                content.update(f"{i} {name} {tuple(one.forward.shape)}".encode())
                for numbers in (one.mean, one.forward, one.variances):
                    content.update(message.raw_bytes(numbers))
        self.digest = content.hexdigest()

    def one(self, index: int, name: str) -> Basis:
        """Return the basis of the keys ("k") or values ("v") of a layer. Raises ValueError if there is none."""
        if index not in self.axes or name not in self.axes[index]:
            raise ValueError(f"the basis has no axes for {name} of layer {index}")
        return self.axes[index][name]

    def save(self, path: str | Path) -> None:
        """Write the basis to the file `path`, whole or not at all. Raises ValueError if it cannot be written."""
        fields = {
            str(i): {
                name: {"mean": one.mean, "forward": one.forward, "variances": one.variances} for name, one in x.items()
            }
            for i, x in self.axes.items()
        }
        replace_file(named(path, _WHAT), message.pack({"coding_basis": self.digest, "model": self.model}, fields))

    @classmethod
    def load(cls, path: str | Path) -> CodingBasis:
        """Return the basis that `save` wrote to `path`.

        Raises CorruptState for a file that is damaged or no basis, and ValueError for one that cannot be read.
        """
        header, fields = message.unpack(message.read(named(path, _WHAT), MOST_BYTES, _WHAT))
        try:
            axes = {
                int(i): {name: Basis.from_forward(**numbers) for name, numbers in kinds.items()}
                for i, kinds in sorted(fields.items(), key=lambda item: int(item[0]))
            }
            found = cls(header["model"], axes)
            if header["coding_basis"] != found.digest:
                raise ValueError("its numbers are not those that it names")
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as cause:
            raise CorruptState(f"{str(path)!r} is no coding basis: {cause}") from cause
        return found


def require_basis(basis: Any) -> None:
    """Raise TypeError unless `basis` is a `CodingBasis`."""
    if not isinstance(basis, CodingBasis):
        raise TypeError(f"basis must be a CodingBasis, as kvfloor.hf.coding_basis returns it, or None; got {basis!r}")


def measured_turns(model: PreTrainedModel) -> dict[int, Rotation | None]:
    """Return {layer index: rotary embedding of the layer's keys, None if they have none}, for all compressed layers.

    Empty if the embeddings cannot be measured (`kvfloor.hf.positions`); keys are then coded as they are.
    """
    _, layers = watched_cache(model.config)
    try:
        return {layer.index: turn for layer, turn in zip(layers, rotations(model), strict=True)}
    except ValueError:
        return {}


def coding_basis(model: PreTrainedModel, tokens: Sequence[int] | Tensor, *, predicted: int = 512) -> CodingBasis:
    """Calibrate a basis for coded saves of caches of `model`, a prepared model, on a typical text.

    tokens      token ids (n,) or (1, n) of the text, about as long as the caches to save
    predicted   number of the text's last tokens whose predictions show which errors matter; those before are the
                context whose keys and values the axes are fitted to
    The model reads the context, then predicts the rest, and the gradients of DRAWS drawn tokens per prediction are
    propagated back to the context's keys and values. Then the context is coded once, and the measured divergence at
    0.01 nats sets the scale. Takes about as long as reading the predicted tokens 15 times.
    Raises ValueError for too few tokens, and TypeError where `model` is no model.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be the model to calibrate for, got {model!r}")
    model = unwrapped(model)
    ids = torch.as_tensor(tokens)
    ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
    least = whole("predicted", predicted) + FIRST + NEWEST + 2
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < least:
        raise ValueError(
            f"a calibration text is one row of at least {least} token ids, of which {predicted} are predicted; got "
            f"shape {tuple(ids.shape)}: give a longer text, or a smaller predicted="
        )
    if not is_prepared(model):
        raise ValueError(f"{type(model).__name__} does not use kvfloor's attention: call kvfloor.hf.prepare(model)")
    context, rest = ids[:, :-predicted], ids[:, -predicted:]
    _, layers = watched_cache(model.config)
    served = [layer.index for layer in layers]
    text = CalibrationText(model, context.to(input_device(model)), rest.to(input_device(model)), served)
    axes = text.axes()
    gain = (text.divergence(axes) / AIM) ** 0.5
    scaled = {i: {name: one.scaled(gain) for name, one in kinds.items()} for i, kinds in axes.items()}
    return CodingBasis(fingerprint(model), scaled)


class CalibrationText:
    """Hold a calibration text's context as the keys and values that a model makes of it, and predict the rest.

    Keys and values of all kv heads of a token are vectors of width w = heads * d or heads * dv, keys without RoPE.
    """

    def __init__(self, model: PreTrainedModel, context: Tensor, rest: Tensor, served: Sequence[int]) -> None:
        self.model, self.rest, self.served, self.n = model, rest, served, context.shape[1]
        self.cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(context, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.turns = measured_turns(model)

    @property
    def body(self) -> Tensor:
        """Return a mask (n,) of the tokens whose errors count: neither the first, which have none, nor the newest."""
        body = ~sharp(self.n)
        body[:FIRST] = False
        return body

    def given(self, index: int) -> dict[str, Tensor]:
        """Return the keys and values (1, heads, n, .) of a layer, as the cache holds them."""
        layer: Any = self.cache.layers[index]
        return {"k": layer.keys, "v": layer.values}

    def predict(self, changed: Mapping[int, Mapping[str, Tensor]]) -> Tensor:
        """Return the log-probabilities (predicted, vocabulary) of the rest, float32, with other keys and values."""
        cache = copy.deepcopy(self.cache)
        for index, kinds in changed.items():
            layer: Any = cache.layers[index]
            layer.keys, layer.values = kinds["k"], kinds["v"]
        logits = self.model(self.rest, past_key_values=cache, use_cache=True).logits[0]
        return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)

    def wide(self, x: Tensor, index: int, name: str) -> Tensor:
        """Return keys, values or their gradients (1, heads, n, .) of a layer as vectors (n, w), float32 on the CPU."""
        x = x.detach()[0].transpose(0, 1).float().cpu()
        turn = self.turns.get(index) if name == "k" else None
        if turn is not None:
            x = turn.turned(x, turn.circle(torch.arange(self.n).unsqueeze(1), torch.float32), back=True)
        return x.flatten(1)

    def heads(self, x: Tensor, index: int, name: str) -> Tensor:
        """Undo `wide`: return vectors (n, w) as (1, heads, n, .), in the dtype and on the device of the cache."""
        like = self.given(index)[name]
        x = x.unflatten(1, (like.shape[1], -1))
        turn = self.turns.get(index) if name == "k" else None
        if turn is not None:
            x = turn.turned(x, turn.circle(torch.arange(self.n).unsqueeze(1), torch.float32))
        return x.transpose(0, 1).unsqueeze(0).to(like)

    def axes(self, draws: int = DRAWS) -> dict[int, dict[str, Basis]]:
        """Return each layer's principal axes under the metric of the predictions' divergence, in nats per token."""
        leaves = {i: {name: x.clone().requires_grad_() for name, x in self.given(i).items()} for i in self.served}
        flat = [(i, name, leaf) for i, kinds in leaves.items() for name, leaf in kinds.items()]
        metric = {(i, name): torch.zeros((), dtype=torch.float64) for i, name, _ in flat}
        body, draw = self.body, torch.Generator().manual_seed(0)
        with torch.enable_grad():
            found = self.predict(leaves)
            for left in range(draws - 1, -1, -1):
                drawn = torch.multinomial(found.detach().exp().cpu(), 1, generator=draw).to(found.device)
                total = found.gather(1, drawn).sum()
                gradients = torch.autograd.grad(total, [leaf for *_, leaf in flat], retain_graph=left > 0)
                for (i, name, _), gradient in zip(flat, gradients, strict=True):
                    g = self.wide(gradient, i, name)[body]
                    metric[i, name] = metric[i, name] + (g.T @ g).double() / (2 * draws * len(found))
        return {
            i: {name: Basis.fitted(self.wide(x, i, name)[body], metric[i, name]) for name, x in self.given(i).items()}
            for i in self.served
        }

    def divergence(self, basis: Mapping[int, Mapping[str, Basis]], aim: float = AIM) -> float:
        """Return the divergence of the predictions from exact ones, nats per token, with a context coded at `aim`."""
        step = step_for(torch.cat([one.variances for kinds in basis.values() for one in kinds.values()]), aim)
        smaller = sharp(self.n)
        coded: dict[int, dict[str, Tensor]] = {}
        for i, kinds in basis.items():
            coded[i] = {}
            for name, one in kinds.items():
                tables = quantised(self.wide(self.given(i)[name], i, name), smaller, one, step)
                coded[i][name] = self.heads(dequantised(tables, smaller, one.mean, one.backward, step), i, name)
                coded[i][name][:, :, :FIRST] = self.given(i)[name][:, :, :FIRST]
        with torch.no_grad():
            exact, found = self.predict({}).double(), self.predict(coded).double()
        return float((exact.exp() * (exact - found)).sum(-1).mean())
