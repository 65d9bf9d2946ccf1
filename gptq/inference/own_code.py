"""Whether the code of a model is transformers' own, as it was when this package was imported.

People replace functions and classes of transformers, torch and this package to change or to watch
what a model computes. Compiled code would not notice.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

import quant_cuda
from gptq.nn import QuantLinear

ATTENTION = "sdpa"
CACHES = (DynamicLayer, DynamicSlidingWindowLayer)
"""The kinds of a cache's layers."""


@dataclass(frozen=True)
class Code:
    """The classes of an architecture, and all functions that its blocks run."""

    causal: Any
    model: Any
    layer: Any
    norm: Any
    attention: Any
    mlp: Any
    has_head_norms: bool
    """Whether attention norms each head's query and key."""
    windows: Callable[[Any], list[int | None]]
    """Each block's sliding window in tokens, from the model's configuration."""
    functions: tuple[tuple[Any, str], ...]
    """Owner and name of each."""
    at_import: tuple[object, ...]
    was_own: bool
    """Whether none had been replaced before the import."""

    def is_own(self) -> bool:
        """Whether nothing that a block runs has been replaced."""
        return self.was_own and all(map(operator.is_, _values(self.functions), self.at_import))


def _no_windows(config: Any) -> list[int | None]:
    return [None] * config.num_hidden_layers


def _same_windows(config: Any) -> list[int | None]:
    return [config.sliding_window] * config.num_hidden_layers


def _windows_by_type(config: Any) -> list[int | None]:
    kinds = {"full_attention": None, "sliding_attention": config.sliding_window}
    return [kinds[kind] for kind in config.layer_types]


def _values(functions: tuple[tuple[Any, str], ...]) -> tuple[object, ...]:
    tables = (modeling_llama.ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    listed = [table.get(ATTENTION) for table in tables]
    return (*(getattr(*function, None) for function in functions), *listed)


def _code(
    module: ModuleType,
    prefix: str,
    windows: Callable[[Any], list[int | None]],
    has_head_norms: bool = False,
) -> Code:
    """The code of a module of transformers whose classes begin with `prefix`."""
    names = {"causal": "ForCausalLM", "model": "Model", "layer": "DecoderLayer"}
    names |= {"norm": "RMSNorm", "attention": "Attention", "mlp": "MLP"}
    classes = {field: getattr(module, prefix + name) for field, name in names.items()}
    called = [*classes.values(), type(ACT2FN["silu"]), QuantLinear]
    functions: tuple[tuple[Any, str], ...] = (
        *((owner, name) for owner in called for name in ("forward", "__call__")),
        *((module, owner.__name__) for owner in list(classes.values())[2:]),
        *((nn.Module, name) for name in ("__call__", "_call_impl", "_wrapped_call_impl")),
        *((module, name) for name in ("apply_rotary_pos_emb", "rotate_half")),
        *((module, name) for name in ("create_causal_mask", "create_sliding_window_causal_mask")),
        (module, "slice_logits_to_keep"),
        (module, "ALL_ATTENTION_FUNCTIONS"),
        (sdpa_attention, "sdpa_attention_forward"),
        (sdpa_attention, "repeat_kv"),
        *((nn.functional, name) for name in ("scaled_dot_product_attention", "silu")),
        *((owner, "update") for owner in (DynamicCache, *CACHES, StaticCache, StaticLayer)),
        (quant_cuda, "matmul"),
    )
    # What was replaced before the import is told by the module that it was written in.
    replaceable = [*(owner.forward for owner in called), module.apply_rotary_pos_emb]
    origins = [function.__module__ for function in replaceable]
    return Code(
        **classes,
        has_head_norms=has_head_norms,
        windows=windows,
        functions=functions,
        at_import=_values(functions),
        was_own=all(it.startswith(("transformers.", "torch.", "gptq.")) for it in origins),
    )


CODES = {
    code.causal: code
    for code in (
        _code(modeling_llama, "Llama", _no_windows),
        _code(modeling_mistral, "Mistral", _same_windows),
        _code(modeling_qwen2, "Qwen2", _windows_by_type),
        _code(modeling_qwen3, "Qwen3", _windows_by_type, has_head_norms=True),
    )
}
"""By the class of the whole model."""


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
