"""A model described as data: where its parts are and which linear layers share an input."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSpec:
    """Paths are dotted module names as in Hugging Face's causal-LM class of this type.

    A third architecture is one more instance of this record.
    """

    model_type: str
    """`config.model_type` of the Hugging Face configuration."""
    architecture: str
    """The Hugging Face class, as config.json names it."""
    base: str
    """The module that maps token ids to final hidden states, for instance `model`."""
    blocks: str
    """The list of transformer blocks, for instance `model.layers`."""
    embed: tuple[str, ...]
    """Everything with weights that runs before the first block, in order."""
    norm: str
    """The normalisation after the last block."""
    head: str
    """The output projection; reads the input embedding's weight where the two are tied."""
    groups: tuple[tuple[str, ...], ...]
    """Linear layers of one block, in the order they run; those of one group share their input."""
    computed: tuple[str, ...] = ()
    """Modules without weights whose buffers are computed from the configuration."""
    old_prefixes: tuple[tuple[str, str], ...] = ()
    """(old, new) beginnings of tensor names: files written by early tools or without the base."""
    dropped: tuple[str, ...] = ()
    """Endings of tensor names that old files carry and today's modules compute for themselves."""

    @property
    def linears(self) -> tuple[str, ...]:
        """Names, inside a block, of every linear layer that is quantized."""
        return tuple(name for group in self.groups for name in group)

    def block(self, index: int) -> str:
        """Dotted name of block `index`."""
        return f"{self.blocks}.{index}"
