"""What a run is tuned on, and what it is judged by."""

import pytest
import torch

from gptq.data.tuning_windows import HELD_OUT, tuning_windows
from gptq.data.windows import RUN, calibration_windows
from gptq.errors import UserError

SEQLEN = 32


class Numbers:
    """A tokenizer of a text of numbers: each is a token."""

    def __call__(self, text, **_):
        return type("Encoding", (), {"input_ids": [int(word) for word in text.split()]})


def runs(windows):
    return {tuple(run) for run in windows.unfold(1, RUN, 1).reshape(-1, RUN).tolist()}


def windows(folder, words, tokens, nsamples=4):
    """Calibration windows, windows to train on and held-out ones of a text of some words."""
    path = folder / "text.txt"
    path.write_text(words, encoding="utf-8")
    calibration = calibration_windows(path, Numbers(), nsamples, SEQLEN, 0)
    return calibration, *tuning_windows(path, Numbers(), calibration, tokens, 0)


def test_the_calibration_windows_come_first_and_held_out_text_is_new(tmp_path):
    text = " ".join(map(str, range(20_000)))
    calibration, training, held_out = windows(tmp_path, text, 64 * SEQLEN)
    assert torch.equal(training[:4], calibration)
    assert training.shape == (64, SEQLEN)
    assert held_out.shape == (64 // HELD_OUT, SEQLEN)
    parts = [len(runs(held[None]) & runs(training)) for held in held_out]
    assert max(parts) <= (SEQLEN - RUN + 1) / 4
    # Drawn the same way each time: a run that is resumed has the same.
    again = windows(tmp_path, text, 64 * SEQLEN)
    assert torch.equal(again[1], training)
    assert torch.equal(again[2], held_out)


def test_tokens_are_rounded_up_to_windows(tmp_path):
    text = " ".join(map(str, range(5_000)))
    assert len(windows(tmp_path, text, 1)[1]) == 1
    assert len(windows(tmp_path, text, SEQLEN + 1)[1]) == 2


def test_a_template_that_every_window_has_is_no_overlap(tmp_path):
    template = " ".join(map(str, range(100_000, 100_000 + RUN)))
    records = (f"{template} {' '.join(map(str, range(i, i + 60)))}" for i in range(0, 60_000, 60))
    _, training, _ = windows(tmp_path, " ".join(records), 32 * SEQLEN)
    assert len(training) == 32


def test_a_text_of_little_more_than_a_window_cannot_be_tuned_on(tmp_path):
    with pytest.raises(
        UserError, match=r"text\.txt: the text is too short to train on .*more text"
    ):
        windows(tmp_path, " ".join(map(str, range(SEQLEN + 4))), 8 * SEQLEN, nsamples=1)
