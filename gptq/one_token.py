"""Token after token through LLaMA blocks of packed layers on a CPU: each block in one native call.

A small model's time goes to what Python and torch do between its products. Blocks stay those of
transformers, so that generate and all else remain what users know; where exactly one token is asked
for, with nothing watching, what they compute is computed by quant_cuda.block.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.llama import modeling_llama

from gptq.qlinear import QuantLinear
from quant_cuda import cpu, native
from quant_cuda.block import Block
from quant_cuda.weight import PreparedWeight

# In the order of quant_cuda.block.WEIGHTS.
_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
SMALLEST_ROOM = 64  # tokens


def install(model: PreTrainedModel) -> None:
    """Let a model's LLaMA blocks take single tokens in one call, where there is compiled code."""
    if not native.compiled():
        return
    for module in model.modules():
        if type(module) is modeling_llama.LlamaDecoderLayer:
            module.__class__ = LlamaDecoderLayer


class LlamaDecoderLayer(modeling_llama.LlamaDecoderLayer):
    """transformers' block; it has its name, by which others know it."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers."""
        is_one = not args and hidden_states.shape[:2] == (1, 1)
        # What is traced must not meet what follows.
        if is_one and not self.training and not torch.compiler.is_compiling():
            cache: Any = kwargs.get("cache", kwargs.get("past_key_values"))
            known = _known_of(self)
            if known.block is not None and _fits(hidden_states, cache, known.index, kwargs):
                held = cache.layers[known.index]
                return _step(known.block, hidden_states, held, *kwargs["position_embeddings"])
        return super().forward(hidden_states, *args, **kwargs)


def _fits(x: Tensor, cache: Any, index: int, arguments: dict[str, Any]) -> bool:
    """Whether x is one token after others that a plain cache holds, nothing masked or watched."""
    if (
        x.dtype != torch.float32
        or x.device.type != "cpu"
        or arguments.get("attention_mask") is not None
        or arguments.get("output_attentions")
        or torch.is_grad_enabled()
        or not cpu.is_plain(x, None)
        or type(cache) is not DynamicCache
        or index >= len(cache.layers)
    ):
        return False
    held = cache.layers[index]
    if type(held) is not DynamicLayer or not held.is_initialized:
        return False
    keys, values = cast(Tensor, held.keys), cast(Tensor, held.values)
    cos, sin = arguments["position_embeddings"]
    return (
        keys.numel() > 0
        and len(keys) == 1
        and keys.dtype == values.dtype == cos.dtype == sin.dtype == torch.float32
        and cos.numel() == sin.numel() == keys.shape[3]
        and keys.device.type == "cpu"
    )


# A block's weights -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """What is known of a layer while nobody changes it."""

    places: tuple[tuple[dict, str, object], ...]
    """Dictionaries of its modules, and what has to be found in them."""
    hooks: tuple[dict, ...]
    """Of its modules, which native code would pass by."""
    is_hooked: bool
    block: Block | None
    """None where there are hooks or one of its modules is of another kind."""
    index: int

    def holds(self) -> bool:
        return any(map(len, self.hooks)) == self.is_hooked and all(
            held.get(name) is it for held, name, it in self.places
        )


# Not in the layers themselves, which can be copied and pickled.
_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def _known_of(layer: LlamaDecoderLayer) -> _Known:
    known = _known.get(layer)
    if known is None or not known.holds():
        known = _known[layer] = _look(layer)
    return known


def _look(layer: LlamaDecoderLayer) -> _Known:
    paths = [*_LINEARS, *_NORMS, "self_attn", "mlp"]
    modules = [layer.get_submodule(path) for path in paths]
    linears, norms = modules[: len(_LINEARS)], modules[len(_LINEARS) : -2]
    attention = layer.self_attn
    hooks = tuple(hooks for it in modules for hooks in (it._forward_hooks, it._forward_pre_hooks))
    is_hooked = any(map(len, hooks))
    config = attention.config
    is_usual = (
        all(type(it) is QuantLinear for it in linears)
        and all(type(it) is modeling_llama.LlamaRMSNorm for it in norms)
        and not is_hooked
        and not any("forward" in vars(it) for it in modules)
        and config.hidden_act == "silu"
        and config._attn_implementation in ("sdpa", "eager")
    )
    block = _make(cast(list[QuantLinear], linears), norms, attention) if is_usual else None
    places: list[tuple[dict, str, object]] = []
    for path, it in zip(paths, modules, strict=True):
        parent, _, name = path.rpartition(".")
        places.append((layer.get_submodule(parent)._modules, name, it))
        own, names = vars(it), ["forward"]
        if it in linears:
            names += ["_prepared", "backend", "int8_activations"]
            places.append((it._buffers, "bias", it._buffers.get("bias")))
        elif it in norms:
            places.append((it._parameters, "weight", it._parameters.get("weight")))
        places += ((own, name, own.get(name)) for name in names)
    return _Known(tuple(places), hooks, is_hooked, block, attention.layer_idx)


def _make(
    linears: Sequence[QuantLinear], norms: Sequence[nn.Module], attention: Any
) -> Block | None:
    weights = [linear.prepare() for linear in linears]
    ready = [it for it in weights if isinstance(it, PreparedWeight) and it.layout == cpu.LAYOUT]
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


def _step(block: Block, x: Tensor, held: Any, cos: Tensor, sin: Tensor) -> Tensor:
    room, length = _room_of(held), held.keys.shape[2]
    y = block.step(
        x.contiguous(), cos.contiguous(), sin.contiguous(), room.keys, room.values, length
    )
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
