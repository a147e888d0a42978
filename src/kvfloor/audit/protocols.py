"""Define the two protocols of an audit, which differ in when a sample's question is asked.

"visible": the question is part of the context that is compressed. "after": it follows the compression.
"""

from typing import Literal

Protocol = Literal["visible", "after"]
"""`visible`: the question is part of the context that is compressed. `after`: it follows the compression."""

PROTOCOLS: dict[Protocol, str] = {
    "after": "the question follows the compression",
    "visible": "it is compressed too",
}
