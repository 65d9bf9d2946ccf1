"""Activations on their way through a model, block by block."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from gptq.blockwise.activation_cache import ActivationCache, Batch
from gptq.blockwise.empty_model import replace
from gptq.blockwise.model import Block, BlockwiseModel, free
from gptq.errors import UserError
from gptq.nn import QuantEmbedding

# Tokens that go through a block at once: enough to keep matrix units busy, little memory;
# on a GPU GPU_FACTOR times as many.
BATCH_TOKENS = 4096
GPU_FACTOR = 2

Arguments = Mapping[str, Any]
"""What a block is given besides hidden states: masks, rotary or ALiBi terms."""


@dataclass
class Activations:
    """Hidden states between two blocks: all that is carried from block to block."""

    hidden: ActivationCache
    """Batches of hidden states, each one (batch, seq, hidden)."""
    arguments: dict[int, Sequence[Arguments]]
    """The arguments of every block, by batch size. They differ from block to block in a model whose
    layers have different masks, for instance sliding windows in some of them."""

    def batches(self, block: Block) -> Iterator[tuple[int, Batch, Arguments]]:
        """(index, batch, the block's arguments) of every batch."""
        for index, size in enumerate(self.hidden.sizes()):
            yield index, self.hidden.get(index), self.arguments[size][block.index]

    def through(self, block: Block) -> None:
        """Run the block's own forward on every batch."""
        for index, (hidden,), arguments in self.batches(block):
            self.hidden.put(index, (run_block(block.module, hidden, arguments),))

    def copy(self, name: str) -> "Activations":
        """The same activations, to go another way; `name` is their folder's, if in files."""
        hidden = self.hidden.empty_like(name)
        for index, batch in enumerate(self.hidden):
            hidden.put(index, batch)
        return Activations(hidden, self.arguments)


def batches(windows: Tensor, device: torch.device) -> list[Tensor]:
    """Windows int64 (n, seqlen) in parts that go through a block at once on that device."""
    tokens = BATCH_TOKENS * (GPU_FACTOR if device.type == "cuda" else 1)
    return list(windows.split(max(1, tokens // windows.shape[1])))


def embed(
    model: BlockwiseModel,
    windows: Sequence[Tensor],
    cache: ActivationCache | None = None,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Activations:
    """Load the embeddings, run them on batches of windows, and free them.

    windows: int64 (batch, seq) each, as from `batches`. cache: for the activations, by default in
        memory.
    change: what to make of the embedding's rows, (tokens, hidden).
    Of the embedding only the rows of tokens that occur are kept.
    Raises UserError as `check_tokens`.
    """
    activations = Activations(ActivationCache() if cache is None else cache, {})
    if not windows:
        return activations
    first, *others = model.spec.embed
    used = torch.cat([tokens.unique() for tokens in windows]).unique()
    whole = model.module.get_submodule(first)
    check_tokens(used, whole)
    embeddings = _embedding_rows(model, used)
    embeddings = embeddings if change is None else change(embeddings)
    replace(model.module, first, _with_rows(whole, embeddings))
    for name in others:
        model.load(name)
    for index, tokens in enumerate(windows):
        rows = torch.searchsorted(used, tokens).to(model.device)
        hidden, arguments = block_inputs(model, rows)
        activations.hidden.put(index, (hidden,))
        activations.arguments[len(hidden)] = arguments
    replace(model.module, first, whole)
    for name in others:
        free(model.module.get_submodule(name))
    return activations


def _with_rows(whole: nn.Module, rows: Tensor) -> nn.Module:
    """An embedding of other rows (n, hidden), of the class of `whole`, which may scale them."""
    if isinstance(whole, QuantEmbedding):
        return nn.Embedding.from_pretrained(rows)
    embedding: Any = copy.copy(whole)
    # The row of padding may be none of those.
    embedding.padding_idx = None
    embedding._parameters = {"weight": nn.Parameter(rows, requires_grad=False)}
    return embedding


def check_tokens(tokens: Tensor, embedding: nn.Module) -> None:
    """Raise UserError for a token that an nn.Embedding or QuantEmbedding has no row for."""
    if isinstance(embedding, QuantEmbedding):
        rows = embedding.out_features
    else:
        rows = cast(nn.Embedding, embedding).num_embeddings
    if tokens.numel() and int(tokens.max()) >= rows:
        raise UserError(
            f"the tokenizer makes token {int(tokens.max())} of the text, but the embedding has "
            f"{rows} rows; give the model its own tokenizer, or resize its embedding"
        )


def _embedding_rows(model: BlockwiseModel, used: Tensor) -> Tensor:
    """The embeddings of tokens `used`, int64 (n,), as (n, hidden) on the model's device."""
    first = model.spec.embed[0]
    embedding = model.module.get_submodule(first)
    if not isinstance(embedding, QuantEmbedding):
        whole = cast(nn.Embedding, embedding).weight
        return model.stored(f"{first}.weight", whole)[used].to(model.device, model.dtype)
    model.load(first)
    rows = embedding(used.to(model.device))
    free(embedding)
    return rows


@torch.no_grad()
def run_block(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """One block's forward: hidden states (batch, seq, hidden) to the same."""
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


class _LastBlockReached(Exception):
    """Ends a forward when every block's arguments are known."""


@torch.no_grad()
def block_inputs(model: BlockwiseModel, tokens: Tensor) -> tuple[Tensor, list[Arguments]]:
    """What Hugging Face's own forward hands to the blocks, whose embeddings must be loaded.

    tokens: int64 (batch, seq). Returns the first block's hidden states (batch, seq, hidden) and
    every block's other arguments. No block is run: each only records what it is given.
    """
    blocks = list(cast(nn.ModuleList, model.module.get_submodule(model.spec.blocks)))
    hidden: list[Tensor] = []
    arguments: list[Arguments] = []

    def record(block: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parameters = list(inspect.signature(type(block).forward).parameters)[2:]
        hidden.append(states)
        arguments.append(dict(zip(parameters, args, strict=False)) | kwargs)
        if len(arguments) == len(blocks):
            raise _LastBlockReached
        return states

    with _forward_replaced(blocks, record):
        try:
            model.module.get_submodule(model.spec.base)(input_ids=tokens, use_cache=False)
        except _LastBlockReached:
            return hidden[0], arguments
    raise UserError(
        f"{model.source.name}: its forward runs {len(arguments)} of {len(blocks)} blocks; "
        f"the description of '{model.spec.model_type}' models does not fit it"
    )


@contextmanager
def _forward_replaced(blocks: Sequence[nn.Module], forward: Any) -> Iterator[None]:
    """While open, calling a block calls `forward(block, ...)`.

    An attribute of the instance comes before the method of its class, so that no module is
    exchanged and whatever the model reads from its blocks is still there.
    """
    for block in blocks:
        block.forward = partial(forward, block)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
