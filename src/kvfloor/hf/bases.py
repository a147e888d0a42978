"""Calibrate the axes along which the keys and values of a model's saved caches are coded (`cache.save(coded=...)`).

A basis has one set of axes for the keys and one for the values of each compressed layer, of all kv heads together. The
axes are principal axes under a metric: a squared error along an axis counts as the divergence that it causes in the
model's predictions, in nats per token, as long as the errors of tokens are independent. To second order, the divergence
of two distributions whose parameter differs by e is e F e / 2, where F is the Fisher information. F is the mean of
g g^T, where g is the gradient of the log-probability of a token that the model itself draws (Kullback, "Information
Theory and Statistics", 1959, chapter 2).
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from kvfloor.methods.transform.fineness import features, fit, predicted
from kvfloor.methods.transform.transform import dequantised, quantised, step_for
from kvfloor.validation import whole

AIM = 0.01  # nats per token, at which the scale is measured
ROUNDS = 4  # of measuring the divergence, to find the scale
SLOPE = 1.5  # of log divergence over log aim, about
LEAST = 64  # tokens of context that axes can be fitted to
FIRST = 4  # tokens of each stream that are saved as they are: much attention rests on them
DRAWS = 4  # sets of tokens drawn from the model's predictions; gradients of more sets make the metric less noisy
MOST_BYTES = 1 << 33
_WHAT = "coding basis"


@dataclass(frozen=True)
class LayerAxes:
    """Hold how one layer's keys and values are coded: "k" and "v" in each dict.

    axes      their axes, whose squared errors sum to nats per token
    weights   (features,) of the fineness of each token's codes (`kvfloor.methods.transform.fineness`)
    """

    axes: dict[str, Basis]
    weights: dict[str, Tensor]

    def fineness(self, keys: Tensor, distance: Tensor) -> dict[str, Tensor]:
        """Return the fineness (n,) of the codes of tokens with these keys (n, w), unrotated.

        distance: (n,) of each token to its stream's end, 1 for the newest.
        """
        found = features(keys, distance, self.axes["k"])
        return {name: predicted(found, weights) for name, weights in self.weights.items()}

    def scaled(self, factor: float) -> LayerAxes:
        """Return the same with coordinates `factor` times these."""
        return LayerAxes({name: one.scaled(factor) for name, one in self.axes.items()}, self.weights)


class CodingBasis:
    """Hold the axes of every compressed layer of one model, and save and load them.

    model    fingerprint of the model that the axes were calibrated for
    layers   {index of the layer in the model: its axes}
    digest   SHA-256 of all numbers, in hex digits; a saved cache names the basis that it was coded in by it
    """

    def __init__(self, model: dict[str, Any], layers: Mapping[int, LayerAxes]) -> None:
        self.model = model
        self.layers = dict(layers)
        content = hashlib.sha256()
        for i, layer in self.layers.items():
            for name, one in layer.axes.items():
                content.update(f"{i} {name} {tuple(one.forward.shape)}".encode())
                for numbers in (one.mean, one.forward, one.variances, layer.weights[name]):
                    content.update(message.raw_bytes(numbers))
        self.digest = content.hexdigest()

    def of(self, index: int) -> LayerAxes:
        """Return the axes of a layer. Raises ValueError if there are none."""
        if index not in self.layers:
            raise ValueError(f"the basis has no axes for layer {index}")
        return self.layers[index]

    def save(self, path: str | Path) -> None:
        """Write the basis to the file `path`, whole or not at all. Raises ValueError if it cannot be written."""
        fields = {
            str(i): {
                name: {
                    "mean": one.mean,
                    "forward": one.forward,
                    "variances": one.variances,
                    "weights": layer.weights[name],
                }
                for name, one in layer.axes.items()
            }
            for i, layer in self.layers.items()
        }
        replace_file(named(path, _WHAT), message.pack({"coding_basis": self.digest, "model": self.model}, fields))

    @classmethod
    def load(cls, path: str | Path) -> CodingBasis:
        """Return the basis that `save` wrote to `path`.

        Raises CorruptState for a file that is damaged or no basis, and ValueError for one that cannot be read.
        """
        header, fields = message.unpack(message.read(named(path, _WHAT), MOST_BYTES, _WHAT))
        try:
            layers = {}
            for i, kinds in sorted(fields.items(), key=lambda item: int(item[0])):
                weights = {name: numbers.pop("weights") for name, numbers in kinds.items()}
                axes = {name: Basis.from_forward(**numbers) for name, numbers in kinds.items()}
                layers[int(i)] = LayerAxes(axes, weights)
            found = cls(header["model"], layers)
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


def coding_basis(
    model: PreTrainedModel, tokens: Sequence[int] | Tensor, held_out: Sequence[int] | Tensor, *, predicted: int = 512
) -> CodingBasis:
    """Calibrate a basis for coded saves of caches of `model`, a prepared model, on two typical texts.

    tokens      token ids (n,) or (1, n) of the text that the axes are fitted to, about as long as the caches to save
    held_out    token ids of another text, on which the scale is measured
    predicted   number of a text's last tokens whose predictions show which errors matter; those before are the context
                whose keys and values are coded
    The model reads the context, then predicts the rest, and the gradients of DRAWS drawn tokens per prediction are
    propagated back to the context's keys and values. Then the held-out context is coded with several steps, until the
    divergence of its predictions is known to be 0.01 nats. Takes about as long as reading the predicted tokens 20
    times. Raises ValueError for too few tokens and for a model that is not prepared, TypeError where it is no model.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be the model to calibrate for, got {model!r}")
    model = unwrapped(model)
    texts = [_split(text, predicted) for text in (tokens, held_out)]
    if not is_prepared(model):
        raise ValueError(f"{type(model).__name__} does not use kvfloor's attention: call kvfloor.hf.prepare(model)")
    fitted, other = (CalibrationText(model, *text) for text in texts)
    layers = fitted.axes()
    factor = (AIM / aim_for(lambda aim: other.divergence(layers, aim))) ** 0.5
    return CodingBasis(fingerprint(model), {i: layer.scaled(factor) for i, layer in layers.items()})


