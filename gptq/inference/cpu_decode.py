"""Decoding on a CPU: all LLaMA blocks of packed layers in one call of compiled code per token.

A small model spends most of a token's time in what Python and torch do between its matmuls. The
model stays the one of transformers, so that generate and all else work as users know them. Only if
exactly one token is asked for and nothing observes the blocks, quant_cuda.cpu.decoder_block
computes what they would.
"""

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama import modeling_llama

from gptq.inference.kv_buffer import kv_buffer
from gptq.inference.llama_code import (
    ATTENTION,
    BLOCK_CLASSES,
    has_global_state,
    is_observed,
    is_own,
)
from gptq.nn import QuantEmbedding, QuantLinear
from quant_cuda.cpu import decoder_block, layout, library, product
from quant_cuda.cpu.decoder_block import Block
from quant_cuda.weight import PreparedWeight

# In the order of quant_cuda.cpu.decoder_block.WEIGHTS, which compiled code relies on.
_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
# What a block calls, and the classes of all that it consists of, in the order of BLOCK_CLASSES.
_PATHS = (
    ("",),
    _NORMS,
    ("self_attn",),
    ("mlp",),
    ("mlp.act_fn",),
    _LINEARS,
)
_CLASS_OF = {
    path: kind for paths, kind in zip(_PATHS, BLOCK_CLASSES, strict=True) for path in paths
}
# Attributes of modules that a block is made from.
_ATTRIBUTES = {
    "": ("training",),
    "self_attn": ("training", "scaling", "head_dim", "layer_idx", "config"),
    **dict.fromkeys(_NORMS, ("variance_epsilon",)),
    **dict.fromkeys(_LINEARS, ("_prepared", "backend", "int8_activations")),
}
# Settings that make a model return what the blocks compute in between.
_RECORDING = ("output_attentions", "output_hidden_states")
# transformers 5.24 has renamed the argument and the field of the output.
CACHE_NAME = (
    "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)


def install(model: PreTrainedModel) -> None:
    """Let a LLaMA model decode single tokens in compiled code; other models stay as they are."""
    if not library.compiled():
        return
    if type(model) is modeling_llama.LlamaForCausalLM:
        # -----------------------------------------------------------------------------------------
        # Why the class of the model is replaced: its forward has to change, but the model must stay
        # the object that its owner holds, and an instance of transformers' class, which generate,
        # save_pretrained and PEFT expect. A wrapper would be neither. pickle finds the new class by
        # its module and name.
        # -----------------------------------------------------------------------------------------
        model.__class__ = LlamaForCausalLM


class LlamaForCausalLM(modeling_llama.LlamaForCausalLM):
    """transformers' model, under its name too, which save_pretrained writes to config.json."""

    # generate reads from the signature which arguments it may pass.
    @functools.wraps(modeling_llama.LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        output = _one_token(self, *args, **kwargs)
        return super().forward(*args, **kwargs) if output is None else output


def _one_token(
    model: LlamaForCausalLM, input_ids: Any = None, *others: Any, **arguments: Any
) -> CausalLMOutputWithPast | None:
    """What transformers' forward returns for one token; None if it has to compute that itself.

    Embedding, rotary terms, last norm and head are the model's modules. The blocks alone are not
    called: no module is changed meanwhile, since other threads may be using them.
    """
    embeds, cache = arguments.pop("inputs_embeds", None), arguments.pop(CACHE_NAME, None)
    given = input_ids if embeds is None else embeds
    if others or type(given) is not Tensor or given.shape[:2] != (1, 1):
        return None
    if (input_ids is not None and embeds is not None) or given.device.type != "cpu":
        return None
    if torch.is_grad_enabled() or has_global_state() or not product.is_plain(given, None):
        return None
    if not _is_usual_model(model) or not _is_plain_cache(cache, model.config.num_hidden_layers):
        return None
    length = cache.layers[0].keys.shape[2]
    positions = arguments.pop("position_ids", None)
    if not _are_usual(arguments, positions, length):
        return None
    blocks = _blocks(model)
    if blocks is None:
        return None
    inner = model.model
    x = inner.embed_tokens(given) if embeds is None else embeds
    if positions is None:
        positions = torch.full((1, 1), length)
    cos, sin = inner.rotary_emb(x, position_ids=positions)
    if not (product.is_plain(x, None) and _fit(x, cos, sin, cache.layers[0].keys.shape[3])):
        return None
    x = inner.norm(_run_blocks(blocks, x, cache.layers, cos, sin))
    return CausalLMOutputWithPast(logits=model.lm_head(x), **{CACHE_NAME: cache})


def _is_usual_model(model: LlamaForCausalLM) -> bool:
    """Whether transformers' code would call the blocks of this model one after another."""
    config, inner = cast(Any, model.config), model.model
    return (
        is_own()
        and type(inner) is modeling_llama.LlamaModel
        and inner.config is config
        and config._attn_implementation == ATTENTION
        and not any(getattr(config, name, False) for name in _RECORDING)
        and getattr(config, "return_dict", True) is True
        and type(inner.layers) is nn.ModuleList
        and len(inner.layers) == config.num_hidden_layers
        and type(inner.embed_tokens) in (nn.Embedding, QuantEmbedding)
        and not any(map(is_observed, (inner, inner.embed_tokens)))
    )


def _are_usual(arguments: dict[str, Any], positions: Any, length: int) -> bool:
    """Whether the arguments are those of generate for a token after `length` others, all seen."""
    mask, keep = arguments.pop("attention_mask", None), arguments.pop("logits_to_keep", 0)
    usual = arguments.pop("use_cache", None) is not False
    usual = usual and arguments.pop("return_dict", None) in (None, True)
    return (
        usual
        and type(keep) is int
        and keep in (0, 1)
        and all(value is None or value is False for value in arguments.values())
        and (positions is None or (type(positions) is Tensor and positions.shape == (1, 1)))
        and (mask is None or (type(mask) is Tensor and mask.shape == (1, length + 1)))
        and (mask is None or bool(mask.all()))
    )


def _is_plain_cache(cache: Any, count: int) -> bool:
    """Whether all of `count` layers hold equally many tokens of one sequence in float32."""
    if type(cache) is not DynamicCache or len(cache.layers) != count or count == 0:
        return False
    layers: list[Any] = cache.layers
    if getattr(cache, "offloading", False) or "update" in vars(cache):
        return False
    if any(
        type(layer) is not DynamicLayer or not layer.is_initialized or "update" in vars(layer)
        for layer in layers
    ):
        return False
    shape = (1, *layers[0].keys.shape[1:])
    return 0 not in shape and all(
        states.shape == shape and states.dtype == torch.float32 and states.device.type == "cpu"
        for layer in layers
        for states in (layer.keys, layer.values)
    )


def _fit(x: Tensor, cos: Tensor, sin: Tensor, head_dim: int) -> bool:
    """Whether a token and its rotary terms are such as compiled code takes."""
    return (
        x.dtype == cos.dtype == sin.dtype == torch.float32
        and cos.device.type == "cpu"
        and cos.numel() == sin.numel() == head_dim
    )


# A block's weights -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _CachedLayer:
    """The block made from a decoder layer, valid until somebody changes the layer.

    Making a block takes far longer than a token; checking that it is still valid does not.
    """

    checks: tuple[tuple[dict, ...], tuple[str, ...], tuple[object, ...]]
    """Dictionaries of the layer's modules, a key in each, and the value that it must have."""
    modules: tuple[nn.Module, ...]
    classes: tuple[type, ...]
    """Of the modules."""
    tensors: tuple[Tensor, ...]
    """Those that compiled code reads in place."""
    addresses: tuple[int, ...]
    """Of the tensors' memory, which `tensor.data = ...` replaces."""
    hooks: tuple[dict, ...]
    """The modules' own dictionaries of hooks, which compiled code would not call."""
    had_hooks: bool
    block: Block | None
    """None for a layer that compiled code cannot replace, or that has hooks."""
    index: int
    """The layer's own layer_idx."""
    config: object
    """Of its attention."""

    def is_valid(self) -> bool:
        # -----------------------------------------------------------------------------------------
        # Why identity of values: a block points to the memory of prepared weights, biases and
        # norms. A new tensor or module at an old name is another object; this record holds the old
        # one, so that its address cannot be used again. Scales of a norm that change in place are
        # read through the pointer. map() over three tuples spares a Python loop for every layer
        # and token.
        # -----------------------------------------------------------------------------------------
        dictionaries, names, values = self.checks
        return (
            all(map(operator.is_, map(dict.get, dictionaries, names), values))
            and any(self.hooks) == self.had_hooks
            and tuple(map(type, self.modules)) == self.classes
            and tuple(map(Tensor.data_ptr, self.tensors)) == self.addresses
        )


# Not valid for the next token: it has no hooks, but says that it had.
_UNKNOWN = _CachedLayer(
    checks=((), (), ()),
    modules=(),
    classes=(),
    tensors=(),
    addresses=(),
    hooks=(),
    had_hooks=True,
    block=None,
    index=0,
    config=None,
)
# Apart from the layers, since layers can be copied and pickled, and pointers cannot.
_cache: WeakKeyDictionary[nn.Module, _CachedLayer] = WeakKeyDictionary()


def _blocks(model: LlamaForCausalLM) -> list[Block] | None:
    """The blocks of all layers in their order; None if compiled code cannot replace them all."""
    blocks = []
    for index, layer in enumerate(model.model.layers):
        cached = _cache.get(layer)
        if cached is None or not cached.is_valid():
            cached = _cache[layer] = _inspect(layer)
        # -----------------------------------------------------------------------------------------
        # Why the order is checked: a module finds its keys and values in the cache by its own
        # layer_idx, compiled code by the position in the list. The two differ if a user has
        # reordered or repeated layers.
        # -----------------------------------------------------------------------------------------
        if cached.block is None or cached.index != index or cached.config is not model.config:
            return None
        blocks.append(cached.block)
    return blocks


def _inspect(layer: nn.Module) -> _CachedLayer:
    """The block of a decoder layer if it is of the usual kind, and what tells that it changed."""
    try:
        modules = {path: layer.get_submodule(path) for path in _CLASS_OF}
        attention: Any = modules["self_attn"]
        index, config = attention.layer_idx, attention.config
    except AttributeError:
        # Of another kind altogether.
        return _UNKNOWN
    hooks = tuple(
        hooks
        for module in modules.values()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    )
    classes = tuple(map(type, modules.values()))
    block, tensors = None, cast(tuple[Tensor, ...], ())
    if (
        classes == tuple(_CLASS_OF.values())
        and not any(map(is_observed, modules.values()))
        and not layer.training
        and not attention.training
    ):
        linears = [cast(QuantLinear, modules[path]) for path in _LINEARS]
        norms = [modules[path] for path in _NORMS]
        biases = [linear._buffers["bias"] for linear in linears]
        norm_weights = [cast(Tensor, norm.weight) for norm in norms]
        tensors = (*norm_weights, *(bias for bias in biases if bias is not None))
        block = _make_block(linears, norms, attention)
    return _CachedLayer(
        # After the block is made, which prepares the weights that are compared.
        checks=_checks(layer, modules),
        modules=tuple(modules.values()),
        classes=classes,
        tensors=tensors,
        addresses=tuple(map(Tensor.data_ptr, tensors)),
        hooks=hooks,
        had_hooks=any(hooks),
        block=block,
        index=index,
        config=config,
    )


def _checks(layer: nn.Module, modules: dict[str, nn.Module]) -> Any:
    """`_CachedLayer.checks` of a layer as it is now."""
    checks: list[tuple[dict, str, object]] = []
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        if name:
            checks.append((layer.get_submodule(parent)._modules, name, module))
        if path in _LINEARS:
            checks.append((module._buffers, "bias", module._buffers.get("bias")))
        elif path in _NORMS:
            checks.append((module._parameters, "weight", module._parameters.get("weight")))
        attributes = vars(module)
        names = ("forward", "_compiled_call_impl", *_ATTRIBUTES.get(path, ()))
        checks += ((attributes, name, attributes.get(name)) for name in names)
    return tuple(zip(*checks, strict=True))


def _make_block(
    linears: Sequence[QuantLinear], norms: Sequence[nn.Module], attention: Any
) -> Block | None:
    """The block of these modules; None if a weight is not in the CPU's layout, or if their types or
    settings are not those that compiled code takes."""
    weights = [linear.prepare() for linear in linears]
    prepared = [
        weight
        for weight in weights
        if isinstance(weight, PreparedWeight) and weight.layout == layout.LAYOUT
    ]
    norm_weights = [cast(Tensor, norm.weight).detach() for norm in norms]
    biases = [linear._buffers["bias"] for linear in linears]
    # Read in place: a copy would not follow what people change.
    in_place = [*norm_weights, *(bias for bias in biases if bias is not None)]
    if (
        len(prepared) != len(weights)
        or any(linear.backend is not None for linear in linears)
        or len({linear.int8_activations for linear in linears}) > 1
        or any(it.dtype != torch.float32 or not it.is_contiguous() for it in in_place)
    ):
        return None
    return Block(
        prepared,
        biases,
        [
            (weight, cast(Any, norm).variance_epsilon)
            for weight, norm in zip(norm_weights, norms, strict=True)
        ],
        attention.head_dim,
        attention.scaling,
        int8=linears[0].int8_activations,
    )


def _run_blocks(
    blocks: list[Block], x: Tensor, layers: list[Any], cos: Tensor, sin: Tensor
) -> Tensor:
    """x (1, 1, hidden) through all blocks, which append its keys and values to the cache's layers.

    cos, sin: float32 (1, 1, head_dim), the rotary terms of x's position.
    """
    length = layers[0].keys.shape[2]
    buffers = [kv_buffer(layer) for layer in layers]
    caches = [(buffer.keys, buffer.values) for buffer in buffers]
    cos, sin = cos.contiguous(), sin.contiguous()
    y = decoder_block.run(blocks, x.contiguous(), cos, sin, caches, length)
    for layer, buffer in zip(layers, buffers, strict=True):
        buffer.length = length + 1
        layer.keys = buffer.keys[:, :, : length + 1]
        layer.values = buffer.values[:, :, : length + 1]
    return y
