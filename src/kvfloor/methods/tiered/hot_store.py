"""Choose the codes of the tier that every query reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvfloor.core.spec import Spec
from kvfloor.methods.stores.coded import Coding
from kvfloor.methods.stores.codes import ChannelCodes, GroupCodes, TokenCodes
from kvfloor.methods.stores.loud import LoudChannels
from kvfloor.methods.stores.nibbles import NibbleChannels, NibbleTokens

_BITS = 8


@dataclass(frozen=True)
class HotStore(Coding):
    """Code keys per channel of a page and values token by token in 8 bits per number, as the store `k8v8` does.

    first  number of a row's first tokens that are never coded
    extra  further bits for the half of a page's channels whose keys have the wider ranges, 0 to 8
    recent number of a row's newest tokens that have no codes, a multiple of the page
    planes True: codes lie in two planes of 4 bits, without further bits
    page   number of tokens that are coded together
    """

    name: ClassVar[str] = "hot"
    first: int
    extra: int
    recent: int
    planes: bool = False
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
            return LoudChannels(spec, spec.d, _BITS, self.extra, places, group)
        return ChannelCodes(spec, spec.d, _BITS, places, group)

    def value_codes(self, spec: Spec, places: int) -> TokenCodes | NibbleTokens:
        if self.planes:
            return NibbleTokens(spec, spec.dv, places, self.page)
        return TokenCodes(spec, spec.dv, _BITS, places, centred=False, unbiased=True)
