"""Dialogues with a model that writes what the test gives it, and with a real one."""

from types import SimpleNamespace

import pytest
import torch
from helpers.spaced import spaced_tokenizer
from transformers import GenerationConfig

import gptq
from gptq.data.chat import chat_prompt
from gptq.errors import UserError
from gptq.inference.answers import Served
from gptq.inference.dialogue import Sampling, dialogue

# Has a beginning of its own, as the templates of published models do.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HI, A, B, C, HUMAN = 5, 6, 7, 8, 3


class Scripted:
    """A stand-in for a model: it writes given answers in turn, and keeps its prompts."""

    device = torch.device("cpu")

    def __init__(self, *answers, positions=None):
        self.answers, self.prompts = list(answers), []
        self.generation_config = GenerationConfig()
        self.config = SimpleNamespace(
            get_text_config=lambda: self.config, max_position_embeddings=positions
        )
        self.embedding = torch.nn.Embedding(320, 1)

    def get_input_embeddings(self):
        return self.embedding

    def generate(self, prompt, generation_config, stopping_criteria, **_):
        self.prompts.append(prompt[0].tolist())
        answer = self.answers[min(len(self.prompts), len(self.answers)) - 1]
        for count in range(1, min(len(answer), generation_config.max_new_tokens) + 1):
            ids = torch.cat([prompt, torch.tensor([answer[:count]])], dim=1)
            if bool(stopping_criteria(ids, None)[0]):
                return


@pytest.fixture
def spaced():
    return spaced_tokenizer()


def talk(model, tokenizer, lines, max_new_tokens=2, sampling=None):
    """The answers, what was shown of them, and the notes."""
    shown, notes = [], []
    served = Served.of(model, tokenizer)
    answers = dialogue(
        served, lines, sampling or Sampling(), max_new_tokens, shown.append, notes.append
    )
    return list(answers), "".join(shown), notes


def test_what_was_said_is_remembered(spaced):
    model = Scripted([B, C])
    assert talk(model, spaced, ["hi", "a"]) == (["b c", "b c"], " b c b c", [])
    first = spaced("Human: hi\n\nAssistant:")["input_ids"]
    second = spaced("Human: hi\n\nAssistant: b c\n\nHuman: a\n\nAssistant:")["input_ids"]
    assert model.prompts == [first, second]
    assert [prompt.count(0) for prompt in model.prompts] == [1, 1]


def test_a_template_is_used_and_begins_the_text_once(spaced):
    spaced.chat_template = TEMPLATE
    messages = [{"role": "user", "content": "hi"}]
    assert chat_prompt(spaced, messages) == "<s><user>hi</s><assistant>"
    model = Scripted([B, C])
    assert talk(model, spaced, ["hi", "a"])[0] == ["b c", "b c"]
    assert [prompt.count(0) for prompt in model.prompts] == [1, 1]
    assert [prompt[0] for prompt in model.prompts] == [0, 0]
    # Each user's and each assistant's turn is closed once.
    assert [prompt.count(1) for prompt in model.prompts] == [1, 3]


def test_a_template_without_text(spaced):
    spaced.chat_template = "{{ '' }}"
    spaced._tokenizer.post_processor = None
    with pytest.raises(UserError, match="makes no text of a conversation"):
        talk(Scripted([B]), spaced, ["hi"])


def test_an_answer_ends_where_the_next_question_begins(llama_dir):
    """A random model that is made to write a question of its own."""
    _, tokenizer = gptq.load(llama_dir)
    written = tokenizer("the cat\n\nHuman: the dog", add_special_tokens=False)["input_ids"]
    model = Scripted(written)
    answers, shown, _ = talk(model, tokenizer, ["the cat", "on"], 50)
    assert answers == ["the cat", "the cat"]
    assert "Human" not in shown
    asked = "Human: the cat\n\nAssistant: the cat\n\nHuman: on\n\nAssistant:"
    assert model.prompts[1] == tokenizer(asked)["input_ids"]


def test_lines_are_answered_one_at_a_time(spaced):
    asked = []

    def lines():
        for line in ("hi", "a"):
            asked.append(line)
            yield line

    served = Served.of(Scripted([B]), spaced)
    answers = dialogue(served, lines(), Sampling(), 1, print, print)
    assert next(answers) == "b"
    assert asked == ["hi"]


def test_the_oldest_turns_are_forgotten_if_the_context_is_full(spaced):
    turn = len(spaced("Human: hi\n\nAssistant:")["input_ids"])
    # Room for two questions with an answer between, and the second answer.
    both = spaced("Human: hi\n\nAssistant: b c\n\nHuman: hi\n\nAssistant:")["input_ids"]
    model = Scripted([B, C], positions=len(both) + 2)
    answers, _, notes = talk(model, spaced, ["hi"] * 4)
    assert len(answers) == 4
    assert [len(prompt) for prompt in model.prompts] == [turn, *[len(both)] * 3]
    note = f"the context of {len(both) + 2} tokens is full: the oldest 1 questions and answers are"
    assert notes == [f"{note} forgotten"] * 2


def test_a_line_that_is_too_long_is_left_out(spaced):
    turn = len(spaced("Human: hi\n\nAssistant:")["input_ids"])
    model = Scripted([B, C], positions=turn + 2)
    answers, _, notes = talk(model, spaced, ["hi hi hi", "hi"])
    assert answers == ["b c"]
    assert len(notes) == 1
    assert f"this line is {turn + 2} tokens, and the model takes {turn + 2}" in notes[0]
    assert [len(prompt) for prompt in model.prompts] == [turn]


def test_sampling(llama_dir):
    """The same seed gives the same dialogue, another one another; 0 is the likeliest token."""
    model, tokenizer = gptq.load(llama_dir)
    lines = ["the cat", "the dog"]

    def answers(**settings):
        return talk(model, tokenizer, lines, 12, Sampling(**settings))[0]

    hot = {"temperature": 2.0, "top_p": 0.95}
    assert answers(**hot, seed=1) == answers(**hot, seed=1) != answers(**hot, seed=2)
    greedy = answers()
    assert greedy == answers(seed=3)
    # Of one token there is nothing to choose.
    assert answers(temperature=2.0, top_k=1) == greedy
    assert answers(repetition_penalty=5.0) != greedy


@pytest.mark.parametrize(
    "setting",
    [
        {"eos_token_id": "x"},
        {"eos_token_id": [1, "x"]},
        {"eos_token_id": -1},
        {"repetition_penalty": 0},
        {"top_k": -5},
        {"top_k": 1.5},
        {"temperature": "hot"},
        {"top_p": 2},
    ],
)
def test_settings_that_no_answer_can_be_written_with(setting, llama_dir):
    model, tokenizer = gptq.load(llama_dir)
    for name, value in setting.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(UserError, match=f"generation_config.json has {next(iter(setting))} "):
        Served.of(model, tokenizer)


def test_logits_that_are_not_numbers(llama_dir):
    model, tokenizer = gptq.load(llama_dir)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        talk(model, tokenizer, ["the cat"], 2)
