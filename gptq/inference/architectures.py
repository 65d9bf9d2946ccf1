"""The architectures whose single tokens compiled code takes: LLaMA's family and BLOOM.

What they consist of is looked up in transformers once, at import.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)
from transformers.integrations import sdpa_attention
from transformers.modeling_outputs import (
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
)
from transformers.models.bloom import modeling_bloom
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

import quant_cuda
from gptq.inference.own_code import Code, Function, Names, values
from gptq.nn import QuantLinear

CACHES = (DynamicLayer, DynamicSlidingWindowLayer)
"""The kinds of a cache's layers."""

_LLAMA = Names(
    base="model",
    embeddings=("embed_tokens",),
    layers="layers",
    norm="norm",
    attention="self_attn",
    linears=(
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
    scale="scaling",
    epsilon="variance_epsilon",
)
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_BLOOM = Names(
    base="transformer",
    embeddings=("word_embeddings", "word_embeddings_layernorm"),
    layers="h",
    norm="ln_f",
    attention="self_attention",
    linears=(
        *("self_attention.query_key_value", None, None, "self_attention.dense"),
        *(None, "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    ),
    norms=_LLAMA.norms,
    scale="inv_norm_factor",
    epsilon="eps",
)


def _no_windows(config: Any) -> list[int | None]:
    return [None] * config.num_hidden_layers


def _same_windows(config: Any) -> list[int | None]:
    return [config.sliding_window] * config.num_hidden_layers


def _windows_by_type(config: Any) -> list[int | None]:
    kinds = {"full_attention": None, "sliding_attention": config.sliding_window}
    return [kinds[kind] for kind in config.layer_types]


def _code(
    module: ModuleType,
    names: Names,
    classes: Mapping[str, Any],
    functions: tuple[Function, ...],
    **others: Any,
) -> Code:
    """classes: "causal", "model", and the parts of a layer but for its linears. functions: in
    addition to their forwards. others: fields of Code."""
    classes = {**classes, **dict.fromkeys(filter(None, names.linears), QuantLinear)}
    called = list(dict.fromkeys(classes.values()))
    functions = (
        *((owner, name) for owner in called for name in ("forward", "__call__")),
        *((module, owner.__name__) for owner in called if owner.__module__ == module.__name__),
        *((nn.Module, name) for name in ("__call__", "_call_impl", "_wrapped_call_impl")),
        (module, "create_causal_mask"),
        (module, "slice_logits_to_keep"),
        *((owner, "update") for owner in (DynamicCache, *CACHES, StaticCache, StaticLayer)),
        (quant_cuda, "matmul"),
        *functions,
    )
    # What was replaced before the import is told by the module that it was written in.
    replaceable = [owner.forward for owner in called]
    replaceable += [getattr(*it) for it in functions if it[0] is module and hasattr(*it)]
    return Code(
        names=names,
        causal=classes["causal"],
        model=classes["model"],
        parts={name: owner for name, owner in classes.items() if name not in ("causal", "model")},
        functions=functions,
        at_import=values(functions, others["implementation"]),
        was_own=all(
            it.__module__.startswith(("transformers.", "torch.", "gptq.")) for it in replaceable
        ),
        **others,
    )


def _like_llama(
    module: ModuleType,
    prefix: str,
    windows: Callable[[Any], list[int | None]],
    has_head_norms: bool = False,
) -> Code:
    """The code of a module of transformers whose classes begin with `prefix`."""
    names = _LLAMA
    if has_head_norms:
        names = replace(names, norms=(*names.norms, *_HEAD_NORMS))
    classes = {
        "causal": getattr(module, f"{prefix}ForCausalLM"),
        "model": getattr(module, f"{prefix}Model"),
        "": getattr(module, f"{prefix}DecoderLayer"),
        **dict.fromkeys(names.norms, getattr(module, f"{prefix}RMSNorm")),
        "self_attn": getattr(module, f"{prefix}Attention"),
        "mlp": getattr(module, f"{prefix}MLP"),
        "mlp.act_fn": type(ACT2FN["silu"]),
    }
    functions: tuple[Function, ...] = (
        *((module, name) for name in ("apply_rotary_pos_emb", "rotate_half")),
        (module, "create_sliding_window_causal_mask"),
        (module, "ALL_ATTENTION_FUNCTIONS"),
        (sdpa_attention, "sdpa_attention_forward"),
        (sdpa_attention, "repeat_kv"),
        *((nn.functional, name) for name in ("scaled_dot_product_attention", "silu")),
    )
    return _code(
        module,
        names,
        classes,
        functions,
        output=CausalLMOutputWithPast,
        needed={"": {"training": False}, "self_attn": {"training": False}},
        implementation="sdpa",
        windows=windows,
        slopes=None,
    )


def _slopes(heads: int, device: torch.device) -> Tensor:
    mask = torch.ones((1, 2), device=device)
    # ALiBi terms grow from 0 at the first position by a slope for each.
    return modeling_bloom.build_alibi_tensor(mask, heads, torch.float32)[:, 0, 1].contiguous()


def _bloom() -> Code:
    module: Any = modeling_bloom
    classes = {
        "causal": module.BloomForCausalLM,
        "model": module.BloomModel,
        "": module.BloomBlock,
        **dict.fromkeys(_BLOOM.norms, nn.LayerNorm),
        "self_attention": module.BloomAttention,
        "self_attention.attention_dropout": nn.Dropout,
        "mlp": module.BloomMLP,
        "mlp.gelu_impl": module.BloomGelu,
    }
    functions: tuple[Function, ...] = (
        *((module, name) for name in ("dropout_add", "bloom_gelu_forward", "GeLUFunction")),
        (module.GeLUFunction, "forward"),
        *((module.BloomAttention, name) for name in ("_reshape", "_merge_heads")),
        *((module, name) for name in ("build_alibi_tensor", "_get_alibi_slopes")),
        (module.BloomModel, "build_alibi_tensor"),
        *((nn.functional, name) for name in ("layer_norm", "softmax", "dropout")),
        (Tensor, "baddbmm"),
        (torch, "bmm"),
    )
    usual = {"training": False, "slow_but_exact": False}
    return _code(
        module,
        _BLOOM,
        classes,
        functions,
        output=CausalLMOutputWithCrossAttentions,
        needed={
            "": {"training": False, "apply_residual_connection_post_layernorm": False},
            "self_attention": {**usual, "beta": 1.0},
            "self_attention.attention_dropout": {"training": False},
            "mlp": usual,
        },
        implementation="eager",
        windows=_no_windows,
        slopes=_slopes,
    )


CODES = {
    code.causal: code
    for code in (
        _like_llama(modeling_llama, "Llama", _no_windows),
        _like_llama(modeling_mistral, "Mistral", _same_windows),
        _like_llama(modeling_qwen2, "Qwen2", _windows_by_type),
        _like_llama(modeling_qwen3, "Qwen3", _windows_by_type, has_head_norms=True),
        _bloom(),
    )
}
"""By the class of the whole model."""
