"""A model whose weights stay on disk: its parts are loaded one at a time, run, and freed.

The modules are Hugging Face's own. This module decides only what is in memory.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq.blockwise import empty_model
from gptq.blockwise.source import ModelSource
from gptq.errors import UserError
from gptq.files.lazy import LazyTensors
from gptq.models import ModelSpec
from gptq.nn import STORED_AS_IS, QuantEmbedding, TiedHead

# What a full model's weights can be. Narrower floats come with scales in tensors of their own.
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block; its weights are in memory."""

    index: int
    name: str
    """Its dotted name in the model."""
    module: nn.Module
    spec: ModelSpec

    def linear(self, name: str) -> nn.Linear:
        """The linear layer at the dotted `name` inside the block."""
        return empty_model.linear(self.module, name)


@dataclass(frozen=True, eq=False)
class BlockwiseModel:
    """A full or quantized model of which some parts are in memory."""

    source: ModelSource
    module: PreTrainedModel
    """From `empty_model.build`; a quantized model's packed layers are in place."""
    tensors: Mapping[str, Tensor]
    """The weights, by the names of `module`; read when asked for."""
    device: torch.device
    dtype: torch.dtype
    """Of activations and of floating weights."""

    @classmethod
    def from_source(
        cls, source: ModelSource, device: torch.device, dtype: torch.dtype
    ) -> "BlockwiseModel":
        """The full model of `source`; no weight is read yet."""
        module = empty_model.build(source.config, source.spec, device)
        return cls(source, module, source.tensors, device, dtype)

    @property
    def spec(self) -> ModelSpec:
        return self.source.spec

    @property
    def block_count(self) -> int:
        return len(cast(nn.ModuleList, self.module.get_submodule(self.spec.blocks)))

    def parts(self) -> Iterator[str]:
        """Names of the parts that are loaded together, in the order they run."""
        yield from self.spec.embed
        yield from (self.spec.block(index) for index in range(self.block_count))
        yield self.spec.norm
        yield self.spec.head

    def load(self, name: str) -> nn.Module:
        """Load the weights of the part `name`; returns the part.

        Floating weights become `dtype`; packed words and scales keep their own types. A tied head
        takes the embedding's weight. Raises UserError for a tensor that is absent or of another
        shape.
        """
        part = self.module.get_submodule(name)
        if isinstance(part, TiedHead):
            self.load(self.spec.embed[0])
            return part
        state = {}
        for key, expected in part.state_dict().items():
            tensor = self.stored(f"{name}.{key}", expected)
            as_is = key.rpartition(".")[2] in STORED_AS_IS or not tensor.is_floating_point()
            dtype = tensor.dtype if as_is else self.dtype
            state[key] = tensor.to(device=self.device, dtype=dtype)
        part.load_state_dict(state, assign=True)
        if isinstance(part, QuantEmbedding):
            part.like = torch.empty(0, dtype=self.dtype, device=self.device)
        return part.requires_grad_(False)

    def load_block(self, index: int) -> Block:
        """Load a block; the system reads the next one ahead into its own memory."""
        name = self.spec.block(index)
        block = Block(index, name, self.load(name), self.spec)
        if isinstance(self.tensors, LazyTensors):
            self.tensors.prefetch(f"{self.spec.block(index + 1)}.")
        return block

    def stored(self, name: str, expected: Tensor) -> Tensor:
        """The tensor `name` as it is stored; errors as `load`."""
        return empty_model.stored(self.module, self.spec, name, self.tensors, expected)

    def check_tensors(self) -> None:
        """Raise UserError unless every part has its tensors and every tensor its part.

        Only headers are read, and biases that no part has: those of zeros change nothing.
        """
        expected = self.module.state_dict()
        tied = empty_model.tied(self.module.config, self.spec, self.tensors)
        for name in expected:
            empty_model.check_present(tied.get(name, name), self.tensors)
        ignored = getattr(self.module, "_keys_to_ignore_on_load_unexpected", None) or ()
        extra = [
            name
            for name in self.tensors
            if name not in expected
            and not any(re.search(pattern, name) for pattern in ignored)
            and not (name.endswith(".bias") and not bool(self.tensors[name].any()))
        ]
        if extra:
            more = f" and {len(extra) - 1} more tensors have" if len(extra) > 1 else " has"
            raise UserError(
                f"{self.source.folder}: {extra[0]}{more} no place in the model that config.json "
                "describes; it would not be the same model without them"
            )
        self._check_floating(expected)

    def _check_floating(self, expected: Mapping[str, Tensor]) -> None:
        for name, place in expected.items():
            if not isinstance(self.tensors, LazyTensors) or name not in self.tensors:
                continue
            dtype = self.tensors.dtype(name)
            if place.is_floating_point() and dtype not in FLOATING:
                raise UserError(
                    f"{self.source.folder}: {name} is of type {dtype}, which a full model's "
                    "weights are not; give the model that it was made from"
                )


def free(part: nn.Module) -> None:
    """Free the weights of a part."""
    part.to("meta")