def aim_for(divergence: Callable[[float], float], wanted: float = AIM, rounds: int = ROUNDS) -> float:
    """Return the aim at which `divergence` is about `wanted`, both in nats per token, by secants between logarithms.

    divergence: a rising function of the aim, close to a power; called `rounds` times.
    """
    aim, slope, last = wanted, SLOPE, None
    for _ in range(rounds):
        x, y = math.log(aim), math.log(max(divergence(aim), 1e-30) / wanted)
        if last is not None and x != last[0]:
            slope = min(max((y - last[1]) / (x - last[0]), SLOPE / 4), SLOPE * 4)
        last = (x, y)
        aim = math.exp(x - min(max(y / slope, -10.0), 10.0))
    return aim


def _split(text: Sequence[int] | Tensor, predicted: int) -> tuple[Tensor, Tensor]:
    """Return the context and the predicted tokens of a text, (1, .) each. Raises ValueError for too few tokens."""
    ids = torch.as_tensor(text)
    ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
    least = whole("predicted", predicted) + FIRST + LEAST
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < least:
        raise ValueError(
            f"a calibration text is one row of at least {least} token ids, of which {predicted} are predicted; got "
            f"shape {tuple(ids.shape)}: give a longer text, or a smaller predicted="
        )
    return ids[:, :-predicted], ids[:, -predicted:]


