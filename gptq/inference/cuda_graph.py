"""Decoding one token after another; on a GPU each step replays one captured CUDA graph."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel, StaticCache

from gptq.inference import compiled_decode

WARM_UP_STEPS = 2


@torch.no_grad()
def stepper(model: PreTrainedModel, length: int) -> Callable[[Tensor], Tensor]:
    """A function from the next token's id, int64 (1, 1), to its logits (1, 1, vocab).

    It starts at the first position and keeps the key-value cache. On a GPU the cache holds `length`
    tokens, and each step overwrites the logits of the one before.
    """
    device = model.device
    # transformers 5.24 has renamed the argument, and warns of the old name.
    is_renamed = "cache" in inspect.signature(model.forward).parameters
    cache_argument = "cache" if is_renamed else "past_key_values"
    if device.type != "cuda":
        arguments = {cache_argument: DynamicCache(config=model.config)}

        def step(next_token: Tensor) -> Tensor:
            with torch.no_grad():
                return model(input_ids=next_token, use_cache=True, **arguments).logits

        return step

    # The warm-up steps and the captured one take a position of the cache each.
    size = max(length, WARM_UP_STEPS + 1)
    cache = StaticCache(config=model.config, max_cache_len=size)
    # Without a mask, BLOOM's modules in transformers 5.17 make ALiBi terms as long as the tokens so
    # far, not as the cache. Causality masks the positions that are not written yet in any case.
    # Compiled code needs no mask, and takes none that it cannot read before the GPU has run.
    needs_mask = model.config.model_type == "bloom" and not compiled_decode.takes(model)
    mask = torch.ones((1, size), dtype=torch.long, device=device) if needs_mask else None
    token = torch.zeros((1, 1), dtype=torch.long, device=device)

    def forward() -> Tensor:
        arguments = {"attention_mask": mask, "use_cache": True, cache_argument: cache}
        return model(input_ids=token, **arguments).logits

    # ---------------------------------------------------------------------------------------------
    # Why forwards run before the capture: the first one makes what a capture forbids or would
    # record (the cache's tensors, cuBLAS handles, prepared weights, compiled Triton kernels). torch
    # asks for a stream other than the default one for them. The capture records addresses, so that
    # cache.reset() afterwards, which zeroes the cache and its position in place, keeps it valid.
    # ---------------------------------------------------------------------------------------------
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            forward()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # For no other: compiled code leaves a forward under such a mode to transformers' modules.
    fills = _ScalarTensorsByFill() if needs_mask else nullcontext()
    with torch.cuda.device(device), torch.cuda.graph(graph), fills:
        logits = forward()
    cache.reset()
    return partial(_replay, graph, token, logits, (cache, mask))


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


def _replay(
    graph: torch.cuda.CUDAGraph,
    token: Tensor,
    logits: Tensor,
    _kept_alive: object,
    next_token: Tensor,
) -> Tensor:
    """One step of a captured graph.

    A graph keeps the addresses of the tensors that it reads and writes, not the tensors;
    `_kept_alive` are those that nothing else refers to.
    """
    token.copy_(next_token)
    graph.replay()
    return logits
