"""Text, and the latency of one token after another."""

import statistics
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from gptq.blockwise.activations import check_tokens
from gptq.device import peak_memory, reset_peak_memory
from gptq.errors import UserError
from gptq.inference import decoding
from gptq.inference.cuda_graph import stepper

# Whatever the model's generation_config.json asks for.
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "penalty_alpha": 0.0,
}


@torch.no_grad()
def text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> str:
    """The model's greedy continuation of `prompt`.

    streamer: gets the tokens as they are generated.
    Raises UserError for a prompt of no tokens, or of a token that the embedding does not have, and
    for less than one new token.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens}: give 1 or more")
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if encoded["input_ids"].shape[1] == 0:
        raise UserError("the prompt is empty; give the model some text to go on from")
    return _continuation(model, tokenizer, encoded, max_new_tokens, streamer)


@dataclass(frozen=True)
class Latency:
    """What `benchmark` measured: one token after another, batch size 1."""

    tokens: int
    seconds: tuple[float, ...]
    """Of each token after the first, which also warms up."""
    peak_memory: int
    """Bytes, as `gptq.device.peak_memory` counts them."""
    perplexity: float | None
    """exp of the mean cross entropy of the tokens; None if it was not asked for."""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def tokens_per_second(self) -> float:
        return 1 / self.median


@torch.no_grad()
def benchmark(
    model: PreTrainedModel,
    tokens: Tensor,
    check: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Latency:
    """Feed tokens int64 (n,) one by one with a key-value cache and time each step.

    On a GPU a step replays one CUDA graph, see `cuda_graph.stepper`.
    check: also compute the perplexity of the tokens, outside of the times.
    progress: called with (tokens done, tokens in all).
    Raises UserError for a token that the embedding does not have.
    """
    check_tokens(tokens, model.get_input_embeddings())
    device = model.device
    reset_peak_memory(device)
    step = stepper(model, len(tokens))
    loss, seconds = 0.0, []
    for position, token in enumerate(tokens.to(device)):
        _synchronize(device)
        started = perf_counter()
        logits = step(token.view(1, 1))
        _synchronize(device)
        seconds.append(perf_counter() - started)
        if check and position + 1 < len(tokens):
            target = tokens[position + 1].view(1).to(device)
            loss += float(torch.nn.functional.cross_entropy(logits[0].float(), target))
        if progress is not None:
            progress(position + 1, len(tokens))
    mean = torch.tensor(loss / max(1, len(tokens) - 1))
    return Latency(
        len(tokens),
        tuple(seconds[1:] or seconds),
        peak_memory(device),
        float(mean.exp()) if check else None,
    )


def _continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Any,
    max_new_tokens: int,
    streamer: TextStreamer | None,
) -> str:
    """The greedy continuation of an encoded prompt, int64 (1, n) `input_ids` and its mask."""
    check_tokens(encoded["input_ids"], model.get_input_embeddings())
    encoded = encoded.to(model.device)
    prompt_length = encoded["input_ids"].shape[1]
    pad = tokenizer.pad_token_id
    try:
        generated = cast(Any, model).generate(
            **encoded,
            **GREEDY,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
            tokenizer=tokenizer,
            streamer=streamer,
            **decoding.arguments(model, streamer),
        )
    except (TypeError, ValueError) as error:
        if not _refuses_settings(error):
            raise
        raise UserError(f"the model's generation_config.json cannot be used ({error})") from error
    # Decoded without the prompt, a SentencePiece word would lose its leading space.
    prompt, whole = (
        str(tokenizer.decode(tokens, skip_special_tokens=True))
        for tokens in (generated[0, :prompt_length], generated[0])
    )
    return whole[len(prompt) :]


def _refuses_settings(error: Exception) -> bool:
    """Whether an error is from the code of transformers that reads generation_config.json.

    An error of the model's forward is a bug, and stays what it is.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("transformers.generation.")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
