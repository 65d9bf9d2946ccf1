"""Whether the code of a LLaMA model is transformers' own, as it was when this package was imported.

People replace functions and classes of transformers, torch and this package to change or to watch
what a model computes. Compiled code would not notice.
"""

import operator
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.integrations import sdpa_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

import quant_cuda
from gptq.nn import QuantLinear

ATTENTION = "sdpa"
# Of the blocks of a model, in the order in which they are called.
BLOCK_CLASSES = (
    modeling_llama.LlamaDecoderLayer,
    modeling_llama.LlamaRMSNorm,
    modeling_llama.LlamaAttention,
    modeling_llama.LlamaMLP,
    type(ACT2FN["silu"]),
    QuantLinear,
)
# What blocks call, and what calls them: owner and name.
_CODE: tuple[tuple[Any, str], ...] = (
    *((owner, name) for owner in BLOCK_CLASSES for name in ("forward", "__call__")),
    *((modeling_llama, owner.__name__) for owner in BLOCK_CLASSES[:4]),
    *(
        (owner, name)
        for owner in (modeling_llama.LlamaModel, modeling_llama.LlamaForCausalLM)
        for name in ("forward", "__call__")
    ),
    *((nn.Module, name) for name in ("__call__", "_call_impl", "_wrapped_call_impl")),
    *(
        (modeling_llama, name)
        for name in ("apply_rotary_pos_emb", "rotate_half", "create_causal_mask")
    ),
    (modeling_llama, "slice_logits_to_keep"),
    (modeling_llama, "ALL_ATTENTION_FUNCTIONS"),
    (sdpa_attention, "sdpa_attention_forward"),
    (sdpa_attention, "repeat_kv"),
    *((nn.functional, name) for name in ("scaled_dot_product_attention", "silu")),
    *((owner, "update") for owner in (DynamicCache, DynamicLayer)),
    (quant_cuda, "matmul"),
)


def _functions() -> list[object]:
    tables = (modeling_llama.ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    listed = [table.get(ATTENTION) for table in tables]
    return [*(getattr(*code, None) for code in _CODE), *listed]


_AT_IMPORT = _functions()
# What was replaced before the import is told by the module that it was written in.
_OWN_AT_IMPORT = all(
    owner.forward.__module__.startswith(("transformers.", "torch.", "gptq."))
    for owner in (*BLOCK_CLASSES, modeling_llama.LlamaModel, modeling_llama.LlamaForCausalLM)
) and modeling_llama.apply_rotary_pos_emb.__module__.startswith("transformers.")


def is_own() -> bool:
    """Whether nothing that a block of a LLaMA model runs has been replaced."""
    return _OWN_AT_IMPORT and all(map(operator.is_, _functions(), _AT_IMPORT))


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
        or torch.is_autocast_enabled("cpu")
    )
