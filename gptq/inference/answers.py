"""One answer by transformers' `generate`, passed on piece by piece."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from gptq.blockwise.source import max_positions
from gptq.errors import UserError
from gptq.inference import decoding
from gptq.inference.answer_text import AnswerText

# Lower temperatures are greedy: logits divided by them could become infinite.
LEAST_TEMPERATURE = 0.01


@dataclass(frozen=True)
class Job:
    """One answer to write."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int
    temperature: float
    """0: always the likeliest token."""
    top_p: float
    seed: int | None
    """The same seed gives the same answer; None: another one each time."""
    stop: Sequence[str]
    """The answer ends before the first of them."""
    top_k: int | None = None
    """0: of all tokens; None: as the model's own generation_config.json has it."""
    repetition_penalty: float | None = None
    """None: as the model's own generation_config.json has it."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer."""

    text: str
    finish: Literal["stop", "length"] | None = None
    """Why the answer ends with this piece; None: it goes on."""


USABLE: Mapping[str, Callable[[Any], bool]] = {
    "temperature": lambda value: value >= 0,
    "top_k": lambda value: value >= 0 and isinstance(value, int),
    "top_p": lambda value: 0 <= value <= 1,
    "repetition_penalty": lambda value: value > 0,
    "eos_token_id": lambda value: value >= 0 and isinstance(value, int),
}
"""Whether a number is one that an answer can be written with, by its name in a
generation_config.json."""


def check_sampling(config: GenerationConfig) -> None:
    """Raise UserError for a model's generation_config.json that no answer can be written with.

    transformers says so for each answer.
    """
    for name, is_usable in USABLE.items():
        declared = getattr(config, name)
        has_several = name == "eos_token_id" and isinstance(declared, list)
        for value in declared if has_several else [declared]:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and is_usable(value)):
                raise UserError(
                    f"the model's generation_config.json has {name} {value!r}, with which no "
                    "answer can be written; correct it"
                )


@dataclass(frozen=True, eq=False)
class Served:
    """A loaded model that answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    defaults: GenerationConfig
    """The model's own, of which sampling settings are taken where a client gives none."""
    ends: Sequence[int]
    """The tokens that end an answer."""

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> "Served":
        """Takes the model's generation_config away: `generate` would fill in settings from it that
        no client asked for, such as beams."""
        defaults = model.generation_config
        check_sampling(defaults)
        model.generation_config = GenerationConfig()
        declared: Any = defaults.eos_token_id
        ends = [*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id]
        return cls(model, tokenizer, defaults, [token for token in ends if token is not None])

    @property
    def positions(self) -> int | None:
        """The most tokens that the model was made for, if its configuration says that."""
        return max_positions(self.model.config.get_text_config())

    def answer(self, job: Job, send: Callable[[Piece], None], unwanted: Callable[[], bool]) -> int:
        """Write an answer; returns the number of its tokens.

        send: gets the answer piece by piece; the last piece has `finish`.
        unwanted: asked after every token; the answer ends there if it returns True.
        Raises FloatingPointError for logits that are not numbers.
        """
        # Of torch's own generators: one answer is written at a time.
        if job.seed is None:
            torch.seed()
        else:
            torch.manual_seed(job.seed)
        tokens = _Tokens(
            AnswerText(self.tokenizer, job.prompt, job.stop), self.ends, send, unwanted
        )
        prompt = torch.tensor([job.prompt], device=self.model.device)
        cast(Any, self.model).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=self._config(job),
            logits_processor=LogitsProcessorList([_CheckLogits()]),
            stopping_criteria=StoppingCriteriaList([tokens]),
            **decoding.arguments(self.model),
        )
        return tokens.end()

    def _config(self, job: Job) -> GenerationConfig:
        sampling = {
            "temperature": job.temperature,
            "top_p": job.top_p,
            # None would be transformers' 50.
            "top_k": (self.defaults.top_k or 0) if job.top_k is None else job.top_k,
        }
        samples = job.temperature >= LEAST_TEMPERATURE
        penalty = job.repetition_penalty
        return GenerationConfig(
            max_new_tokens=job.max_new_tokens,
            do_sample=samples,
            **(sampling if samples else {}),
            repetition_penalty=self.defaults.repetition_penalty if penalty is None else penalty,
            eos_token_id=list(self.ends) or None,
            pad_token_id=self.ends[0] if self.ends else 0,
        )


class _CheckLogits(LogitsProcessor):
    """Stops at logits that are no numbers: to sample from them ends a CUDA context for good."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not torch.isfinite(scores.max()):
            raise FloatingPointError("the model's logits are not finite; try --dtype float32")
        return scores


class _Tokens(StoppingCriteria):
    """Sends the text of new tokens, and says when they are enough."""

    def __init__(
        self,
        text: AnswerText,
        ends: Sequence[int],
        send: Callable[[Piece], None],
        unwanted: Callable[[], bool],
    ) -> None:
        self._text, self._ends, self._send, self._unwanted = text, ends, send, unwanted
        self._count = 0
        self._ended = False

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Called by `generate` after each token with int64 (1, n); returns bool (1,)."""
        token = int(input_ids[0, -1])
        self._count += 1
        self._ended = token in self._ends
        if not self._ended and (text := self._text.add(token)):
            self._send(Piece(text))
        return torch.tensor([self._text.stopped or self._unwanted()], device=input_ids.device)

    def end(self) -> int:
        """Send the last piece; returns the number of tokens."""
        text = self._text.end()
        self._send(Piece(text, "stop" if self._ended or self._text.stopped else "length"))
        return self._count
