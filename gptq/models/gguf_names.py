"""How .gguf files hold an architecture, as data: names, order of rows, configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto


class RowOrder(Enum):
    """How llama.cpp's converter reorders the rows of an attention projection.

    blockwise.gguf_model has the inverse of each.
    """

    ROTARY = auto()
    """Queries: the two halves of each head's rows alternate."""
    ROTARY_KV = auto()
    """Keys: the same, with the number of key and value heads."""
    FUSED_QKV = auto()
    """Every head's query, then every head's key, then every head's value."""


@dataclass(frozen=True)
class GgufNames:
    """The names of an architecture's parts and settings in .gguf files.

    Names of the parts outside the blocks are the same for all architectures.
    """

    architecture: str
    """`general.architecture` in the file."""
    block: Mapping[str, str] = field(hash=False)
    """Name in the file after `blk.{i}.` -> name inside a block of Hugging Face's model."""
    row_order: Mapping[str, RowOrder] = field(hash=False)
    """Projections, by their names in the file, whose rows are reordered."""
    counts: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Whole numbers of the configuration -> the key in the file, after the architecture."""
    numbers: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The same for other numbers."""
    flags: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Settings that are true if the file has a tensor -> the name of that tensor."""
    rotary: bool = True
    """Whether positions are rotary: the number of key heads, their size and the rotation's base
    are then read too."""
