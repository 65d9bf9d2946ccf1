"""The trained models have learned enough that rounding hurts, and 4 bits hurt more than 8."""

import math
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import assets
from benchmarks.train_tiny import perplexity, split_text, tiny_model
from gptq.errors import UserError

# Architecture and steps. The whole recipe of each takes minutes: only the whole run has it.
SHORT = ("bloom", 300)
# test_trained.py trains them in the other order: two processes wait little for each other.
WHOLE = [
    pytest.param((arch, None), id=arch, marks=pytest.mark.thorough) for arch in ("bloom", "llama")
]


def round_linears(model, bits, group_size):
    """Each linear layer of the blocks on asymmetric min/max grids, plainly rounded."""
    top = 2**bits - 1
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            for group in layer.weight.data.split(group_size, dim=1):
                low = group.amin(1, keepdim=True).clamp(max=0)
                scale = (group.amax(1, keepdim=True).clamp(min=0) - low) / top
                zero = (-low / scale).round()
                integers = ((group / scale).round() + zero).clamp(0, top)
                group.copy_((integers - zero) * scale)


@pytest.fixture(scope="module", params=[pytest.param(SHORT, id="short"), *WHOLE])
def trained(request):
    """(model, tokenizer, folder)."""
    arch, steps = request.param
    folder = tiny_model(arch, steps=steps)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder), folder


@pytest.fixture
def texts(tmp_path):
    """A cache that holds the beginning of the text already."""
    return write_texts(tmp_path)


def write_texts(cache):
    for name in ("c4", "wiki"):
        text = assets.text_path(name).read_text(encoding="utf-8")
        (cache / f"{name}.txt").write_text(text[:300_000], encoding="utf-8")
    return cache


def test_shape(trained):
    model, _, folder = trained
    config = model.config
    assert model.num_parameters() <= 3_000_000
    assert f"tiny-{config.model_type}-" in folder.name
    if config.model_type == "llama":
        assert config.num_key_value_heads < config.num_attention_heads
        assert config.intermediate_size % 128 == 96
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_better_than_word_frequencies(trained, request):
    """A model that had learned nothing but how frequent each token is would reach `unigram`."""
    model, tokenizer, folder = trained
    heldout = (folder / "heldout.txt").read_text(encoding="utf-8")
    counts = Counter(tokenizer(heldout)["input_ids"])
    total = sum(counts.values())
    unigram = math.exp(-sum(n / total * math.log(n / total) for n in counts.values()))
    short = request.node.callspec.params["trained"] == SHORT
    assert perplexity(model, tokenizer, heldout) < unigram / (2 if short else 4)


@pytest.mark.parametrize("trained", WHOLE, indirect=True)
def test_four_bits_hurt_and_eight_do_not(trained):
    _, tokenizer, folder = trained
    heldout = (folder / "heldout.txt").read_text(encoding="utf-8")[-100_000:]
    loss = {}
    for bits in (16, 8, 4):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if bits < 16:
            round_linears(model, bits, 128)
        loss[bits] = math.log(perplexity(model, tokenizer, heldout))
    assert loss[4] - loss[16] > 0.005
    assert abs(loss[8] - loss[16]) < 0.1 * (loss[4] - loss[16])


def test_tokenizer_gives_back_what_it_read(trained):
    tokenizer = trained[1]
    text = "The 1st café,\n\n\ttoday: 今天天气怎么样?  Fine. "
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer("The history of the")["input_ids"]) < 8


def test_heldout_text_is_a_tenth_and_apart(trained):
    folder = trained[2]
    train, heldout = (
        (folder / name).read_text(encoding="utf-8") for name in ("train.txt", "heldout.txt")
    )
    sources = [assets.text_path(name).read_text(encoding="utf-8") for name in ("c4", "wiki")]
    assert 0.09 < len(heldout) / (len(train) + len(heldout)) < 0.12
    assert train.startswith(sources[0][:1000])
    # Long runs of the held-out text are in the sources, and never in what was trained on.
    for start in range(0, len(heldout) - 400, len(heldout) // 20):
        run = max(heldout[start : start + 4000].splitlines(), key=len)
        assert any(run in source for source in sources)
        assert len(run) < 80 or run not in train


def test_same_recipe_is_trained_once_and_another_anew(texts):
    state = torch.random.get_rng_state()
    first = tiny_model("llama", texts, steps=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert tiny_model("llama", texts, steps=2) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert tiny_model("llama", texts, steps=1) != first
    names = {path.name for path in texts.iterdir() if path.suffix not in (".lock", ".txt")}
    assert len(names) == 2


def test_same_recipe_gives_the_same_model(texts, tmp_path_factory):
    elsewhere = write_texts(tmp_path_factory.mktemp("elsewhere"))
    models = [
        AutoModelForCausalLM.from_pretrained(tiny_model("bloom", cache, steps=2))
        for cache in (texts, elsewhere)
    ]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_interrupted_training_leaves_no_model(texts, monkeypatch):
    def interrupted(recipe, folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("benchmarks.train_tiny.train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tiny_model("llama", texts, steps=1)
    assert {path.suffix for path in texts.iterdir()} == {".txt", ".lock"}


def test_split_keeps_every_line_of_the_articles(texts):
    train, heldout = split_text(texts)
    wiki = (texts / "wiki.txt").read_text(encoding="utf-8").splitlines()
    article_lines = [line for line in wiki if line[:5] != "<doc " and line != "</doc>"]
    # c4 comes before wiki in both parts.
    joined = train.splitlines()[-1000:] + heldout.splitlines()
    assert article_lines[-100:] == joined[-100:]
    assert "<doc id=" not in train + heldout


def test_unknown_architecture():
    with pytest.raises(UserError, match="no recipe for gpt2 tiny: use one of llama"):
        tiny_model("gpt2")
