"""Define when a sample's question is given: before its context is compressed, or afterwards."""

from typing import Literal

Protocol = Literal["visible", "after"]
"""`visible`: the question stands in the context while that is compressed. `after`: it comes afterwards."""

PROTOCOLS: dict[Protocol, str] = {
    "after": "the question follows the compression",
    "visible": "it is compressed too",
}
