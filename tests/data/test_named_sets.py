"""Named data sets, from a hub that answers only the exact questions expected."""

import random
from pathlib import Path

import datasets
import pytest
import torch
from helpers.texts import (
    assert_one_line,
    byte_tokenizer,
    draw_joined,
    random_text,
    text_of,
    write,
)
from transformers import PreTrainedTokenizerFast

from gptq.data import windows as data_windows
from gptq.data.windows import calibration_windows, evaluation_windows
from gptq.errors import UserError

HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "text"),
    "ptb": ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet", "sentence"),
    "c4": ("allenai/c4", None, None, "text"),
}
FILES = {
    ("c4", "train"): "en/c4-train.00000-of-01024.json.gz",
    ("c4", "validation"): "en/c4-validation.00000-of-00008.json.gz",
    ("ptb", "train"): "penn_treebank/train/0000.parquet",
    ("ptb", "validation"): "penn_treebank/validation/0000.parquet",
    ("ptb", "test"): "penn_treebank/test/0000.parquet",
}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def hub_texts(split: str) -> list[str]:
    """Documents of 0 to 60 characters, other ones for each split, more than c4-new reads."""
    rng = random.Random(split)
    return [random_text(rng.randint(0, 60), seed=i) for i in range(1300)]


@pytest.fixture
def hub(monkeypatch) -> list[str]:
    """A hub that answers only the exact questions expected; the splits asked for."""
    asked: list[str] = []

    def load_dataset(path, name=None, data_files=None, split=None, revision=None):
        key = next(key for key, (repo, *_) in HUB.items() if repo == path)
        _, config, expected_revision, field = HUB[key]
        file = FILES.get((key, split))
        assert (name, revision) == (config, expected_revision)
        assert data_files == ({split: file} if file else None)
        asked.append(split)
        # Other columns must not get in the way.
        texts = hub_texts(split)
        return datasets.Dataset.from_dict({"url": ["x"] * len(texts), field: texts})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def draw_documents(texts: list[str], tokenizer, nsamples: int, seqlen: int, seed: int):
    random.seed(seed)
    windows = []
    for _ in range(nsamples):
        while True:
            ids = tokenizer(texts[random.randint(0, len(texts) - 1)]).input_ids
            if len(ids) > seqlen:
                break
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return windows


@pytest.mark.parametrize(
    ("name", "separator"), [("wikitext2", "\n\n"), ("ptb", "\n\n"), ("ptb-new", " ")]
)
def test_joined_sets_calibrate_on_their_train_split(hub, tokenizer, name, separator):
    ids = tokenizer(separator.join(hub_texts("train"))).input_ids
    windows = calibration_windows(name, tokenizer, nsamples=6, seqlen=40, seed=3)
    assert windows.tolist() == draw_joined(ids, 6, 40, seed=3)
    assert hub == ["train"]


@pytest.mark.parametrize("name", ["c4", "c4-new"])
def test_c4_calibrates_on_one_document_per_window(hub, tokenizer, name):
    windows = calibration_windows(name, tokenizer, nsamples=20, seqlen=40, seed=3)
    assert windows.tolist() == draw_documents(hub_texts("train"), tokenizer, 20, 40, seed=3)
    assert hub == ["train"]


@pytest.mark.parametrize(
    ("name", "separator", "split"),
    [("wikitext2", "\n\n", "test"), ("ptb", "\n\n", "validation"), ("ptb-new", " ", "test")],
)
def test_joined_sets_evaluate_on_all_of_a_split(hub, tokenizer, name, separator, split):
    ids = tokenizer(separator.join(hub_texts(split))).input_ids
    windows = evaluation_windows(name, tokenizer, seqlen=40)
    assert len(windows) == len(ids) // 40
    assert windows.flatten().tolist() == ids[: len(windows) * 40]
    assert hub == [split]
    assert torch.equal(evaluation_windows(name, tokenizer, 40, limit=5), windows[:5])


def test_c4_evaluates_on_256_random_documents(hub, tokenizer):
    windows = evaluation_windows("c4", tokenizer, seqlen=40)
    assert windows.tolist() == draw_documents(hub_texts("validation"), tokenizer, 256, 40, seed=0)
    assert torch.equal(evaluation_windows("c4", tokenizer, 40, limit=5), windows[:5])
    assert hub == ["validation"] * 2


@pytest.mark.parametrize(("seqlen", "limit"), [(20, None), (2000, None), (20, 7)])
def test_c4_new_evaluates_on_the_first_1100_documents(hub, tokenizer, seqlen, limit):
    ids = tokenizer(" ".join(hub_texts("validation")[:1100])).input_ids
    windows = evaluation_windows("c4-new", tokenizer, seqlen, limit)
    assert len(windows) == (limit or min(256, len(ids) // seqlen))
    assert windows.flatten().tolist() == ids[: len(windows) * seqlen]


def test_c4_new_reads_no_more_than_1100_documents(hub, tokenizer):
    length = len(tokenizer(" ".join(hub_texts("validation")[:1100])).input_ids)
    assert evaluation_windows("c4-new", tokenizer, length).shape == (1, length)
    with pytest.raises(UserError, match=f"c4-new: the text is {length} tokens"):
        evaluation_windows("c4-new", tokenizer, length + 1)


def test_documents_as_long_as_a_window_are_passed_over(monkeypatch, tokenizer):
    texts = ["x" * 8] * 30 + ["abcdefghi"]
    documents = datasets.Dataset.from_dict({"text": texts})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: documents)
    windows = calibration_windows("c4", tokenizer, nsamples=4, seqlen=8, seed=0)
    assert tokenizer.batch_decode(windows) == ["abcdefgh"] * 4


def test_no_document_is_long_enough(monkeypatch, hub, tokenizer):
    monkeypatch.setattr(data_windows, "MAX_DRAWS", 50)
    with pytest.raises(UserError, match=r"c4: none of 50 documents .* than 61 tokens.*--seqlen"):
        calibration_windows("c4", tokenizer, 1, 61, seed=0)


@pytest.mark.parametrize(
    "failure", [ConnectionError("no route\nto host"), RuntimeError(""), ValueError("no config")]
)
def test_an_unreachable_hub_names_the_way_out(monkeypatch, tokenizer, failure):
    def load_dataset(*_, **__):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"^ptb: cannot get ptb-text.*path of a local text"
    ) as error:
        evaluation_windows("ptb", tokenizer, 8)
    assert_one_line(error)
    assert type(failure).__name__ in str(error.value)


def test_a_name_wins_over_a_file_unless_it_is_a_path(monkeypatch, tmp_path, tokenizer, hub):
    monkeypatch.chdir(tmp_path)
    write(Path("c4"), "local text")
    assert text_of(Path("c4"), tokenizer) == "local text"
    assert text_of("./c4", tokenizer) == "local text"
    assert not hub
    evaluation_windows("c4", tokenizer, 8, limit=1)
    assert hub == ["validation"]
