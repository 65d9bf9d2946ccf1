"""A model described as data: where its parts are and which linear layers share an input."""

from dataclasses import dataclass

from gptq.models.gguf_names import GgufNames


@dataclass(frozen=True)
class Branch:
    """Half of a block: hidden + scale * post_norm(output(module(norm(hidden)))), attention or MLP.

    Names are inside the block. `module` is run with `output` taken out, to see what it receives.
    """

    norm: str | None
    """None: the module reads the hidden states as they are."""
    module: str
    inputs: tuple[str, ...]
    """Linear layers that read the normed hidden states, in the order they run."""
    output: str
    """The linear layer that writes back to the hidden states."""
    takes_arguments: bool
    """Whether the module is given the block's masks and position terms: attention is."""
    adds_residual: bool = False
    """Whether the module's second argument is a residual that it adds by itself."""
    post_norm: str | None = None
    """A norm of the branch's output, before it is added; None if there is none."""
    scale: str | None = None
    """The block's attribute that multiplies the branch's output; None if there is none."""

    @property
    def is_plain(self) -> bool:
        """Whether what is added to the hidden states is the output layer's own output."""
        return self.post_norm is None and self.scale is None


@dataclass(frozen=True)
class Group:
    """Linear layers of one block that read the same input; they are solved together."""

    layers: tuple[str, ...]
    """Names inside the block, in the order they run."""
    branch: Branch
    """The half of the block that they belong to."""
    writes_residual: bool
    """Whether the output is added to the hidden states: that of a branch's output layer is."""


@dataclass(frozen=True)
class ModelSpec:
    """An architecture, described by the names of its parts in Hugging Face's causal-LM class.

    A new architecture is one more instance of this record and a row of `models.SPECS`.
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
    branches: tuple[Branch, ...]
    """A block's halves, in the order they run."""
    computed: tuple[str, ...] = ()
    """Modules without weights whose buffers are computed from the configuration."""
    old_prefixes: tuple[tuple[str, str], ...] = ()
    """(old, new) beginnings of tensor names: files written by early tools or without the base."""
    dropped: tuple[str, ...] = ()
    """Endings of tensor names that old files carry and today's modules compute for themselves."""
    scalars: tuple[tuple[str, str], ...] = ()
    """(buffer, attribute beside it) of buffers of one number that is no weight."""
    packs_embedding: bool = True
    """Whether the embedding and the head can be packed: a scaled embedding cannot."""
    script: str = "llama"
    """The script at the root that takes this architecture, without its ending."""
    gguf: GgufNames | None = None
    """The names in .gguf files; None if those of this architecture cannot be read."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """The linear layers of one block by the input that they share, in the order they run."""
        return tuple(
            group
            for branch in self.branches
            for group in (
                Group(branch.inputs, branch, writes_residual=False),
                Group((branch.output,), branch, writes_residual=True),
            )
        )

    @property
    def linears(self) -> tuple[str, ...]:
        """Names, inside a block, of every linear layer that is quantized."""
        return tuple(name for group in self.groups for name in group.layers)

    def block(self, index: int) -> str:
        """Dotted name of block `index`."""
        return f"{self.blocks}.{index}"
