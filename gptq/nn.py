"""Linear layers and embeddings whose weight is packed integers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import quant_cuda
from quant_cuda import PackedWeight, PreparedWeight
from quant_cuda.cpu import half_matmul
from quant_cuda.packing import pack, pack_zeros, words_for
from quant_cuda.weight import AnyWeight, group_count, natural_groups

if TYPE_CHECKING:
    from gptq.solver.solution import Solution

# Tensors of a packed module that keep their own dtype when the model's changes.
STORED_AS_IS = ("qweight", "qzeros", "scales", "g_idx")
# Those that are freed while a prepared weight replaces them.
FREED_IF_PREPARED = ("qweight", "qzeros", "scales")
# The keys of a module's part of a state dict's `_metadata` for what the tensors do not tell.
ZERO_OFFSET_KEY, GROUP_SIZE_KEY = "zero_offset", "group_size"
# One for all modules, since a lock in a module could be neither copied nor pickled. A forward with
# a prepared weight does not take it.
_swap_lock = threading.RLock()


class PackedModule(nn.Module):
    """Holds a packed weight. Its state_dict has the checkpoint's layout.

    Buffers, as docs/format.md defines them: `qweight` int32 (in*bits/32, out), `qzeros` int32
    (groups, out*bits/32), `scales` float16 (groups, out), and if the layer has them `g_idx`
    int32 (in,) and `bias` floating (out,).

    `prepare` puts the integers in the order that the device's kernels read and frees the buffers.
    An attribute, state_dict or a move to another device restores them, bit for bit. Threads may do
    all of this at once. `model.to(dtype)` changes the dtype of the bias alone.

    state_dict keeps `zero_offset` in its `_metadata`; load_state_dict takes it over.

    in_features, out_features: of the weight (in, out).
    group_size: inputs in a group; -1 means that all inputs are one group.
    groups: rows of `scales`; by default as many as `group_size` makes of the inputs.
    zero_offset: what `qzeros` are stored less; 1 for format "gptq", 0 for "gptq_v2".
    """

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        *,
        groups: int | None = None,
        bias: bool = False,
        g_idx: bool = True,
        zero_offset: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.zero_offset = bits, group_size, zero_offset
        if groups is None:
            groups = group_count(in_features, group_size)
        rows, zero_words = words_for(in_features, bits), words_for(out_features, bits)

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.register_buffer("qweight", zeros(rows, out_features))
        self.register_buffer("qzeros", zeros(groups, zero_words))
        self.register_buffer("scales", zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", zeros(in_features) if g_idx else None)
        self.register_buffer("bias", zeros(out_features, dtype=torch.float16) if bias else None)
        self._prepared: PreparedWeight | None = None

    def packed(self) -> PackedWeight:
        """The weight in the checkpoint's layout."""
        with _swapping():
            if self._prepared is not None:
                return quant_cuda.restore(self._prepared)
            return PackedWeight(
                qweight=self.qweight,
                qzeros=self.qzeros,
                scales=self.scales,
                g_idx=self._g_idx_if_needed(),
                bits=self.bits,
                group_size=self.group_size,
                in_features=self.in_features,
                zero_offset=self.zero_offset,
            )

    def prepare(self) -> AnyWeight:
        """The weight as the device's kernels read it, for many matmuls; in the checkpoint's layout
        if no kernel takes it."""
        prepared = self._prepared
        if prepared is not None:
            return prepared
        with _swapping():
            if self._prepared is None:
                weight = quant_cuda.prepare(self.packed())
                if not isinstance(weight, PreparedWeight):
                    return weight
                self._prepared = weight
                for name in FREED_IF_PREPARED:
                    self._buffers[name] = None
            return self._prepared

    def prepared_bytes(self) -> int:
        """Bytes of the prepared weight, which is no buffer; 0 if there is none."""
        prepared = self._prepared
        return 0 if prepared is None else sum(tensor.nbytes for tensor in prepared.tensors)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, "
            f"group_size={self.group_size}, bias={self.bias is not None}"
        )

    def _g_idx_if_needed(self) -> Tensor | None:
        """g_idx; None if groups are runs of consecutive inputs, which kernels read faster."""
        if self.g_idx is None:
            return None
        natural = natural_groups(self.in_features, self.group_size, self.g_idx.device)
        return None if torch.equal(self.g_idx, natural.to(self.g_idx.dtype)) else self.g_idx

    # ---------------------------------------------------------------------------------------------
    # Why nn.Module's own methods are overridden: while the weight is prepared, the freed buffers
    # are None. Each way to read, replace or move a buffer restores them first. state_dict alone
    # makes copies instead, so that saving a model does not undo its preparation.
    # ---------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        with _swapping():
            if self._prepared is not None:
                packed = quant_cuda.restore(self._prepared)
                for name in FREED_IF_PREPARED:
                    self._buffers[name] = getattr(packed, name)
                self._prepared = None

    def __getattr__(self, name: str):
        if name in FREED_IF_PREPARED and "_prepared" in self.__dict__:
            # Read under the lock: another thread may prepare the weight again at once.
            with _swapping():
                self._restore()
                return super().__getattr__(name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value) -> None:
        if name in FREED_IF_PREPARED and "_prepared" in self.__dict__:
            with _swapping():
                self._restore()
                super().__setattr__(name, value)
        else:
            super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: buffers and prepared weight as they are at one moment."""
        with _swapping():
            state = {**self.__dict__, "_buffers": dict(self._buffers)}
            if self._prepared is not None:
                # The cache of chosen backends holds functions, which pickle may not find.
                state["_prepared"] = replace(self._prepared, chosen={})
            return state

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        with _swapping():
            self._restore()
            stored = {name: self._buffers.get(name) for name in STORED_AS_IS}
            super()._apply(fn, recurse)
            for name, tensor in stored.items():
                moved = self._buffers.get(name)
                # A change of dtype would round scales for good; activations have their own dtype.
                if tensor is not None and moved is not None and moved.dtype != tensor.dtype:
                    self._buffers[name] = tensor.to(moved.device)
            return self

    def _load_from_state_dict(
        self, state_dict, prefix: str, local_metadata: dict[str, Any], *args, **kwargs
    ) -> None:
        with _swap_lock:
            self._restore()
            for name in ("scales", "bias"):
                # torch would round to the dtype of the buffer that is there.
                buffer, tensor = self._buffers[name], state_dict.get(prefix + name)
                floating = isinstance(tensor, Tensor) and tensor.is_floating_point()
                if buffer is not None and floating:
                    self._buffers[name] = buffer.to(tensor.dtype)
            if prefix + "qzeros" in state_dict:
                self.zero_offset = local_metadata.get(ZERO_OFFSET_KEY, self.zero_offset)
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)

    def _save_to_state_dict(self, destination, prefix: str, keep_vars: bool) -> None:
        with _swapping():
            super()._save_to_state_dict(destination, prefix, keep_vars)
            if hasattr(destination, "_metadata"):
                metadata = destination._metadata.setdefault(prefix.removesuffix("."), {})
                metadata |= {ZERO_OFFSET_KEY: self.zero_offset, GROUP_SIZE_KEY: self.group_size}
            if self._prepared is not None:
                packed = quant_cuda.restore(self._prepared)
                # g_idx and bias go last, in the order in which __init__ registers the buffers.
                rest = {name: destination.pop(prefix + name, None) for name in ("g_idx", "bias")}
                for name in FREED_IF_PREPARED:
                    destination[prefix + name] = getattr(packed, name)
                for name, tensor in rest.items():
                    if tensor is not None:
                        destination[prefix + name] = tensor


def format_of(zero_offset: int) -> str:
    """The name of the format with this offset, as `checkpoint_format` has it."""
    return "gptq" if zero_offset else "gptq_v2"


@contextmanager
def _swapping() -> Iterator[None]:
    """Hold the lock under which buffers and prepared weights replace each other.

    Tensors made meanwhile can be trained through later, also if inference mode is on now.
    """
    # torch.compile cannot trace a lock; what it traces runs in one thread.
    if torch.compiler.is_compiling():
        yield
        return
    with _swap_lock, torch.inference_mode(False):
        yield


class QuantLinear(PackedModule):
    """Replaces nn.Linear. The first forward prepares its weight."""

    int8_activations = False
    """Whether matmuls round activations to 8 bits, see `quant_cuda.matmul`."""
    backend: str | None = None
    """One of quant_cuda.available(); None takes the best."""

    @classmethod
    def from_solution(cls, solution: Solution, bias: Tensor | None = None) -> QuantLinear:
        """Pack the solver's integers as they are, zero points in the v1 convention."""
        in_features, out_features = solution.q.shape
        bits, has_bias = solution.bits, bias is not None
        layer = cls(in_features, out_features, bits, solution.group_size, bias=has_bias)
        layer.qweight = pack(solution.q, bits)
        layer.qzeros = pack_zeros(solution.zeros, bits, layer.zero_offset)
        layer.scales = solution.scales.contiguous()
        layer.g_idx = solution.g_idx.clone()
        layer.bias = None if bias is None else bias.detach()
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """x floating (..., in) to (..., out), in x's dtype."""
        weight = self._prepared or self.prepare()
        return quant_cuda.matmul(
            x, weight, self.backend, bias=self._buffers["bias"], int8=self.int8_activations
        )


