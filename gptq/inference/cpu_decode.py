"""Token after token through LLaMA blocks of packed layers on a CPU: all of them in one native call.

A small model's time goes to what Python and torch do between its products. Models stay those of
transformers, so that generate and all else remain what users know; where exactly one token is asked
for, with nothing watching, what their blocks compute is computed by quant_cuda.cpu.decoder_block.
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
from quant_cuda.cpu import decoder_block as block
from quant_cuda.cpu import layout, library, product
from quant_cuda.cpu.decoder_block import Block
from quant_cuda.weight import PreparedWeight

# In the order of quant_cuda.cpu.decoder_block.WEIGHTS.
_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
SMALLEST_ROOM = 64  # tokens


def install(model: PreTrainedModel) -> None:
    """Let a model's LLaMA blocks take single tokens in one call, where there is compiled code."""
    if not library.compiled():
        return
    if type(model) is modeling_llama.LlamaForCausalLM:
        model.__class__ = LlamaForCausalLM


class LlamaForCausalLM(modeling_llama.LlamaForCausalLM):
    """transformers' model; it has its name, by which others know it."""

    # Its signature tells generate what there is to give.
    @functools.wraps(modeling_llama.LlamaForCausalLM.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        inputs = args[0] if args else kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        # What is traced must not meet what follows.
        if inputs is None or inputs.shape[:2] != (1, 1) or torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)
        # Found before the module of that name, for as long as transformers goes through its blocks.
        inner = vars(self.model)
        inner["layers"] = _Stack(cast(nn.ModuleList, inner["_modules"]["layers"]))
        try:
            return super().forward(*args, **kwargs)
        finally:
            inner.pop("layers", None)  # gone where two threads were here


