"""One token after another, with nothing to do between two of them on a GPU but replay a graph."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, PreTrainedModel, StaticCache

WARM_UP = 2


@torch.no_grad()
def stepper(model: PreTrainedModel, length: int) -> Callable[[Tensor], Tensor]:
    """A function that takes the next token's id, (1, 1), and returns its logits (1, 1, vocab).

    On a CPU the cache is the one that generate takes. On a GPU it has room for `length` tokens;
    each step replays one captured CUDA graph, and the next overwrites its logits.
    """
    device = model.device
    # transformers 5.24 has renamed it, and warns of the old name.
    renamed = "cache" in inspect.signature(model.forward).parameters
    past = "cache" if renamed else "past_key_values"
    if device.type != "cuda":
        held = {past: DynamicCache(config=model.config)}

        def step(next_token: Tensor) -> Tensor:
            with torch.no_grad():
                return model(input_ids=next_token, use_cache=True, **held).logits

        return step

    size = max(length, WARM_UP + 1)
    cache = StaticCache(config=model.config, max_cache_len=size)
    # Without a mask, BLOOM in transformers 5.17 makes its alibi as long as the tokens seen, not as
    # the cache. The places yet to be filled are masked all the same, by causality.
    alibi = model.config.model_type == "bloom"
    mask = torch.ones((1, size), dtype=torch.long, device=device) if alibi else None
    token = torch.zeros((1, 1), dtype=torch.long, device=device)

    def forward() -> Tensor:
        arguments = {"attention_mask": mask, "use_cache": True, past: cache}
        return model(input_ids=token, **arguments).logits

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(WARM_UP):  # what is made at first use must not be made in the graph
            forward()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph), _FilledNumbers():
        logits = forward()
    cache.reset()

    return partial(_replay, graph, token, logits, (cache, mask))


class _FilledNumbers(TorchFunctionMode):
    """torch.tensor of one number, which a captured graph cannot copy from the CPU, as a fill:
    BLOOM's mask in transformers 5 is made with such a number."""

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
    graph: torch.cuda.CUDAGraph, token: Tensor, logits: Tensor, _held: object, next_token: Tensor
) -> Tensor:
    """The next step of a captured graph, which holds none of the tensors that it reads and writes:
    those which nothing else holds are `_held`."""
    token.copy_(next_token)
    graph.replay()
    return logits
