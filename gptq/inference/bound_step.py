"""One token after another of one sequence on a CPU, with what does not change made once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gptq.inference.compiled_decode import (
    blocks_in,
    code_of,
    embedded,
    rotary_terms,
    takes_always,
)
from quant_cuda.cpu import product
from quant_cuda.cpu.decoder_block import Block, BoundBlocks


def can_bind(model: PreTrainedModel) -> bool:
    """Whether compiled code for a CPU takes the model's blocks, as `compiled_decode` asks before
    each token, and will as long as nobody changes the model."""
    if not takes_always(model):
        return False
    blocks = blocks_in(model, code_of(model))
    if blocks is None or not isinstance(blocks[0], Block):
        return False
    return _fits(model, blocks[0].args.head_dim)


@torch.no_grad()
def _fits(model: Any, head_dim: int) -> bool:
    """Whether embeddings and rotary terms are of the type and size that compiled code takes."""
    code = code_of(model)
    inner, zero = getattr(model, code.names.base), _number(0)
    x = embedded(inner, code, zero)
    terms = rotary_terms(inner, x, zero)
    are_whole = all(it.numel() == head_dim for it in terms)
    of_type = all(it.dtype == Block.dtype for it in (x, *terms))
    return are_whole and of_type and product.is_plain(x, None)


def _number(value: int) -> Tensor:
    """int64 (1, 1), whatever torch's default device is."""
    return torch.full((1, 1), value, dtype=torch.long, device="cpu")


class BoundStep:
    """A model that `can_bind`, and keys and values of one sequence. For one thread at a time."""

    def __init__(self, model: PreTrainedModel, length: int) -> None:
        """length: the tokens that the cache has to hold."""
        self._model: Any = model
        self._code = code_of(model)
        self._inner = getattr(model, self._code.names.base)
        self._norm = getattr(self._inner, self._code.names.norm)
        blocks = blocks_in(model, self._code)
        assert blocks is not None
        self.size = length
        sizes = [(1, it.args.key_heads, length, it.args.head_dim) for it in blocks]
        # Compiled code writes there, whatever torch's default type and device are.
        kept: dict[str, Any] = {"dtype": Block.dtype, "device": "cpu"}
        self.cache = [(torch.empty(size, **kept), torch.empty(size, **kept)) for size in sizes]
        """Keys and values of each block, float32 (1, heads, size, head_dim)."""
        self._blocks = BoundBlocks(blocks, self.cache)
        self._seen = 0

    @staticmethod
    def room(seen: int) -> int:
        """Tokens to have room for beyond those that are there."""
        # More costs memory; a copy for every thousand tokens costs little.
        return min(max(64, seen), 1024)

    def begin_with(self, cache: Sequence[tuple[Tensor, Tensor]], count: int) -> None:
        """Go on after the `count` tokens that another cache has seen."""
        for own, other in zip(self.cache, cache, strict=True):
            for to, tensor in zip(own, other, strict=True):
                to[:, :, :count] = tensor[:, :, :count]
        self._seen = count

    @torch.no_grad()
    def __call__(self, next_token: Tensor) -> Tensor:
        """Logits (1, 1, vocab) of a token's id, int64 (1, 1)."""
        x = embedded(self._inner, self._code, next_token)
        cos, sin = rotary_terms(self._inner, x, _number(self._seen))
        lengths = [self._seen] * len(self.cache)
        y = self._blocks.run(x.contiguous(), cos, sin, lengths)
        self._seen += 1
        return self._model.lm_head(self._norm(y))