class CalibrationText:
    """Hold a calibration text's context as the keys and values that a model makes of it, and predict the rest.

    Keys and values of all kv heads of a token are vectors of width w = heads * d or heads * dv, keys without RoPE.
    """

    def __init__(self, model: PreTrainedModel, context: Tensor, rest: Tensor) -> None:
        context, self.rest = (x.to(input_device(model)) for x in (context, rest))
        self.model, self.n = model, context.shape[1]
        self.served = [layer.index for layer in watched_cache(model.config)[1]]
        self.cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(context, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.turns = measured_turns(model)

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

    def axes(self, draws: int = DRAWS) -> dict[int, LayerAxes]:
        """Return each layer's principal axes under the metric of the predictions' divergence, in nats per token.

        A token's energy is its mean squared gradient. The metric is that of a token of geometric mean energy: the
        gradients of each token are first scaled to this energy. The fineness of codes makes up for the differences.
        """
        leaves = {i: {name: x.clone().requires_grad_() for name, x in self.given(i).items()} for i in self.served}
        flat = [(i, name, leaf) for i, kinds in leaves.items() for name, leaf in kinds.items()]
        gradients: dict[tuple[int, str], list[Tensor]] = {(i, name): [] for i, name, _ in flat}
        draw = torch.Generator().manual_seed(0)
        with torch.enable_grad():
            found = self.predict(leaves)
            for left in range(draws - 1, -1, -1):
                drawn = torch.multinomial(found.detach().exp().cpu(), 1, generator=draw).to(found.device)
                total = found.gather(1, drawn).sum()
                for (i, name, _), one in zip(
                    flat,
                    torch.autograd.grad(total, [leaf for *_, leaf in flat], retain_graph=left > 0),
                    strict=True,
                ):
                    gradients[i, name].append(self.wide(one, i, name)[FIRST:] / (2 * len(found)) ** 0.5)
        return {
            i: self.layer_axes(i, {name: torch.stack(gradients[i, name]) for name in ("k", "v")}) for i in self.served
        }

    def layer_axes(self, index: int, gradients: Mapping[str, Tensor]) -> LayerAxes:
        """Return a layer's axes from the gradients (draws, n - FIRST, w) of its keys and values."""
        axes, weights = {}, {}
        vectors = {name: self.wide(x, index, name)[FIRST:] for name, x in self.given(index).items()}
        for name, g in gradients.items():
            energy = g.square().sum(-1).mean(0).clamp_min(torch.finfo(torch.float32).tiny)
            typical = energy.log().mean().exp()
            g = (g * (typical / energy).sqrt().unsqueeze(1)).flatten(0, 1)
            axes[name] = Basis.fitted(vectors[name], (g.T @ g).double() / len(gradients[name]))
            weights[name] = fit(features(vectors["k"], self.distance, axes["k"]), energy)
        return LayerAxes(axes, weights)

    @property
    def distance(self) -> Tensor:
        """Return the distance to the context's end (n - FIRST,) of its tokens after the first ones."""
        return self.n - torch.arange(FIRST, self.n)

    def divergence(self, layers: Mapping[int, LayerAxes], aim: float = AIM) -> float:
        """Return the divergence of the predictions from exact ones, nats per token, with a context coded at `aim`."""
        step = step_for(torch.cat([one.variances for layer in layers.values() for one in layer.axes.values()]), aim)
        coded: dict[int, dict[str, Tensor]] = {}
        for i, layer in layers.items():
            coded[i] = {}
            vectors = {name: self.wide(x, i, name) for name, x in self.given(i).items()}
            finer = layer.fineness(vectors["k"][FIRST:], self.distance)
            for name, one in layer.axes.items():
                x = vectors[name]
                table = quantised(x[FIRST:], finer[name], one, step)
                x[FIRST:] = dequantised(table, finer[name], one.mean, one.backward, step)
                coded[i][name] = self.heads(x, i, name)
                coded[i][name][:, :, :FIRST] = self.given(i)[name][:, :, :FIRST]
        with torch.no_grad():
            exact, found = self.predict({}).double(), self.predict(coded).double()
        return float((exact.exp() * (exact - found)).sum(-1).mean())
