"""What a model answers, and how likely it finds the reference answer."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from belle.compare.questions import Question
from gptq.data.chat import belle_prompt
from gptq.inference.generate import text

# What begins the next question, if the model goes on with one itself.
END = ("\n\nHuman:", "\nHuman:")


def prompt_of(asked: Question) -> str:
    """What is before the answer, as in BELLE's training; the answer follows after a space."""
    return belle_prompt([{"role": "user", "content": asked.question}])


@torch.no_grad()
def log_likelihood(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Question
) -> float:
    """Mean log-probability, in nats, of each token of the reference answer after the question."""
    prompt = tokenizer(prompt_of(asked))["input_ids"]
    whole = tokenizer(f"{prompt_of(asked)} {asked.answer}")["input_ids"]
    # Where the tokens of the two part: a piece may reach over the end of the prompt.
    prompt_tokens = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b),
        min(len(prompt), len(whole) - 1),
    )
    prompt_tokens = max(prompt_tokens, 1)
    tokens = torch.tensor([whole], device=model.device)
    logits = model(tokens).logits[0, prompt_tokens - 1 : -1].float()
    chosen = logits.log_softmax(-1).gather(1, tokens[0, prompt_tokens:, None])
    return float(chosen.mean())


def answer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Question, new_tokens: int
) -> str:
    """What the model writes, up to where it would go on with the next question itself."""
    written = text(model, tokenizer, prompt_of(asked), new_tokens)
    for end in END:
        written = written.partition(end)[0]
    return written.strip()
