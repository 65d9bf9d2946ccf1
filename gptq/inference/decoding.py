"""The loop of transformers' `generate` for one sequence on a GPU, by a captured step.

Between two tokens transformers' own loop spends about as long in Python as compiled code takes for
a token of a 7B model. This one does what is left: processors, the choice of a token, criteria.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from gptq.inference.compiled_decode import CACHE_NAME, takes_captured
from gptq.inference.cuda_graph import CapturedStep, has_fixed_frequencies

ROOM = 512
"""Tokens that a cache of fixed size holds beyond those that are there; a full one is doubled."""
FEWEST = 16
"""Tokens to generate for which a capture pays: it takes as long as about ten."""


def arguments(model: PreTrainedModel, streamer: Any = None) -> dict[str, Any]:
    """Arguments of `generate` for one sequence without padding, sampled or greedy, that make it
    fast on this model; none where its own loop has to do.

    streamer: the one that `generate` gets, which does not pass it on.
    """
    on_gpu = model.device.type == "cuda"
    is_captured = on_gpu and takes_captured(model) and has_fixed_frequencies(model)
    return {"custom_generate": partial(decode, streamer=streamer)} if is_captured else {}


def decode(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Any = None,
    **model_arguments: Any,
) -> Tensor:
    """`custom_generate` of `generate`: what its loop does for one sequence.

    input_ids: int64 (1, n), the prompt. model_arguments: of the prompt's forward.
    Returns int64 (1, n + generated).
    """
    model_arguments.pop("tokenizer", None)
    cache = model_arguments.get(CACHE_NAME)
    logits = model(input_ids=input_ids, **model_arguments).logits[:, -1:]
    # The last token is not read.
    limit = int(generation_config.max_length) - 1
    step = _steps(model, cache, input_ids.shape[1], limit)
    while True:
        scores = logits[:, -1].to(device=input_ids.device, dtype=torch.float32, copy=True)
        scores = logits_processor(input_ids, scores)
        if generation_config.do_sample:
            token = torch.multinomial(scores.softmax(-1), 1)
        else:
            token = scores.argmax(-1, keepdim=True)
        input_ids = torch.cat((input_ids, token), 1)
        if streamer is not None:
            streamer.put(token[0].cpu())
        if bool(stopping_criteria(input_ids, ()).all()):
            break
        logits = step(token)
    if streamer is not None:
        streamer.end()
    return input_ids


def _steps(model: Any, cache: Any, seen: int, limit: int) -> Callable[[Tensor], Tensor]:
    """A function from the next token's id to its logits, after the `seen` tokens of a cache.

    limit: the most tokens that the cache will have seen.
    """
    is_plain = type(cache) is DynamicCache and all(type(it) is DynamicLayer for it in cache.layers)
    if not is_plain or limit - seen < FEWEST:
        # Of another kind, as the model's generation_config.json may ask for.
        rest = {"use_cache": True, CACHE_NAME: cache}
        return lambda token: model(input_ids=token, **rest).logits
    captured: CapturedStep | None = None

    def step(token: Tensor) -> Tensor:
        nonlocal captured, seen
        if captured is None or seen == captured.size:
            before = cache if captured is None else captured.cache
            captured = CapturedStep(model, min(limit, max(seen + ROOM, 2 * seen)))
            captured.begin_with(before, seen)
            # The prompt's keys and values are not needed twice.
            cache.layers.clear()
        seen += 1
        return captured(token)

    return step
