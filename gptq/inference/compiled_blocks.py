"""The weights of blocks as compiled code takes them, made once and checked for each token."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from gptq.inference.own_code import Code, is_observed
from gptq.nn import QuantLinear
from quant_cuda.cpu import decoder_block as on_cpu
from quant_cuda.cpu import layout
from quant_cuda.cuda import decoder_block as on_gpu
from quant_cuda.cuda import library as gpu_library
from quant_cuda.weight import PreparedWeight

Block = on_cpu.Block | on_gpu.Block

# In the order of WEIGHTS and NORMS of both decoder_block modules, which compiled code relies on.
_LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
# Attributes of modules that a block is made from.
_ATTRIBUTES = {
    "": ("training",),
    "self_attn": ("training", "scaling", "head_dim", "layer_idx", "config"),
    **dict.fromkeys((*_NORMS, *_HEAD_NORMS), ("variance_epsilon",)),
    **dict.fromkeys(_LINEARS, ("_prepared", "backend", "int8_activations")),
}


def _norms(code: Code) -> tuple[str, ...]:
    return (*_NORMS, *(_HEAD_NORMS if code.has_head_norms else ()))


def _classes(code: Code) -> dict[str, type]:
    """Of all that a block consists of, by its name in the block."""
    return {
        "": code.layer,
        **dict.fromkeys(_norms(code), code.norm),
        "self_attn": code.attention,
        "mlp": code.mlp,
        "mlp.act_fn": type(ACT2FN["silu"]),
        **dict.fromkeys(_LINEARS, QuantLinear),
    }


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


def blocks_of(layers: nn.ModuleList, config: object, code: Code) -> list[Block] | None:
    """The blocks of all layers in their order, of one device; None if compiled code cannot replace
    them all.

    config: the one that the attention of each layer must have.
    """
    blocks = []
    for index, layer in enumerate(layers):
        cached = _cache.get(layer)
        if cached is None or not cached.is_valid():
            cached = _cache[layer] = _inspect(layer, code)
        # -----------------------------------------------------------------------------------------
        # Why the order is checked: a module finds its keys and values in the cache by its own
        # layer_idx, compiled code by the position in the list. The two differ if a user has
        # reordered or repeated layers.
        # -----------------------------------------------------------------------------------------
        if cached.block is None or cached.index != index or cached.config is not config:
            return None
        blocks.append(cached.block)
    return blocks if len(set(map(type, blocks))) == 1 else None


def _inspect(layer: nn.Module, code: Code) -> _CachedLayer:
    """The block of a decoder layer if it is of the usual kind, and what tells that it changed."""
    expected = _classes(code)
    try:
        modules = {path: layer.get_submodule(path) for path in expected}
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
        classes == tuple(expected.values())
        and not any(map(is_observed, modules.values()))
        and not layer.training
        and not attention.training
    ):
        linears = [cast(QuantLinear, modules[path]) for path in _LINEARS]
        norms = [modules[path] for path in _norms(code)]
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
        elif path in (*_NORMS, *_HEAD_NORMS):
            checks.append((module._parameters, "weight", module._parameters.get("weight")))
        attributes = vars(module)
        names = ("forward", "_compiled_call_impl", *_ATTRIBUTES.get(path, ()))
        checks += ((attributes, name, attributes.get(name)) for name in names)
    return tuple(zip(*checks, strict=True))


def _make_block(
    linears: Sequence[QuantLinear], norms: Sequence[nn.Module], attention: Any
) -> Block | None:
    """The block of these modules; None if their types or settings are not those that compiled code
    takes."""
    weights = [linear.prepare() for linear in linears]
    prepared = [weight for weight in weights if isinstance(weight, PreparedWeight)]
    norm_weights = [cast(Tensor, norm.weight).detach() for norm in norms]
    biases = [linear._buffers["bias"] for linear in linears]
    # Read in place: a copy would not follow what people change.
    in_place = [*norm_weights, *(bias for bias in biases if bias is not None)]
    (dtype, *others) = {tensor.dtype for tensor in in_place}
    int8, *different = {linear.int8_activations for linear in linears}
    if (
        len(prepared) != len(weights)
        or any(linear.backend is not None for linear in linears)
        or others
        or different
        or not all(tensor.is_contiguous() for tensor in in_place)
    ):
        return None
    with_epsilons = [
        (weight, cast(Any, norm).variance_epsilon)
        for weight, norm in zip(norm_weights, norms, strict=True)
    ]
    parts = (prepared, biases, with_epsilons, attention.head_dim, attention.scaling)
    if dtype == torch.float32 and all(weight.layout == layout.LAYOUT for weight in prepared):
        return on_cpu.Block(*parts, int8=int8)
    if (
        dtype in (torch.float16, torch.bfloat16)
        and not int8
        and gpu_library.available()
        and on_gpu.refuses(prepared, attention.head_dim) is None
        # The kernels load 16 bytes of them at a time.
        and all(weight.data_ptr() % 16 == 0 for weight in norm_weights)
    ):
        return on_gpu.Block(*parts)
    return None
