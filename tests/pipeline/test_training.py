"""Runs that train after the solve: what is in the file, what is resumed, what is refused."""

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig, api
from gptq.cli.run import main
from gptq.data.tuning_windows import tuning_windows
from gptq.data.windows import calibration_windows
from gptq.errors import UserError
from gptq.pipeline.memory import Needs
from gptq.pipeline.training_memory import check_training_fits
from gptq.tuning import end_to_end

CONFIG = QuantConfig(bits=2, group_size=32, tune_tokens=1000, embedding_bits=16)
SEQLEN = 48


@pytest.fixture(autouse=True)
def several_steps(monkeypatch):
    """A look after every second step, of two windows each; no other kind of product."""
    monkeypatch.setattr("gptq.tuning.streams.STEP_TOKENS", 4 * SEQLEN)
    monkeypatch.setattr(end_to_end, "CHECK", 2)
    # Random models give much the same output, however they are rounded.
    monkeypatch.setattr(end_to_end, "RATE", 0.03)
    monkeypatch.setattr("gptq.tuned_text.training_dtype", lambda _: torch.float32)


class Stopped(Exception):
    """Ends a run."""


def run(folder, text, config=CONFIG, *, show=None, progress=None, resume=False, **outputs):
    job = api.Job(config, api.Outputs(**outputs), text, nsamples=4, seqlen=SEQLEN, resume=resume)
    return api.run(api.open_full(folder, "cpu", "float32"), job, progress, training=show)


def divergence(folder, checkpoint, text):
    """Of a file from the full model, on the windows that a run with CONFIG holds out."""
    quantized, tokenizer = gptq.load(folder, checkpoint, device="cpu", dtype="float32")
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calibration = calibration_windows(text, tokenizer, 4, SEQLEN, 0)
    _, held_out = tuning_windows(text, tokenizer, calibration, CONFIG.tune_tokens, 0)
    with torch.no_grad():
        found, wanted = (it(held_out).logits.log_softmax(-1) for it in (quantized, full))
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


@pytest.mark.parametrize(
    "changes",
    [{}, {"order": "act", "bits": 3}, {"sym": True, "group_size": -1}, {"true_sequential": False}],
    ids=str,
)
def test_the_file_has_what_training_reported(model_dir, text_file, tmp_path, changes):
    config = QuantConfig(**{**CONFIG.to_dict(), "tune_tokens": 1000, **changes})
    outputs = {
        "save": tmp_path / "model.pt",
        "save_safetensors": tmp_path / "model.safetensors",
        "save_dir": tmp_path / "folder",
    }
    losses = []
    run(model_dir, text_file, config, show=lambda *look: losses.append(look[2]), **outputs)
    assert min(losses) < losses[0]
    for path in outputs.values():
        assert divergence(model_dir, path, text_file) == pytest.approx(
            min(losses), rel=2e-3, abs=1e-6
        )


def test_trained_norms_are_in_a_gguf_file(llama_dir, text_file, tmp_path):
    config = QuantConfig(bits=4, group_size=32, tune_tokens=1000)
    run(llama_dir, text_file, config, save=tmp_path / "model.gguf", save_dir=tmp_path / "folder")
    folder, _ = gptq.load(tmp_path / "folder", device="cpu", dtype="float32")
    full = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32)
    tensors = {it.name: torch.tensor(it.data) for it in GGUFReader(tmp_path / "model.gguf").tensors}
    trained = folder.model.norm.weight
    assert torch.equal(tensors["output_norm.weight"], trained)
    assert not torch.equal(trained, full.model.norm.weight)


def stop_in_second_block(layer, _total):
    if layer.block == 1:
        raise Stopped


def stop_at_second_look(step, _steps, _loss):
    if step:
        raise Stopped


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "damaged"])
def test_a_resumed_run_gives_the_same_bytes(llama_dir, text_file, tmp_path, damaged):
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    run(llama_dir, text_file, save=whole)
    with pytest.raises(Stopped):
        run(llama_dir, text_file, save=parts, progress=stop_in_second_block)
    with pytest.raises(Stopped):
        run(llama_dir, text_file, save=parts, show=stop_at_second_look, resume=True)
    if damaged:
        state = tmp_path / "parts.pt.journal" / "training.safetensors"
        state.write_bytes(state.read_bytes()[:-4] + b"oops")
    steps = []
    run(llama_dir, text_file, save=parts, show=lambda *it: steps.append(it[0]), resume=True)
    assert steps[0] == (0 if damaged else 4)
    assert parts.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "parts.pt.journal").exists()


def test_rounding_to_nearest_can_be_trained(llama_dir, text_file, tmp_path):
    config = QuantConfig(bits=2, group_size=32, method="rtn", tune_tokens=1000)
    losses = []
    run(llama_dir, text_file, config, save=tmp_path / "a.pt", show=lambda *it: losses.append(it[2]))
    assert min(losses) < losses[0]


def test_what_is_refused_before_the_run(llama_dir, text_file, tmp_path, monkeypatch):
    save = {"save": tmp_path / "a.pt"}
    nearest = QuantConfig(method="rtn", tune_tokens=9)
    with pytest.raises(UserError, match="no DATASET to tune on: give c4"):
        run(llama_dir, None, nearest, **save)
    job = api.Job(CONFIG, api.Outputs(**save), text_file, nsamples=4, seqlen=48, max_memory="1MiB")
    with pytest.raises(
        UserError, match=r"--max-memory 1MiB is too little: training .* takes 1\.\d"
    ):
        api.run(api.open_full(llama_dir, "cpu"), job)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="--tune-tokens 1000 is for one process"):
        run(llama_dir, text_file, **save)
    assert not list(tmp_path.iterdir())


def test_the_command_line_shows_the_held_out_loss(llama_dir, text_file, tmp_path, capsys):
    flags = "--wbits 2 --groupsize 32 --nsamples 4 --seqlen 48 --quality tune --tune-tokens 1000"
    argv = [llama_dir, text_file, *flags.split(), "--device", "cpu", "--save", tmp_path / "a.pt"]
    assert main(argv=[str(it) for it in argv]) == 0
    assert "training: step 2 of " in capsys.readouterr().err


def test_free_memory_that_is_too_little_is_named():
    needed = Needs(1, 2, 3, training=2**31)
    check_training_fits(needed, 2**31, None)
    with pytest.raises(UserError, match=r"the free memory is too little: .* 2\.0 GiB, and 1\.0"):
        check_training_fits(needed, 2**30, None)