class QuantEmbedding(PackedModule):
    """Replaces nn.Embedding. Its weight (embedding_dim, num_embeddings) is packed like a linear
    layer's with an output for each token; a forward unpacks the rows of its tokens alone.

    It is prepared only if a TiedHead multiplies by it too.
    """

    like: Tensor
    """Empty; a buffer, so that `model.to(dtype)` changes the dtype of the embeddings."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        group_size: int,
        *,
        groups: int | None = None,
        zero_offset: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            embedding_dim,
            num_embeddings,
            bits,
            group_size,
            groups=groups,
            g_idx=False,
            zero_offset=zero_offset,
            device=device,
        )
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens, integer (...), to embeddings (..., embedding_dim) in the dtype of `like`.

        Raises IndexError for a token that has no row; on a GPU the device reports it.
        """
        if tokens.numel() == 0:
            return self.like.new_empty((*tokens.shape, self.in_features))
        _check_tokens(tokens, self.out_features)
        rows = quant_cuda.rows(self._prepared or self.packed(), tokens)
        return rows.to(self.like.dtype)


def _check_tokens(tokens: Tensor, count: int) -> None:
    """Raise IndexError for a token outside of 0..count - 1, as nn.Embedding does."""
    if tokens.is_meta:
        return
    if torch.compiler.is_compiling() or tokens.device.type != "cpu":
        # A CUDA graph cannot capture a Python check; the device reports the failure.
        torch._assert_async(((tokens >= 0) & (tokens < count)).all())
    elif not 0 <= int(tokens.min()) <= int(tokens.max()) < count:
        raise IndexError(
            f"tokens {int(tokens.min())}..{int(tokens.max())} are not all in 0..{count - 1}"
        )


