"""Decoding one token after another; on a GPU each step replays one captured CUDA graph."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel, StaticCache

from gptq.inference import compiled_decode
from gptq.inference.bound_step import BoundStep, can_bind
from gptq.inference.compiled_decode import CACHE_NAME

WARM_UP_STEPS = 2


@torch.no_grad()
def stepper(model: PreTrainedModel, length: int) -> Callable[[Tensor], Tensor]:
    """A function from the next token's id, int64 (1, 1), to its logits (1, 1, vocab).

    It starts at the first position and keeps the key-value cache, which holds `length` tokens. On a
    GPU each step overwrites the logits of the one before.
    """
    if model.device.type == "cuda" and has_fixed_frequencies(model):
        return CapturedStep(model, length)
    if model.device.type == "cpu" and can_bind(model):
        return BoundStep(model, length)
    arguments = {CACHE_NAME: DynamicCache(config=model.config)}

    def step(next_token: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=next_token, use_cache=True, **arguments).logits

    return step


def has_fixed_frequencies(model: PreTrainedModel) -> bool:
    """Whether the frequencies of rotary positions do not depend on how many tokens there are.

    A graph could not follow them: they are chosen on the CPU, by a number that is on the GPU.
    """
    kinds = [getattr(module, "rope_type", "") for module in model.modules()]
    return not any("dynamic" in str(kind) or "longrope" in str(kind) for kind in kinds)


class CapturedStep:
    """One token of one sequence through a model, captured as a CUDA graph once and replayed.

    Its cache is of fixed size. The model's modules and weights must stay what they are.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, length: int) -> None:
        """length: the tokens that the cache has to hold."""
        # The warm-up steps and the captured one take a position of the cache each.
        self.size = max(length, WARM_UP_STEPS + 1)
        cache = StaticCache(config=model.config, max_cache_len=self.size)
        # Without a mask, BLOOM's modules in transformers 5.17 make ALiBi terms as long as the
        # tokens so far, not as the cache. Causality masks the positions that are not written yet in
        # any case. Compiled code needs no mask, and takes none that it cannot read before the GPU
        # has run.
        needs_mask = model.config.model_type == "bloom" and not compiled_decode.takes(model)
        shape, device = (1, self.size), model.device
        mask = torch.ones(shape, dtype=torch.long, device=device) if needs_mask else None
        token = torch.zeros((1, 1), dtype=torch.long, device=device)

        def forward() -> Tensor:
            arguments = {"attention_mask": mask, "use_cache": True, CACHE_NAME: cache}
            return model(input_ids=token, **arguments).logits

        # For no other: compiled code leaves a forward under such a mode to transformers' modules.
        fills = _ScalarTensorsByFill() if needs_mask else nullcontext()
        self._replay, self._logits = capture(forward, device, fills)
        # A graph keeps the addresses of the tensors that it reads and writes, not the tensors. It
        # stays valid, because this zeroes the cache and its position in place.
        cache.reset()
        self._token, self._layers, self._mask = token, cast(list[Any], cache.layers), mask

    @staticmethod
    def room(seen: int) -> int:
        """Tokens to have room for beyond those that are there."""
        # More costs memory; a capture takes as long as about ten tokens.
        return min(max(512, seen), 2048)

    @torch.no_grad()
    def begin_with(self, cache: Sequence[tuple[Tensor, Tensor]], count: int) -> None:
        """Go on after the `count` tokens that another cache has seen."""
        for layer, (keys, values) in zip(self._layers, cache, strict=True):
            layer.keys[:, :, :count] = keys[:, :, :count]
            layer.values[:, :, :count] = values[:, :, :count]
            layer.cumulative_length.fill_(count)

    @property
    def cache(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each block, (1, heads, size, head_dim)."""
        return [(layer.keys, layer.values) for layer in self._layers]

    def __call__(self, next_token: Tensor) -> Tensor:
        """Logits (1, 1, vocab) of a token's id, int64 (1, 1); the next call overwrites them."""
        self._token.copy_(next_token)
        self._replay()
        return self._logits


def capture(
    forward: Callable[[], Tensor], device: torch.device, mode: AbstractContextManager[Any]
) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of `forward` to replay, and the tensor that each replay writes.

    mode: entered while it is captured.
    """
    # ---------------------------------------------------------------------------------------------
    # Why forwards run before the capture: the first one makes what a capture forbids or would
    # record (the cache's tensors, cuBLAS handles, prepared weights, compiled Triton kernels). torch
    # asks for a stream other than the default one for them.
    # ---------------------------------------------------------------------------------------------
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            forward()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph), mode:
        result = forward()
    return graph.replay, result


class _ScalarTensorsByFill(TorchFunctionMode):
    """Makes `torch.tensor(number)` a fill on the GPU.

    It is a copy from the CPU otherwise, which a graph cannot capture. BLOOM's mask in
    transformers 5 is made with such a tensor.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and args and isinstance(args[0], int | float):
            return torch.full((), *args, **kwargs)
        return func(*args, **kwargs)
