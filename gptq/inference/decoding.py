"""The loop of transformers' `generate` for one sequence, with little between two tokens.

transformers' own loop, and what `compiled_decode` asks of a model before each token, take a
noticeable part of a token's time: on a GPU, by prediction, more than compiled code takes for a 7B
model. This loop does what is left: processors, the choice of a token, criteria.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from gptq.inference.bound_step import BoundStep, can_bind
from gptq.inference.compiled_decode import CACHE_NAME, takes_always
from gptq.inference.cuda_graph import CapturedStep, has_fixed_frequencies

FEWEST = 16
"""Tokens to generate for which it pays: a capture takes as long as about ten."""
USUAL = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "min_length"),
    *("min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("use_cache", "_from_model_config", "transformers_version"),
}
"""Settings of a generation_config.json that ask for no other loop and no other arguments than this
loop gets: processors and criteria carry them out."""


def arguments(model: PreTrainedModel, streamer: Any = None) -> dict[str, Any]:
    """Arguments of `generate` for one sequence without padding, sampled or greedy, that make it
    fast on this model; none where its own loop has to do. On a GPU one answer at a time is written
    in a process, because a capture forbids other threads to use the GPU.

    streamer: the one that `generate` gets, which does not pass it on.
    """
    kind = _kind(model)
    if kind is None or not _is_usual(model.generation_config):
        return {}
    return {"custom_generate": partial(decode, kind, streamer)}


def _is_usual(config: Any) -> bool:
    """Whether a model's generation_config.json asks for nothing but USUAL settings."""
    asked = {name for name, value in config.to_diff_dict().items() if value not in (None, False)}
    return asked <= USUAL and config.use_cache is not False


def _kind(model: PreTrainedModel) -> type[CapturedStep] | type[BoundStep] | None:
    """Of the steps that a model can take until somebody changes it."""
    if model.device.type == "cuda":
        return CapturedStep if takes_always(model) and has_fixed_frequencies(model) else None
    return BoundStep if can_bind(model) else None


def decode(
    kind: type[CapturedStep] | type[BoundStep],
    streamer: Any,
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_arguments: Any,
) -> Tensor:
    """A `custom_generate` of `generate`: what its loop does for one sequence.

    input_ids: int64 (1, n), the prompt. model_arguments: of the prompt's forward.
    Returns int64 (1, n + generated).
    """
    cache = model_arguments.get(CACHE_NAME)
    if not _is_plain(cache) or generation_config.prefill_chunk_size is not None:
        # What a caller's own settings ask for.
        rest = {"generation_config": generation_config, "streamer": streamer, **model_arguments}
        return model._sample(input_ids, logits_processor, stopping_criteria, **rest)
    logits = model(input_ids=input_ids, **model_arguments).logits[:, -1:]
    # The last token is not read.
    limit = int(generation_config.max_length) - 1
    step = _steps(kind, model, cache, input_ids.shape[1], limit)
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


def _is_plain(cache: Any) -> bool:
    """Whether a cache grows, without windows, where the model is."""
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        return False
    return all(type(layer) is DynamicLayer for layer in cache.layers)


def _steps(
    kind: type[CapturedStep] | type[BoundStep], model: Any, cache: Any, seen: int, limit: int
) -> Callable[[Tensor], Tensor]:
    """A function from the next token's id to its logits, after the `seen` tokens of a cache.

    limit: the most tokens that the cache will have seen.
    """
    # The prompt's forward may have put hooks on the model, for outputs that were asked for.
    if limit - seen < FEWEST or _kind(model) is not kind:
        rest = {"use_cache": True, CACHE_NAME: cache}
        return lambda token: model(input_ids=token, **rest).logits
    current: CapturedStep | BoundStep | None = None

    def step(token: Tensor) -> Tensor:
        nonlocal current, seen
        if current is None or seen == current.size:
            prompt = [(it.keys, it.values) for it in cache.layers]
            before = prompt if current is None else current.cache
            current = kind(model, min(limit, seen + kind.room(seen)))
            current.begin_with(before, seen)
            # Keys and values of the prompt are not needed twice.
            cache.layers.clear()
        seen += 1
        return current(token)

    return step
