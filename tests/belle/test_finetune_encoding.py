"""Conversations as tokens and labels: exactly the answers are learned."""

import io
import random

import pytest
import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from belle.finetune.encoding import IGNORED, Example, collate, encode, encode_all
from belle.finetune.order import shuffled
from gptq.data.chat import belle_prompt
from gptq.errors import UserError

TEXT = [
    "Human: the fox runs home.\n\nAssistant: yes, 天气很好。",
    "今天的天气 is fine, 好吗？",
] * 20
# How BLOOM's tokenizer.json cuts text into words.
BLOOM_WORDS = r" ?[^(\s|[.,!?…。，、।۔،])]+"
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "{{ '\\n' }}")
CONVERSATIONS = {
    "one word": [("the fox?", "yes")],
    "one token": [("the fox?", "。")],
    "Chinese": [("今天天气怎么样？", "今天的天气很好。")],
    "mark first": [("the end", ", 好吗？\n\n  indented\nHuman: no")],
    "turns": [("the fox", "runs"), ("好吗？", "好。"), ("and?", "home")],
    "names end token": [("what is </s>?", "it is </s> in a text")],
}


def conversation(name: str) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for pair in CONVERSATIONS[name]
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    buffer, folder = io.BytesIO(), tmp_path_factory.mktemp("tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=buffer,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(buffer.getvalue())
    return LlamaTokenizer.from_pretrained(folder, add_bos_token=True)


@pytest.fixture(scope="module")
def bloom():
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(BLOOM_WORDS), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.fixture(params=["llama", "bloom"])
def tokenizer(request):
    found = request.getfixturevalue(request.param)
    found.chat_template = None
    return found


def answers(tokenizer, example: Example) -> list[str]:
    """The text of each run of labels. Written without the code under test."""
    runs: list[list[int]] = [[]]
    for label in example.labels:
        if label != IGNORED:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_labels_are_the_answers_and_their_ends(tokenizer, name):
    turns = conversation(name)
    example = encode(turns, tokenizer)
    expected = [turn["content"] + "</s>" for turn in turns if turn["role"] == "assistant"]
    assert [text.removeprefix(" ") for text in answers(tokenizer, example)] == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_tokens_are_the_conversation_as_it_is_prompted(tokenizer, name):
    turns = conversation(name)
    example = encode(turns, tokenizer)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    first = [bos] if tokenizer("x")["input_ids"][0] == bos else []
    assert example.tokens[: len(first) + 1].count(bos) == len(first)
    assert (example.tokens.count(bos), example.tokens.count(eos)) == (len(first), 1)
    prompt, answer = belle_prompt(turns[:-1]), " " + turns[-1]["content"]
    assert tokenizer.decode(example.tokens[len(first) : -1]) == prompt + answer


def test_an_answer_begins_where_its_prompt_ends(tokenizer):
    """The prompt's tokens are those that a model is given to answer."""
    turns = conversation("Chinese")
    prompt = tokenizer(belle_prompt(turns[:1]))["input_ids"]
    example = encode(turns, tokenizer)
    assert example.tokens[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [IGNORED] * len(prompt)
    assert example.labels[len(prompt) :] == example.tokens[len(prompt) :]


# Text that names the end token is that token within a template.
@pytest.mark.parametrize("name", [name for name in CONVERSATIONS if name != "names end token"])
@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "computed"])
def test_a_chat_template(bloom, template, name):
    bloom.chat_template = template
    turns = conversation(name)
    example = encode(turns, bloom, "template")
    expected = [turn["content"] + "</s>" for turn in turns if turn["role"] == "assistant"]
    assert answers(bloom, example) == expected
    assert bloom.decode(example.tokens).startswith("<|user|>" + turns[0]["content"])
    assert (encode(turns, bloom, "auto") == example) == (template == MARKED)


def test_a_template_that_rewrites_earlier_turns(bloom):
    bloom.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(UserError, match="--prompt belle"):
        encode(conversation("turns"), bloom, "template")


def test_an_end_token_that_pads_is_learned(bloom):
    """BELLE issue 319: masked by its id, it was never learned, and answers did not end."""
    examples = [encode(conversation(name), bloom) for name in ("one word", "turns")]
    batch = collate(examples)
    for row, example in enumerate(examples):
        size = len(example.tokens)
        assert batch["labels"][row, :size].tolist() == example.labels
        assert batch["attention_mask"][row].tolist() == [1] * size + [0] * (
            len(batch["labels"][0]) - size
        )
        assert set(batch["labels"][row, size:].tolist()) <= {IGNORED}
        assert bloom.eos_token_id in batch["labels"][row]


def test_a_cut_answer_has_no_end(tokenizer):
    turns = conversation("turns")
    whole = encode(turns, tokenizer)
    for length in range(1, len(whole.tokens)):
        if any(label != IGNORED for label in whole.labels[1:length]):
            encoded = encode_all([turns], tokenizer, length)
            assert encoded.examples == [(whole.tokens[:length], whole.labels[:length])]
            assert (encoded.cut, encoded.dropped) == (1, 0)
            assert encoded.examples[0].tokens[-1] != tokenizer.eos_token_id


def test_records_that_are_too_long_are_counted(tokenizer):
    records = [conversation("one word"), conversation("turns"), conversation("mark first")]
    length = len(encode(records[0], tokenizer).tokens)
    kept = encode_all(records, tokenizer, length, too_long="drop")
    assert (len(kept.examples), kept.cut, kept.dropped) == (1, 0, 2)
    with pytest.raises(UserError, match="none of the 3 records has an answer within 3 tokens"):
        encode_all(records, tokenizer, 3)


def test_the_order_has_each_example_once_an_epoch_and_like_lengths_together():
    draw = random.Random(5)
    lengths = [draw.randint(1, 1000) for _ in range(400)]
    order = shuffled(lengths, 8, 3, seed=1)
    epochs = [order[start : start + 400] for start in (0, 400, 800)]
    assert all(sorted(epoch) == list(range(400)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order == shuffled(lengths, 8, 3, seed=1) != shuffled(lengths, 8, 3, seed=2)
    spreads = [
        max(lengths[i] for i in order[start : start + 8])
        - min(lengths[i] for i in order[start : start + 8])
        for start in range(0, 1200, 8)
    ]
    assert max(spreads) < 100
