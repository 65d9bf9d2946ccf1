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


class Head(Enum):
    """Whether a file has the output projection as a tensor of its own."""

    EITHER = auto()
    """If it is not tied to the embedding."""
    OWN = auto()
    """llama.cpp needs it: models that tie it cannot be written."""
    TIED = auto()
    """llama.cpp takes the embedding: models that do not tie it cannot be written."""


@dataclass(frozen=True)
class Window:
    """Layers that attend to a window of tokens, as llama.cpp computes them."""

    period: int
    """Every layer but each `period`-th has a window, in files that do not say which."""
    tokens: int | None = None
    """The window's width in files that do not say; None: there is no window in these."""
    blocks: int | None = None
    """The number of blocks of the models that have windows; None: any may have them."""
    own_rope: bool = False
    """Whether Hugging Face's configuration has rotary settings for each kind of layer."""
    base: str | None = None
    """Key of the rotation's base in layers with a window; None: it is that of the others."""


@dataclass(frozen=True)
class GgufNames:
    """The names of an architecture's parts and settings in .gguf files.

    Names of the parts outside the blocks are the same for all architectures. Keys are those after
    the architecture, as in `llama.context_length`.
    """

    architecture: str
    """`general.architecture` in the file."""
    block: Mapping[str, str] = field(hash=False)
    """Name in the file after `blk.{i}.` -> name inside a block of Hugging Face's model."""
    row_order: Mapping[str, RowOrder] = field(hash=False)
    """Projections, by their names in the file, whose rows are reordered."""
    counts: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Whole numbers of the configuration -> the key in the file."""
    numbers: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The same for other numbers."""
    options: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The same for numbers that may be None; files of these models have no such key."""
    limits: Mapping[str, str] = field(default_factory=dict, hash=False)
    """The same for whole numbers that may be None, which is 0 in the file."""
    flags: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Settings that are true if the file has a tensor -> the name of that tensor."""
    fixed: Mapping[str, bool | str | None] = field(default_factory=dict, hash=False)
    """Settings that llama.cpp does not read -> the only value that it computes."""
    alternating: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Settings that llama.cpp does not read, lists of a number for each block -> n: it computes
    those that are 0 for each n-th block and 1 for all others."""
    constants: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Keys that llama.cpp needs and Hugging Face's class has no setting for -> their value."""
    arrays: Mapping[str, tuple[str, int]] = field(default_factory=dict, hash=False)
    """Tensors of one number, by their names inside a block -> the whole key of all blocks' numbers,
    and how many dimensions such a tensor has."""
    norm_offset: float = 0.0
    """What files have added to the weights of norms: 1 if Hugging Face's module adds it itself."""
    head: Head = Head.EITHER
    rotary: bool = True
    """Whether positions are rotary: the number of key heads, their size and the rotation's base
    are then read too."""
    ropes: frozenset[str] = frozenset({"linear", "yarn"})
    """Kinds of scaled rotary positions that llama.cpp computes for this architecture."""
    partial_rotary: bool = False
    """Whether a part of each head may be rotated only."""
    wide_heads: bool = True
    """Whether heads may be wider or narrower than their share of the hidden states."""
    window: Window | None = None
    """None: llama.cpp attends to all tokens. A file's context then ends where the window does."""
    wide_scale_blocks: int | None = None
    """Settings have `query_pre_attn_scalar`: llama.cpp takes hidden_size / heads for it in models
    of that many blocks, the heads' size in all others. None: there is no such setting."""
    marker: str | None = None
    """A key that tells files of this record from others of the same `architecture`."""
