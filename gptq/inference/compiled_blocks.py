"""The weights of blocks as compiled code takes them, made once and checked for each token."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gptq.inference.own_code import Code, is_observed
from gptq.nn import QuantLinear
from quant_cuda.cpu import decoder_block as on_cpu
from quant_cuda.cpu import layout
from quant_cuda.cuda import decoder_block as on_gpu
from quant_cuda.cuda import library as gpu_library
from quant_cuda.weight import PreparedWeight

Block = on_cpu.Block | on_gpu.Block


def _attributes(code: Code, path: str) -> tuple[str, ...]:
    """Attributes of a part of a layer that a block is made from."""
    names = code.names
    if path == names.attention:
        own: tuple[str, ...] = (names.scale, "head_dim", "num_heads", "layer_idx", "config")
    elif path in names.norms:
        own = (names.epsilon,)
    elif path in names.linears:
        own = ("_prepared", "backend", "int8_activations")
    else:
        own = ()
    return ("forward", "_compiled_call_impl", *own, *code.needed.get(path, ()))


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
    """Of its attention; None if that has none."""

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
        has_other = cached.config is not None and cached.config is not config
        if cached.block is None or cached.index != index or has_other:
            return None
        blocks.append(cached.block)
    return blocks if len(set(map(type, blocks))) == 1 else None


def _inspect(layer: nn.Module, code: Code) -> _CachedLayer:
    """The block of a decoder layer if it is of the usual kind, and what tells that it changed."""
    try:
        modules = {path: layer.get_submodule(path) for path in code.parts}
        attention: Any = modules[code.names.attention]
        index, config = attention.layer_idx, getattr(attention, "config", None)
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
        classes == tuple(code.parts.values())
        and not any(map(is_observed, modules.values()))
        and all(
            getattr(modules[path], name) == value
            for path, needed in code.needed.items()
            for name, value in needed.items()
        )
    ):
        linears = [
            None if path is None else cast(QuantLinear, modules[path])
            for path in code.names.linears
        ]
        norms = [modules[path] for path in code.names.norms]
        tensors = _read_in_place(linears, norms)
        block = _make_block(linears, norms, attention, code)
    return _CachedLayer(
        # After the block is made, which prepares the weights that are compared.
        checks=_checks(layer, modules, code),
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


def _checks(layer: nn.Module, modules: dict[str, nn.Module], code: Code) -> Any:
    """`_CachedLayer.checks` of a layer as it is now."""
    checks: list[tuple[dict, str, object]] = []
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        if name:
            checks.append((layer.get_submodule(parent)._modules, name, module))
        if path in code.names.linears:
            checks.append((module._buffers, "bias", module._buffers.get("bias")))
        elif path in code.names.norms:
            checks += (
                (module._parameters, name, module._parameters.get(name))
                for name in ("weight", "bias")
            )
        attributes = vars(module)
        checks += ((attributes, name, attributes.get(name)) for name in _attributes(code, path))
    return tuple(zip(*checks, strict=True))


def _read_in_place(
    linears: Sequence[QuantLinear | None], norms: Sequence[nn.Module]
) -> tuple[Tensor, ...]:
    """Tensors of 16 or 32 bits, which a copy would not follow if people change them."""
    of_norms = [norm._parameters.get(name) for norm in norms for name in ("weight", "bias")]
    biases = [linear._buffers["bias"] for linear in linears if linear is not None]
    return tuple(tensor for tensor in (*of_norms, *biases) if tensor is not None)


def _make_block(
    linears: Sequence[QuantLinear | None],
    norms: Sequence[nn.Module],
    attention: Any,
    code: Code,
) -> Block | None:
    """The block of these modules; None if their types or settings are not those that compiled code
    takes."""
    there = [linear for linear in linears if linear is not None]
    weights = [None if linear is None else _prepared(linear) for linear in linears]
    prepared = [weight for weight in weights if weight is not None]
    in_place = _read_in_place(linears, norms)
    (dtype, *others) = {tensor.dtype for tensor in in_place}
    int8, *different = {linear.int8_activations for linear in there}
    if (
        len(prepared) != len(there)
        or any(linear.backend is not None for linear in there)
        or others
        or different
        or not all(tensor.is_contiguous() for tensor in in_place)
    ):
        return None
    biases = [None if linear is None else linear._buffers["bias"] for linear in linears]
    made = [
        on_gpu.Norm(
            cast(Tensor, norm.weight).detach(),
            getattr(norm, code.names.epsilon),
            cast(Tensor | None, norm._parameters.get("bias")),
        )
        for norm in norms
    ]
    sizes = (attention.head_dim, getattr(attention, code.names.scale))
    if dtype == torch.float32 and code.slopes is None:
        if all(weight.layout == layout.LAYOUT for weight in prepared):
            pairs = [(norm.weight, norm.epsilon) for norm in made]
            return on_cpu.Block(prepared, biases, pairs, *sizes, int8=int8)
        return None
    if (
        dtype in (torch.float16, torch.bfloat16)
        and not int8
        and gpu_library.available()
        and on_gpu.refuses(weights, attention.head_dim) is None
        # The kernels load 16 bytes of them at a time.
        and all(it.data_ptr() % 16 == 0 for it in _read_in_place((), norms))
    ):
        if code.slopes is None:
            return on_gpu.Block(weights, biases, made, *sizes)
        slopes = code.slopes(attention.num_heads, in_place[0].device)
        block = on_gpu.Block(weights, biases, made, *sizes, slopes)
        # The kernels would read slopes that are not there.
        return block if block.heads == attention.num_heads else None
    return None


def _prepared(linear: QuantLinear) -> PreparedWeight | None:
    weight = linear.prepare()
    return weight if isinstance(weight, PreparedWeight) else None
