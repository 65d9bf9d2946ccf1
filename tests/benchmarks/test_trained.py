"""Models that have learned something, on text they have never seen: what quantization costs."""

import math

import pytest
from conftest import ROOT

from benchmarks.limits import PLAIN
from benchmarks.train_tiny import tiny_model
from gptq import QuantConfig, api
from gptq.data.windows import evaluation_windows

WINDOWS, SEQLEN = 100, 256


@pytest.fixture(scope="module", params=["llama", "bloom"])
def trained(request, tmp_path_factory):
    """Folder of a trained model, text it was trained on, and its loss on held-out text."""
    return with_text(tiny_model(request.param, ROOT / ".cache"), tmp_path_factory)


@pytest.fixture(scope="module")
def briefly_trained(tmp_path_factory):
    """The same of a model that 2 bits cost something, and 4 bits nothing yet."""
    return with_text(tiny_model("bloom", ROOT / ".cache", steps=300), tmp_path_factory)


def with_text(folder, tmp_path_factory):
    text = tmp_path_factory.mktemp("text") / "train.txt"
    # Enough for the windows; tokenizing all of it takes longer than quantizing.
    text.write_text((folder / "train.txt").read_text(encoding="utf-8")[:200_000], encoding="utf-8")
    return folder, text, loss_of(folder, None)


def loss_of(folder, checkpoint) -> float:
    """ln of the perplexity on held-out text."""
    opened = api.open_weights(folder, checkpoint)
    tokenizer = opened.source.tokenizer()
    windows = evaluation_windows(folder / "heldout.txt", tokenizer, SEQLEN, WINDOWS)
    return math.log(api.perplexity(opened, windows))


def gap(trained, tmp_path, **settings) -> float:
    """How far quantization raises the loss, in nats a token."""
    folder, text, full = trained
    api.quantize(
        folder,
        text,
        QuantConfig(**settings),
        save=tmp_path / "m.pt",
        nsamples=32,
        seqlen=SEQLEN,
    )
    return loss_of(folder, tmp_path / "m.pt") - full


def test_2_bit_gptq_beats_rounding(briefly_trained, tmp_path):
    rounding = gap(briefly_trained, tmp_path, bits=2, method="rtn", scale_search="minmax")
    plain = gap(briefly_trained, tmp_path, bits=2, **PLAIN)
    ours = gap(briefly_trained, tmp_path, bits=2)
    print(f"gap: rounding {rounding:.4f}, plain GPTQ {plain:.4f}, default {ours:.4f}")
    assert rounding > 0.03, "rounding costs nothing here: the test shows nothing"
    assert plain < 0.7 * rounding
    assert ours < 0.3 * rounding


@pytest.mark.thorough
@pytest.mark.parametrize("sym", [False, True])
def test_4_bit_gptq_beats_rounding(trained, tmp_path, sym):
    rounding = gap(trained, tmp_path, sym=sym, method="rtn", scale_search="minmax")
    plain = gap(trained, tmp_path, sym=sym, **PLAIN)
    ours = gap(trained, tmp_path, sym=sym)
    print(f"gap: rounding {rounding:.4f}, plain GPTQ {plain:.4f}, default {ours:.4f}")
    assert rounding > 0.004, "rounding costs nothing here: the test shows nothing"
    assert plain < rounding
    assert ours < 0.6 * rounding


@pytest.mark.thorough
def test_8_bit_loses_next_to_nothing(trained, tmp_path):
    assert abs(gap(trained, tmp_path, bits=8)) < 0.001


@pytest.mark.thorough
def test_fewer_bits_cost_more(trained, tmp_path):
    gaps = [gap(trained, tmp_path, bits=bits, group_size=64) for bits in (4, 2)]
    assert gaps == sorted(gaps)
