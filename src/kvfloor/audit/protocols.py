"""Define the protocols of an audit: a sample's question comes before its context is compressed, or afterwards."""

from typing import Literal

Protocol = Literal["visible", "after"]
"""`visible`: the question is part of the context that is compressed. `after`: it follows the compression."""

PROTOCOLS: dict[Protocol, str] = {
    "after": "the question follows the compression",
    "visible": "it is compressed too",
}
