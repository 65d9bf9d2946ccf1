"""Decoding on a CPU: all LLaMA blocks of packed layers in one call of compiled code per token.

A small model spends most of a token's time in what Python and torch do between its matmuls. The
model stays the one of transformers, so that generate and all else work as users know them. Only if
exactly one token is asked for and nothing observes the blocks, quant_cuda.cpu.decoder_block
computes what they would.
"""

import functools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.llama import modeling_llama

from gptq.nn import QuantLinear
from quant_cuda.cpu import decoder_block, layout, library, product
from quant_cuda.cpu.decoder_block import Block
from quant_cuda.weight import PreparedWeight

# In the order of quant_cuda.cpu.decoder_block.WEIGHTS, which compiled code relies on.
_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
MIN_CAPACITY = 64  # tokens


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
        inputs = args[0] if args else kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        # torch.compile must trace the modules, not the call of compiled code.
        if inputs is None or inputs.shape[:2] != (1, 1) or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        # -----------------------------------------------------------------------------------------
        # Why "layers" is put in the model's __dict__: transformers' forward loops over self.layers.
        # Python looks in an instance's __dict__ first and asks nn.Module, which has submodules in
        # _modules, only if that fails. During this forward alone self.layers is therefore the
        # stack, while _modules, and with it state_dict, hooks and names, stays untouched.
        # -----------------------------------------------------------------------------------------
        attributes = vars(self.model)
        layers = cast(nn.ModuleList, attributes["_modules"]["layers"])
        attributes["layers"] = _BlockStack(layers)
        try:
            return super().forward(*args, **kwargs)
        finally:
            # With two threads in one model, the first to finish removes it for both. The other may
            # then run the modules themselves, which compute the same.
            attributes.pop("layers", None)


class _BlockStack:
    """All blocks of a model in place of a list of them: its one element runs them all."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        # transformers loops over self.layers[:num_hidden_layers]; any other index is a module.
        if isinstance(index, slice) and range(len(self))[index] == range(len(self)):
            return [self]
        return self.layers[index]

    def __iter__(self) -> Iterator["_BlockStack"]:
        return iter([self])

    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
        if _is_plain_step(x, cache, len(self), kwargs) and not _has_global_hooks():
            cached = [_cached_layer(layer) for layer in self.layers]
            blocks = [layer.block for layer in cached if layer.block is not None]
            # -------------------------------------------------------------------------------------
            # Why the order is checked: a module finds its keys and values in the cache by its own
            # layer_idx, compiled code by the position in the list. The two differ if a user has
            # reordered or repeated layers. A layer without a block makes the list too short.
            # -------------------------------------------------------------------------------------
            in_order = [layer.index for layer in cached] == list(range(len(blocks)))
            if in_order and _is_uniform(cache.layers, *kwargs["position_embeddings"]):
                return _run_blocks(blocks, x, cache.layers, *kwargs["position_embeddings"])
        for layer in self.layers:
            x = layer(x, **kwargs)
        return x


def _is_plain_step(x: Tensor, cache: Any, count: int, arguments: dict[str, Any]) -> bool:
    """Whether x is one token after others in a plain cache of `count` layers, without a mask,
    gradients or attention weights as a result."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and arguments.get("attention_mask") is None
        and not arguments.get("output_attentions")
        and not torch.is_grad_enabled()
        and product.is_plain(x, None)
        and type(cache) is DynamicCache
        and len(cache.layers) == count
    )


def _is_uniform(layers: list[Any], cos: Tensor, sin: Tensor) -> bool:
    """Whether all layers of a cache hold equally many tokens of one sequence in float32, with heads
    as wide as the rotary terms."""
    if any(type(layer) is not DynamicLayer or not layer.is_initialized for layer in layers):
        return False
    shape = (1, *layers[0].keys.shape[1:])
    return (
        0 not in shape
        and cos.numel() == sin.numel() == shape[3]
        and cos.dtype == sin.dtype == torch.float32
        and all(
            states.shape == shape and states.dtype == torch.float32 and states.device.type == "cpu"
            for layer in layers
            for states in (layer.keys, layer.values)
        )
    )


def _has_global_hooks() -> bool:
    """Whether hooks are registered for all modules."""
    module = nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


# A block's weights -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _CachedLayer:
    """The block made from a decoder layer, valid until somebody changes the layer.

    Making a block takes far longer than a token; checking that it is still valid does not.
    """

    checks: tuple[tuple[dict, ...], tuple[str, ...], tuple[object, ...]]
    """Dictionaries of the layer's modules, a key in each, and the value that it must have."""
    hooks: tuple[dict, ...]
    """The modules' own dictionaries of hooks, which compiled code would not call."""
    had_hooks: bool
    block: Block | None
    """None for a layer that compiled code cannot replace, or that has hooks."""
    index: int
    """The layer's own layer_idx."""

    def is_valid(self) -> bool:
        # -----------------------------------------------------------------------------------------
        # Why identity of values: a block points to the memory of prepared weights, biases and
        # norms. A new tensor or module at an old name is another object; this record holds the old
        # one, so that its address cannot be used again. Scales of a norm that change in place are
        # read through the pointer. map() over three tuples spares a Python loop for every layer
        # and token.
        # -----------------------------------------------------------------------------------------
        dictionaries, names, values = self.checks
        unchanged = all(map(operator.is_, map(dict.get, dictionaries, names), values))
        return unchanged and any(self.hooks) == self.had_hooks


# Apart from the layers, since layers can be copied and pickled, and pointers cannot.
_cache: WeakKeyDictionary[nn.Module, _CachedLayer] = WeakKeyDictionary()