class HalfHead(nn.Linear):
    """An output head with a float16 or bfloat16 weight for float32 activations: a CPU reads half as
    much memory for each token.

    A head that is trained gets a float32 weight first: steps of an optimizer vanish or become NaN
    in 16 bits.
    """

    def requires_grad_(self, requires_grad: bool = True):
        if requires_grad:
            self.widen()
        return super().requires_grad_(requires_grad)

    def widen(self) -> None:
        """Make a 16-bit weight float32; the parameter stays the object that an optimizer holds."""
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            self.weight.data = self.weight.data.float()

    def forward(self, input: Tensor) -> Tensor:
        """input floating (..., in) to (..., out), in input's dtype."""
        weight = self.weight
        traced = torch.compiler.is_compiling()
        if weight.requires_grad and torch.is_grad_enabled() and not traced:
            self.widen()
        differentiable = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if traced or differentiable or self.bias is not None or not half_matmul.fits(input, weight):
            return nn.functional.linear(input, weight.to(input.dtype), self.bias)
        return half_matmul.matmul(input, weight)


class TiedHead(nn.Module):
    """An output head that multiplies by the embedding's weight; it has no tensors itself."""

    embedding: QuantEmbedding
    int8_activations = False
    backend: str | None = None
    """Both as in QuantLinear."""

    def __init__(self, embedding: QuantEmbedding) -> None:
        super().__init__()
        # nn.Module would register it as a submodule, and its tensors be in state_dict twice.
        object.__setattr__(self, "embedding", embedding)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., embedding_dim) to (..., num_embeddings), in x's dtype."""
        weight = self.embedding.prepare()
        return quant_cuda.matmul(x, weight, self.backend, int8=self.int8_activations)

    def _apply(self, *args, **kwargs):
        self.embedding._apply(*args, **kwargs)
        return super()._apply(*args, **kwargs)