class _Stack:
    """All blocks of a model, in place of a list of them: one that does what they would in turn."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self.layers = layers

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice) and range(len(self))[index] == range(len(self)):
            return [self]
        return self.layers[index]

    def __iter__(self) -> Iterator["_Stack"]:
        return iter([self])

    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
        if _fits(x, cache, len(self), kwargs) and not _globally_watched():
            known = [_known_of(layer) for layer in self.layers]
            blocks = [it.block for it in known if it.block is not None]
            # Layers in another order, or repeated, have other places in a cache than their own.
            in_order = [it.index for it in known] == list(range(len(blocks)))
            if in_order and _alike(cache.layers, *kwargs["position_embeddings"]):
                return _step(blocks, x, cache.layers, *kwargs["position_embeddings"])
        for layer in self.layers:
            x = layer(x, **kwargs)
        return x


def _fits(x: Tensor, cache: Any, count: int, arguments: dict[str, Any]) -> bool:
    """Whether x is one token after others that a plain cache holds, nothing masked or asked for."""
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


def _alike(layers: list[Any], cos: Tensor, sin: Tensor) -> bool:
    """Whether all layers of a cache hold as many tokens, of one sequence and in float32."""
    if any(type(held) is not DynamicLayer or not held.is_initialized for held in layers):
        return False
    shape = (1, *layers[0].keys.shape[1:])
    return (
        0 not in shape
        and cos.numel() == sin.numel() == shape[3]
        and cos.dtype == sin.dtype == torch.float32
        and all(
            kept.shape == shape and kept.dtype == torch.float32 and kept.device.type == "cpu"
            for held in layers
            for kept in (held.keys, held.values)
        )
    )


def _globally_watched() -> bool:
    """Whether there are hooks of all modules."""
    its = nn.modules.module
    return bool(its._global_forward_hooks or its._global_forward_pre_hooks)


# A block's weights -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """What is known of a layer while nobody changes it."""

    places: tuple[tuple[dict, ...], tuple[str, ...], tuple[object, ...]]
    """Dictionaries of its modules, and by which names what has to be found in them."""
    hooks: tuple[dict, ...]
    """Of its modules, which native code would pass by."""
    is_hooked: bool
    block: Block | None
    """None where there are hooks or one of its modules is of another kind."""
    index: int

    def holds(self) -> bool:
        dictionaries, names, its = self.places
        same = all(map(operator.is_, map(dict.get, dictionaries, names), its))
        return same and any(self.hooks) == self.is_hooked


# Not in the layers themselves, which can be copied and pickled.
_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _known_of(layer: nn.Module) -> _Known:
    known = _known.get(layer)
    if known is None or not known.holds():
        known = _known[layer] = _look(layer)
    return known


def _look(layer: nn.Module) -> _Known:
    paths = [*_LINEARS, *_NORMS, "self_attn", "mlp", ""]
    if type(layer) is not modeling_llama.LlamaDecoderLayer:
        return _Known(((), (), ()), (), False, None, 0)
    modules = [layer.get_submodule(path) for path in paths]
    linears, norms = modules[: len(_LINEARS)], modules[len(_LINEARS) : -3]
    attention = layer.self_attn
    hooks = tuple(hooks for it in modules for hooks in (it._forward_hooks, it._forward_pre_hooks))
    is_hooked = any(hooks)
    config = attention.config
    is_usual = (
        all(type(it) is QuantLinear for it in linears)
        and all(type(it) is modeling_llama.LlamaRMSNorm for it in norms)
        and not is_hooked
        and not any("forward" in vars(it) for it in modules)
        and not layer.training
        and config.hidden_act == "silu"
        and config._attn_implementation in ("sdpa", "eager")
    )
    made = _make(cast(list[QuantLinear], linears), norms, attention) if is_usual else None
    places: list[tuple[dict, str, object]] = []
    for path, it in zip(paths, modules, strict=True):
        parent, _, name = path.rpartition(".")
        if name:
            places.append((layer.get_submodule(parent)._modules, name, it))
        own, names = vars(it), ["forward", *(["training"] if it is layer else [])]
        if it in linears:
            names += ["_prepared", "backend", "int8_activations"]
            places.append((it._buffers, "bias", it._buffers.get("bias")))
        elif it in norms:
            places.append((it._parameters, "weight", it._parameters.get("weight")))
        places += ((own, name, own.get(name)) for name in names)
    known = cast(Any, tuple(zip(*places, strict=True)))
    return _Known(known, hooks, is_hooked, made, attention.layer_idx)


def _make(
    linears: Sequence[QuantLinear], norms: Sequence[nn.Module], attention: Any
) -> Block | None:
    weights = [linear.prepare() for linear in linears]
    ready = [it for it in weights if isinstance(it, PreparedWeight) and it.layout == layout.LAYOUT]
    gains = [cast(Tensor, norm.weight).detach() for norm in norms]
    if (
        len(ready) != len(weights)
        or any(linear.backend is not None for linear in linears)
        or len({linear.int8_activations for linear in linears}) > 1
        or any(gain.dtype != torch.float32 for gain in gains)
    ):
        return None
    biases = [it.bias if it.bias is None else it.bias.float().contiguous() for it in linears]
    both = [
        (gain.contiguous(), cast(Any, norm).variance_epsilon)
        for gain, norm in zip(gains, norms, strict=True)
    ]
    int8 = linears[0].int8_activations
    return Block(ready, biases, both, attention.head_dim, attention.scaling, int8)


# The cache -------------------------------------------------------------------------------------


@dataclass
class _Room:
    """Keys and values, float32 (1, heads, capacity, head_dim), with room for more tokens: what a
    cache holds of them are views."""

    keys: Tensor
    values: Tensor
    filled: int
    """Tokens written. Where a cache has fewer, it or a copy of it took another way."""


def _step(blocks: list[Block], x: Tensor, layers: list[Any], cos: Tensor, sin: Tensor) -> Tensor:
    length = layers[0].keys.shape[2]
    rooms = [_room_of(held) for held in layers]
    caches = [(room.keys, room.values) for room in rooms]
    y = block.run(blocks, x.contiguous(), cos.contiguous(), sin.contiguous(), caches, length)
    for held, room in zip(layers, rooms, strict=True):
        room.filled = length + 1
        held.keys, held.values = room.keys[:, :, : length + 1], room.values[:, :, : length + 1]
    return y


def _room_of(held: Any) -> _Room:
    """Room for one more token behind those that a cache's layer holds."""
    keys, values = held.keys, held.values
    room = held.__dict__.get("_room")
    length = keys.shape[2]
    if (
        room is not None
        and room.filled == length < room.keys.shape[2]
        and room.keys.data_ptr() == keys.data_ptr()
        and room.values.data_ptr() == values.data_ptr()
    ):
        return room
    shape = (1, keys.shape[1], max(SMALLEST_ROOM, 2 * length), keys.shape[3])
    room = _Room(keys.new_empty(shape), values.new_empty(shape), length)
    room.keys[:, :, :length], room.values[:, :, :length] = keys, values
    held.__dict__["_room"] = room
    return room