def _cached_layer(layer: nn.Module) -> _CachedLayer:
    cached = _cache.get(layer)
    if cached is None or not cached.is_valid():
        cached = _cache[layer] = _inspect(layer)
    return cached


def _inspect(layer: nn.Module) -> _CachedLayer:
    """The block of a decoder layer if it is of the usual kind, and what tells that it changed."""
    if type(layer) is not modeling_llama.LlamaDecoderLayer:
        return _CachedLayer(((), (), ()), (), False, None, 0)
    paths = [*_LINEARS, *_NORMS, "self_attn", "mlp", ""]
    modules = {path: layer.get_submodule(path) for path in paths}
    hooks = tuple(
        hooks
        for module in modules.values()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    )
    had_hooks = any(hooks)
    block = None
    if not had_hooks and _is_usual(layer, modules):
        linears = [cast(QuantLinear, modules[path]) for path in _LINEARS]
        block = _make_block(linears, [modules[path] for path in _NORMS], layer.self_attn)
    # After the block is made, which prepares the weights that are compared.
    checks = _checks(layer, modules)
    return _CachedLayer(checks, hooks, had_hooks, block, layer.self_attn.layer_idx)


def _is_usual(layer: nn.Module, modules: dict[str, nn.Module]) -> bool:
    """Whether a layer computes what compiled code does, with nothing in its modules replaced."""
    config = cast(Any, layer.self_attn).config
    return (
        all(type(modules[path]) is QuantLinear for path in _LINEARS)
        and all(type(modules[path]) is modeling_llama.LlamaRMSNorm for path in _NORMS)
        and not any("forward" in vars(module) for module in modules.values())
        and not layer.training
        and config.hidden_act == "silu"
        and config._attn_implementation in ("sdpa", "eager")
    )


def _checks(layer: nn.Module, modules: dict[str, nn.Module]) -> Any:
    """`_CachedLayer.checks` of a layer as it is now."""
    checks: list[tuple[dict, str, object]] = []
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        if name:
            checks.append((layer.get_submodule(parent)._modules, name, module))
        attributes, names = vars(module), ["forward", *(["training"] if module is layer else [])]
        if path in _LINEARS:
            names += ["_prepared", "backend", "int8_activations"]
            checks.append((module._buffers, "bias", module._buffers.get("bias")))
        elif path in _NORMS:
            checks.append((module._parameters, "weight", module._parameters.get("weight")))
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
    if (
        len(prepared) != len(weights)
        or any(linear.backend is not None for linear in linears)
        or len({linear.int8_activations for linear in linears}) > 1
        or any(weight.dtype != torch.float32 for weight in norm_weights)
    ):
        return None
    return Block(
        prepared,
        [None if it.bias is None else it.bias.float().contiguous() for it in linears],
        [
            (weight.contiguous(), cast(Any, norm).variance_epsilon)
            for weight, norm in zip(norm_weights, norms, strict=True)
        ],
        attention.head_dim,
        attention.scaling,
        int8=linears[0].int8_activations,
    )


# The key-value cache ---------------------------------------------------------------------------


@dataclass
class _KVBuffer:
    """Keys and values with capacity for more tokens; a cache's layer holds views of them.

    transformers appends a token by copying the whole cache; into a buffer only the token is
    written.
    """

    keys: Tensor
    """float32 (1, heads, capacity, head_dim)."""
    values: Tensor
    """As the keys."""
    length: int
    """Tokens written."""


def _run_blocks(
    blocks: list[Block], x: Tensor, layers: list[Any], cos: Tensor, sin: Tensor
) -> Tensor:
    """x (1, 1, hidden) through all blocks, which append its keys and values to the cache's layers.

    cos, sin: float32 (1, 1, head_dim), the rotary terms of x's position.
    """
    length = layers[0].keys.shape[2]
    buffers = [_kv_buffer(layer) for layer in layers]
    caches = [(buffer.keys, buffer.values) for buffer in buffers]
    cos, sin = cos.contiguous(), sin.contiguous()
    y = decoder_block.run(blocks, x.contiguous(), cos, sin, caches, length)
    for layer, buffer in zip(layers, buffers, strict=True):
        buffer.length = length + 1
        layer.keys = buffer.keys[:, :, : length + 1]
        layer.values = buffer.values[:, :, : length + 1]
    return y


def _kv_buffer(layer: Any) -> _KVBuffer:
    """A buffer with the tokens of a cache's layer and capacity for at least one more."""
    keys, values = layer.keys, layer.values
    buffer = layer.__dict__.get("_kv_buffer")
    length = keys.shape[2]
    # ---------------------------------------------------------------------------------------------
    # Why a buffer is not always used again: a cache can be cropped or copied, and a shallow copy
    # shares the buffer. The next token must not overwrite one that another cache still reads, so
    # that only the cache whose length is the buffer's own appends to it. Keys elsewhere in memory
    # were replaced by transformers, which knows nothing of the buffer.
    # ---------------------------------------------------------------------------------------------
    if (
        buffer is not None
        and buffer.length == length < buffer.keys.shape[2]
        and buffer.keys.data_ptr() == keys.data_ptr()
        and buffer.values.data_ptr() == values.data_ptr()
    ):
        return buffer
    shape = (1, keys.shape[1], max(MIN_CAPACITY, 2 * length), keys.shape[3])
    buffer = _KVBuffer(keys.new_empty(shape), values.new_empty(shape), length)
    buffer.keys[:, :, :length], buffer.values[:, :, :length] = keys, values
    layer.__dict__["_kv_buffer"] = buffer
    return buffer
