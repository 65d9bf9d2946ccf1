"""Windows against straightforward reimplementations of what GPTQ-for-LLaMa draws."""

import hashlib
import logging
import random
import struct

import pytest
import torch
from helpers.texts import EOS, byte_tokenizer, draw_joined, json_lines, random_text, text_of, write
from transformers import PreTrainedTokenizerFast

from gptq.data.windows import (
    calibration_windows,
    distinct_tokens,
    evaluation_windows,
    text_fingerprint,
)
from gptq.errors import UserError


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.mark.parametrize("length", [33, 34, 400])
def test_calibration_draws_the_windows_of_gptq_for_llama(tmp_path, tokenizer, length):
    text = random_text(length)
    path = write(tmp_path / "some.utf8", text)
    ids = tokenizer(text).input_ids
    random.seed(11)
    starts = [random.randint(0, len(ids) - 32 - 1) for _ in range(9)]
    expected = torch.tensor([ids[start : start + 32] for start in starts])

    before = random.getstate()
    windows = calibration_windows(str(path), tokenizer, nsamples=9, seqlen=32, seed=11)

    assert windows.dtype == torch.int64
    assert torch.equal(windows, expected)
    assert random.getstate() == before


def test_a_text_of_exactly_one_window(tmp_path, tokenizer):
    text = random_text(32)
    path = write(tmp_path / "one.txt", text)
    ids = torch.tensor([tokenizer(text).input_ids])
    assert torch.equal(calibration_windows(path, tokenizer, 3, 32, seed=0), ids.repeat(3, 1))
    assert torch.equal(evaluation_windows(path, tokenizer, 32), ids)


def test_seeds_differ(tmp_path, tokenizer):
    path = write(tmp_path / "text.txt", random_text(5000))
    first, again, other = (calibration_windows(path, tokenizer, 4, 16, s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("limit", "count"), [(None, 3), (2, 2), (9, 3)])
def test_evaluation_windows_follow_one_another(tmp_path, tokenizer, limit, count):
    text = random_text(109)
    path = write(tmp_path / "text.txt", text)
    windows = evaluation_windows(path, tokenizer, 32, limit)
    assert windows.dtype == torch.int64
    ids = tokenizer(text).input_ids
    assert windows.tolist() == [ids[i : i + 32] for i in range(0, 32 * count, 32)]


def test_special_tokens_are_the_tokenizers_own(tmp_path):
    tokenizer = byte_tokenizer(bos=True)
    path = write(tmp_path / "text.txt", "abc")
    assert text_of(path, tokenizer) == "<s>abc"


def test_a_long_text_gives_no_warning(tmp_path, caplog):
    tokenizer = byte_tokenizer(model_max_length=8)
    path = write(tmp_path / "text.txt", random_text(100))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        calibration_windows(path, tokenizer, 2, 16, seed=0)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


def test_records_are_windows_of_one_stream(tmp_path, tokenizer):
    texts = [random_text(50, seed) for seed in range(8)]
    path = write(tmp_path / "t.jsonl", json_lines(*({"text": text} for text in texts)))
    ids = tokenizer(EOS.join(texts)).input_ids
    windows = calibration_windows(path, tokenizer, nsamples=10, seqlen=70, seed=5)
    assert windows.tolist() == draw_joined(ids, 10, 70, seed=5)


LIST = "neither a file nor a known data set; pass one of c4, wikitext2, ptb, c4-new, ptb-new, or"


@pytest.mark.parametrize("name", ["wikitext", "gone/file.txt", "x" * 5000, "~nobody-here/a"])
def test_unknown_names_and_missing_files(tokenizer, name):
    for windows in (
        lambda: calibration_windows(name, tokenizer, 1, 8, seed=0),
        lambda: evaluation_windows(name, tokenizer, 8),
    ):
        with pytest.raises(UserError) as error:
            windows()
        assert str(error.value).startswith(f"{name}: {LIST} the path of a text")


def test_a_folder(tmp_path, tokenizer):
    with pytest.raises(UserError, match="is a folder; pass one"):
        evaluation_windows(tmp_path, tokenizer, 8)


def test_a_text_shorter_than_a_window(tmp_path, tokenizer):
    path = write(tmp_path / "short.txt", "x" * 31)
    message = "short.txt: the text is 31 tokens, one window is 32; pass a smaller --seqlen"
    with pytest.raises(UserError, match=message):
        calibration_windows(path, tokenizer, 1, 32, seed=0)
    with pytest.raises(UserError, match=message):
        evaluation_windows(path, tokenizer, 32)


@pytest.mark.parametrize(
    ("nsamples", "seqlen", "message"),
    [(0, 8, "nsamples must be at least 1, not 0"), (1, -1, "seqlen must be at least 1, not -1")],
)
def test_calibration_sizes(tmp_path, tokenizer, nsamples, seqlen, message):
    path = write(tmp_path / "text.txt", "text")
    with pytest.raises(UserError, match=message):
        calibration_windows(path, tokenizer, nsamples, seqlen, seed=0)


@pytest.mark.parametrize(("seqlen", "limit"), [(0, None), (8, 0)])
def test_evaluation_sizes(tmp_path, tokenizer, seqlen, limit):
    path = write(tmp_path / "text.txt", "text")
    with pytest.raises(UserError, match=r"(seqlen|limit) must be at least 1, not 0"):
        evaluation_windows(path, tokenizer, seqlen, limit)


def test_fingerprint_is_of_shape_and_tokens():
    windows = torch.tensor([[1, 2, 3], [4, 5, 260]])
    content = b"(2, 3)" + struct.pack("<6q", 1, 2, 3, 4, 5, 260)
    assert text_fingerprint(windows) == hashlib.sha256(content).hexdigest()[:16]
    assert text_fingerprint(windows.to(torch.int32)) == text_fingerprint(windows)
    assert text_fingerprint(windows.T.contiguous().T) == text_fingerprint(windows)
    others = [windows.view(3, 2), windows[:1], windows.flip(0), windows + 1]
    assert len({text_fingerprint(other) for other in [windows, *others]}) == 5


def test_distinct_tokens_count_repeated_text_once():
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(32_000, (500,), generator=generator)
    windows = torch.stack([text[start : start + 100] for start in (0, 0, 50, 200)])
    # Runs of 8 of the first 150 tokens, and of 100 further on.
    assert distinct_tokens(windows) == 143 + 93
    assert distinct_tokens(windows[:2]) == 93
    assert distinct_tokens(torch.tensor([5, 6, 7] * 40)[None]) == 3
    assert distinct_tokens(torch.tensor([[1, 2], [1, 2], [2, 1]])) == 2
    shuffled = torch.randint(3, (8, 2000), generator=generator)
    rows = shuffled.unfold(1, 8, 1).reshape(-1, 8)
    assert distinct_tokens(shuffled) == len(torch.unique(rows, dim=0))
