"""Choose the codes of the tier that every query reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfloor.core.spec import Spec
from kvfloor.methods.stores.coded import Coding
from kvfloor.methods.stores.codes import ChannelCodes, GroupCodes, SlotCodes, TokenCodes
from kvfloor.methods.stores.dithered_tokens import DitheredTokens
from kvfloor.methods.stores.loud import LoudChannels
from kvfloor.methods.stores.nibbles import NibbleChannels, NibbleTokens
from kvfloor.methods.stores.stepped_tokens import SteppedTokens

_STEPS_FROM = 4  # bits of a value's numbers: with fewer, equal steps err more than the levels of `TokenCodes`


@dataclass(frozen=True)
class HotStore(Coding):
    """Code keys per channel of a page and values token by token, as the store `k8v8` does, in few bits per number.

    first  number of a row's first tokens that are never coded
    extra  further bits for the half of a page's channels whose keys have the wider ranges, 0 to 8
    recent number of a row's newest tokens that have no codes, a multiple of the page
    planes True: codes lie in two planes of 4 bits, without further bits
    keys   bits per number of a key, 1 to 8
    values bits per number of a value, 2 to 8
    dither True: a dither is added before rounding and subtracted on decoding, of its own for each number
    page   tokens that are coded together
    """

    name: ClassVar[str] = "hot"
    first: int
    extra: int
    recent: int
    planes: bool = False
    keys: int = 8
    values: int = 8
    dither: bool = False
    page: int = 64

    @property
    def loses(self) -> bool:
        return False

    def newest(self) -> int:
        return self.recent

    def least_group(self) -> int:
        return 1

    def key_codes(self, spec: Spec, places: int, group: int, lose: bool) -> GroupCodes:
        del lose
        if self.planes:
            return NibbleChannels(spec, spec.d, places, group)
        if self.extra and spec.d > 1:
            return LoudChannels(spec, spec.d, self.keys, self.extra, places, group, self.dither)
        return ChannelCodes(spec, spec.d, self.keys, places, group, dithered=self.dither)

    def value_codes(self, spec: Spec, places: int) -> SlotCodes:
        if self.planes:
            return NibbleTokens(spec, spec.dv, places, self.page)
        if self.dither:
            return DitheredTokens(spec, spec.dv, self.values, places, self.page)
        if self.values >= _STEPS_FROM:
            return SteppedTokens(spec, spec.dv, self.values, places)
        return TokenCodes(spec, spec.dv, self.values, places, centred=False, unbiased=True)
