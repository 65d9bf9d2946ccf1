"""Last words of passages: how passages are chosen, and what lm-evaluation-harness makes of them."""

import importlib.util
import json
import math

import pytest
import torch
from conftest import WORDS

import gptq
from benchmarks.tasks import __main__ as tasks
from benchmarks.tasks.passages import Passage, passages

GOOD = (
    "The cat sat. A dog ran. Rain fell on the hill. So the dog saw the rain at night and the cat."
)
FIRST = "One day was long. The night was cold. Few saw the night. Then came the night."
TEXT = f"""<doc id="1" title="Cat &amp; hill">
The cat
{GOOD}
Too short for a passage. It has the passage.
</doc>
Outside of documents. A dog ran. Rain fell on the hill. So the dog saw the hill.
<doc id="2">
The word is new. A dog ran. Rain fell on the hill. So the dog saw the sand.
{FIRST} Then came the cold. It was cold. Few saw the cold.
Very short. Last words count. They count not. So it has an end at sea. Ends at sea.
The price &lt;b&gt; rose. A price fell. One more came. Then fell the price.
{"Long " * 300}word. A word. Another one. Then came the word.
</doc>
"""


def test_passages_end_with_a_word_of_an_earlier_sentence():
    found = passages(TEXT, 10)
    assert found == [
        Passage("One day was long. The night was cold. Few saw the night. Then came the", "night")
    ]


def test_what_a_passage_is_made_of():
    text = f"<doc>\n{FIRST.replace('One day', 'Mr &amp; Mrs')}\n</doc>"
    (found,) = passages(text, 10)
    assert found.context.startswith("Mr & Mrs was long. ")
    # Sentences before those of the passage are left out.
    (found,) = passages(f"<doc>\nIt began. So it was. {FIRST}\n</doc>", 10)
    assert found.context == "So it was. One day was long. The night was cold. Few saw the"


def test_passages_are_spread_evenly_and_stay_the_same():
    lines = [FIRST.replace("One day", f"Day {number}") for number in range(100)]
    text = "<doc>\n" + "\n".join(lines) + "\n</doc>"
    chosen = [it.context.split(" was ")[0] for it in passages(text, 4)]
    assert chosen == ["Day 0", "Day 25", "Day 50", "Day 75"]
    assert len(passages(text, 1000)) == 100
    assert passages("no documents", 4) == []


def test_without_the_harness(monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.tasks.harness.find_spec", lambda name: None)
    assert tasks.main(["some-model"]) == 2
    assert capsys.readouterr().err == (
        "error: benchmarks.tasks needs lm_eval: pip install 'lm_eval>=0.4.9' first\n"
    )


def test_a_checkpoint_that_is_not_there(llama_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "check_installed", lambda: "0")
    words = [str(llama_dir), "--output", str(tmp_path / "t.json"), "--checkpoint"]
    assert tasks.main([*words, str(tmp_path / "none.pt")]) == 2
    assert capsys.readouterr().err == f"error: --checkpoint {tmp_path}/none.pt: is not there\n"


def by_hand(model, tokenizer, passage):
    """ln P(word), and whether each of its tokens is the likeliest."""
    context = tokenizer(passage.context)["input_ids"]
    whole = tokenizer(f"{passage.context} {passage.word}")["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    rest = range(len(context), len(whole))
    loss = sum(float(logits[i - 1, whole[i]]) for i in rest)
    return loss, all(int(logits[i - 1].argmax()) == whole[i] for i in rest)


@pytest.mark.extras
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval")
def test_the_harness(llama_dir, text_file, tmp_path, monkeypatch, capsys):
    lines = [f"{w} {FIRST} It was the {w}. So came the {w} again." for w in WORDS.split()]
    (tmp_path / "wiki.txt").write_text("<doc>\n" + "\n".join(lines) + "\n</doc>")
    monkeypatch.setattr(tasks, "text_path", lambda name, cache: tmp_path / f"{name}.txt")
    checkpoint, output = tmp_path / "m.pt", tmp_path / "t.json"
    config = gptq.QuantConfig(bits=4, group_size=32)
    gptq.quantize(llama_dir, text_file, config, save=checkpoint, nsamples=4, seqlen=32)
    words = [str(llama_dir), "--checkpoint", str(checkpoint), "--output", str(output)]
    assert tasks.main([*words, "--count", "6", "--device", "cpu"]) == 0
    record = json.loads(output.read_text())
    found = passages((tmp_path / "wiki.txt").read_text(), 6)
    assert record["passages"] == len(found) == 6
    assert [row["name"] for row in record["results"]] == ["full", "m.pt"]
    for row, weights in zip(record["results"], (None, checkpoint), strict=True):
        pairs = [by_hand(*gptq.load(llama_dir, weights, device="cpu"), it) for it in found]
        losses, right = zip(*pairs, strict=True)
        assert row["perplexity"] == pytest.approx(math.exp(-sum(losses) / 6), rel=1e-3)
        assert row["accuracy"] == sum(right) / 6
    assert "m.pt" in capsys.readouterr().out
