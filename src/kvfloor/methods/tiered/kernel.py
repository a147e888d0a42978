"""Answer few queries from the codes of `tiered`, with bounds, where numba is installed: `pip install "kvfloor[fast]"`.

`Glimpse.answer` defines this attention in torch. The kernel's answers and bounds differ from it by rounding, and in
which tokens are bounded one by one; its bounds hold by themselves (docs/certificates.md). It never fetches: queries
whose bounds are too large are answered by torch. In shapes, r are rows, i.e. (batch item, kv head) streams, m queries,
s slots of a row, d and dv the widths of a key and a value.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kvfloor.certify.certified import Certified
from kvfloor.certify.rounding import unit
from kvfloor.core.partial import Partial
from kvfloor.methods.stores import fused
from kvfloor.methods.stores.codes import ChannelCodes, TokenCodes
from kvfloor.methods.stores.levels import levels
from kvfloor.methods.stores.loud import LoudChannels
from kvfloor.methods.stores.turn import matrix

if TYPE_CHECKING:
    from kvfloor.methods.tiered.hot import Hot

_BITS = 8
_WIDEST = 256  # a sum of more products of 8 and 15 bits would not fit 32
_NOTHING = np.zeros((0, 0, 0), np.bool_)
_NO_WORDS = np.zeros((0, 0), np.uint32)


@lru_cache(maxsize=1)
def _kernel() -> Any:
    """Return the module of the kernel. Its first import on a machine compiles it, which takes a while."""
    from kvfloor.methods.tiered import kernel_numba

    return kernel_numba


def serves(hot: Hot) -> bool:
    """Return True if the kernel can read this tier: on a CPU, in float32, with numba, and if no token was dropped.

    Pages must be whole tiles; keys at most 256 numbers, and a multiple of 32, as the bits beyond 8 of a key must be;
    values a multiple of 64.
    """
    codes, spec = hot.codes, hot.spec
    if spec.device_type != "cpu" or spec.compute_dtype != torch.float32 or spec.tied or not fused.installed():
        return False
    keys, values = codes.key_codes, codes.value_codes
    if spec.d % 32 or spec.d > _WIDEST or spec.dv % 64 or not codes.ordered:
        return False
    if keys.bits != _BITS or not isinstance(values, TokenCodes) or values.bits != _BITS:
        return False
    if isinstance(keys, LoudChannels) and (keys.extra not in (1, 2, 4) or keys.fine.shape[1] % 4):
        return False
    return isinstance(keys, LoudChannels | ChannelCodes) and codes.group % _kernel().TILE == 0


def read(hot: Hot, q: Tensor, hide: Tensor | None) -> Certified:
    """Return certified answers (r, m) to q (r, m, d) from the codes of a tier that the kernel serves, not rotated.

    hide: bool (r, m, s), True for tokens that the queries do not see; None: they see all that their row holds.
    """
    codes, spec = hot.codes, hot.spec
    keys, values = codes.key_codes, codes.value_codes
    assert isinstance(keys, LoudChannels | ChannelCodes) and isinstance(values, TokenCodes)
    (rows, m), extra, fine = q.shape[:2], 0, _NO_WORDS
    if isinstance(keys, LoudChannels):
        extra, fine = keys.extra, keys.fine.numpy().view(np.uint32)
    pages = int(codes.coded.max()) // codes.group
    mean, numbers = np.empty((rows, m, spec.dv), np.float32), np.empty((4, rows, m), np.float32)
    radius: Tensor = codes.columns.radius  # type: ignore[attr-defined]
    given = (
        *(q.to(torch.float32).contiguous().numpy(), float(spec.scale), float(spec.softcap or 0.0)),
        *(codes.offset.numpy(), codes.held.numpy(), codes.coded.numpy(), codes.first, codes.group, codes.ring),
        _NOTHING if hide is None else hide.numpy(),
        *(keys.packed.numpy(), fine, extra),
        *(keys.low.numpy(), keys.high.numpy(), keys.range.numpy()),
        *(values.packed.numpy(), values.scale.view(torch.int16).numpy(), radius.view(torch.int16).numpy()),
        *_levels(spec.dv),
        *(codes.fresh_k.to(torch.float32).numpy(), codes.fresh_v.to(torch.float32).numpy()),
        *(hot.key_gram.numpy(), unit(spec.compute_dtype) * (2 * spec.d + codes.group + pages + 32)),
        *(hot.excess.numpy(), hot.reach.numpy(), hot.operator.numpy()),
        matrix(spec.dv, torch.float64, "cpu").numpy(),
        *(mean, *numbers),
    )
    fused.shared(_kernel().certify, rows, int(codes.held.sum()), given)
    log_mass, error, spread, largest = torch.from_numpy(numbers)
    return Certified(Partial(torch.from_numpy(mean), log_mass), error, spread, largest)


@lru_cache(maxsize=64)
def _levels(width: int) -> tuple[Any, Any]:
    """Return the levels of 8-bit codes, and the three upper bytes of the positive ones, as the kernel takes them."""
    table = levels(_BITS, width).numpy()
    raw = table[128:].view(np.uint8).reshape(128, 4)
    assert np.array_equal(table, -table[::-1]) and not raw[:, 0].any()
    return table, np.ascontiguousarray(raw[:, 1:].T)
