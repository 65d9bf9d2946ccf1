"""Whether the code of a model is transformers' own, as it was when this package was imported.

People replace functions and classes of transformers, torch and this package to change or to watch
what a model computes. Compiled code would not notice.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

Function = tuple[Any, str]
"""An owner, which is a module or a class, and a name in it."""


@dataclass(frozen=True)
class Names:
    """Where an architecture has its parts."""

    base: str
    """In the whole model: all but the head."""
    embeddings: tuple[str, ...]
    """In the base, as `layers` and `norm`; each takes what the one before it returns."""
    layers: str
    norm: str
    attention: str
    """In a layer, as the rest."""
    linears: tuple[str | None, ...]
    """In the order of quant_cuda.block_parts.WEIGHTS; None for those that are not there."""
    norms: tuple[str, ...]
    """In the order of quant_cuda.block_parts.NORMS."""
    scale: str
    """In the attention: the factor of the query-key scores."""
    epsilon: str
    """In a norm."""


@dataclass(frozen=True)
class Code:
    """The classes of an architecture, and all functions that its blocks run."""

    names: Names
    causal: Any
    model: Any
    """Of `names.base`."""
    output: Any
    """Of what the whole model returns."""
    parts: Mapping[str, type]
    """All that a layer consists of, by its name in the layer, which itself is ""."""
    needed: Mapping[str, Mapping[str, object]]
    """Of parts: attributes, and the only value that compiled code knows."""
    implementation: str
    """Of the attention, by its name in transformers."""
    windows: Callable[[Any], list[int | None]]
    """Each block's sliding window in tokens, from the model's configuration."""
    slopes: Callable[[int, torch.device], Tensor] | None
    """ALiBi's of so many heads, float32; None: positions are rotary."""
    functions: tuple[Function, ...]
    at_import: tuple[object, ...]
    """The functions, and what transformers' tables have for `implementation`."""
    was_own: bool
    """Whether none had been replaced before the import."""

    def is_own(self) -> bool:
        """Whether nothing that a block runs has been replaced."""
        return self.was_own and all(
            map(operator.is_, values(self.functions, self.implementation), self.at_import)
        )


def values(functions: Sequence[Function], implementation: str) -> tuple[object, ...]:
    """`Code.at_import` as it is now."""
    tables = (modeling_llama.ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    listed = [table.get(implementation) for table in tables]
    return (*(getattr(*function, None) for function in functions), *listed)


def is_observed(module: nn.Module) -> bool:
    """Whether a module has hooks, a forward of its own, or a compiled one."""
    attributes = vars(module)
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in attributes
        or attributes.get("_compiled_call_impl") is not None
    )


def has_global_state() -> bool:
    """Whether hooks of all modules, tracing or autocast change what a forward does."""
    module = nn.modules.module
    return bool(
        module._global_forward_hooks
        or module._global_forward_pre_hooks
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    )
