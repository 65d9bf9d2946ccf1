"""Text, chat, and the latency of one token after another."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from gptq.device import peak_memory, reset_peak_memory
from gptq.errors import UserError
from gptq.inference.cuda_graph import stepper

BELLE_PROMPT = "Human: {}\n\nAssistant:"


@torch.no_grad()
def text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> str:
    """What the model writes after `prompt`, greedily.

    Raises UserError for a prompt of no tokens.
    """
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if encoded["input_ids"].shape[1] == 0:
        raise UserError("the prompt is empty; give the model some text to go on from")
    return _continue(model, tokenizer, encoded, max_new_tokens, streamer)


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lines: Iterable[str],
    max_new_tokens: int,
    streamer: TextStreamer | None = None,
) -> Iterator[str]:
    """Answer each line, remembering those before.

    Turns take the tokenizer's chat template, or BELLE's `Human: ...\\n\\nAssistant:` without one.
    """
    messages: list[dict[str, str]] = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        encoded = tokenizer(
            chat_prompt(tokenizer, messages),
            return_tensors="pt",
            return_token_type_ids=False,
            # A template writes its own beginning of text.
            add_special_tokens=tokenizer.chat_template is None,
        )
        answer = _continue(model, tokenizer, encoded, max_new_tokens, streamer).strip()
        messages.append({"role": "assistant", "content": answer})
        yield answer


def chat_prompt(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The text of a conversation so far, up to where the assistant is to go on."""
    if tokenizer.chat_template is not None:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    asked = [message["content"] for message in messages if message["role"] == "user"]
    answered = [message["content"] for message in messages if message["role"] == "assistant"]
    turns = [BELLE_PROMPT.format(question) for question in asked]
    return (
        "\n\n".join(f"{turn} {answer}" for turn, answer in zip(turns, answered, strict=False))
        + ("\n\n" if answered else "")
        + turns[-1]
    )


@dataclass(frozen=True)
class Latency:
    """One token after another, batch of one."""

    tokens: int
    seconds: tuple[float, ...]
    """Of each token after the first, which also warms up."""
    peak_memory: int
    """Bytes, see `machine.peak_memory`."""
    perplexity: float | None
    """exp of the mean cross entropy of the tokens fed, where it was asked for."""

    @property
    def median(self) -> float:
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
    """Feed tokens (n,) one by one with a key-value cache and time each step.

    On a GPU a step is the replay of one CUDA graph, see `decode.stepper`.
    """
    device = model.device
    reset_peak_memory(device)
    step = stepper(model, len(tokens))
    loss, seconds = 0.0, []
    for position, token in enumerate(tokens.to(device)):
        _wait(device)
        started = perf_counter()
        logits = step(token.view(1, 1))
        _wait(device)
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


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded,
    max_new_tokens: int,
    streamer: TextStreamer | None,
) -> str:
    encoded = encoded.to(model.device)
    known = encoded["input_ids"].shape[1]
    pad = tokenizer.pad_token_id
    generated = cast(Any, model).generate(
        **encoded,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id if pad is None else pad,
        streamer=streamer,
    )
    # Decoded apart from what is before it, a SentencePiece word would lose its leading space.
    before, whole = (
        str(tokenizer.decode(tokens, skip_special_tokens=True))
        for tokens in (generated[0, :known], generated[0])
    )
    return whole[len(before) :]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
