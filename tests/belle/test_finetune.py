"""Training tiny models to the end, and what stops a run."""

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import llama_config, make_model
from helpers.answering import with_large_head
from helpers.forked import Child, team
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerState

import gptq
from belle.finetune.__main__ import main
from belle.finetune.recipes import RECIPES
from belle.finetune.watch import Watch
from gptq.data.chat import belle_prompt

PAIRS = [
    ("Say cat", "the cat"),
    ("Say dog", "the dog run"),
    ("And rain?", "rain fell"),
    ("Who?", "one man\n\nand 猫"),
]
LEARN = ("--batch", "4", "--rate", "4e-3", "--epochs", "80", "--schedule", "cosine")
QUICK = ("--batch", "4", "--rate", "1e-3", "--epochs", "4", "--schedule", "cosine")


def write_records(path: Path, count: int = len(PAIRS)) -> Path:
    lines = [
        json.dumps({"instruction": f"{question}{index // 4 or ''}", "output": answer})
        for index, (question, answer) in enumerate(PAIRS * (count // len(PAIRS)))
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "records.jsonl")


@pytest.fixture(scope="module")
def more_data(tmp_path_factory) -> Path:
    """24 records."""
    return write_records(tmp_path_factory.mktemp("data") / "records.jsonl", 24)


@pytest.fixture(scope="module", params=["llama", "bloom"])
def base(request, tmp_path_factory) -> Path:
    model = request.getfixturevalue(f"{request.param}_dir")
    return with_large_head(model, tmp_path_factory.mktemp("base") / request.param)


def tune(*argv: object) -> None:
    assert main([str(it) for it in argv]) == 0


def losses(out: Path) -> list[float]:
    return json.loads((out / "training.json").read_text())["losses"]


def answer(model, tokenizer, question: str) -> str:
    prompt = tokenizer(belle_prompt([{"role": "user", "content": question}]), return_tensors="pt")
    given = prompt["input_ids"]
    with torch.no_grad():
        made = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=40,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.decode(made[0, given.shape[1] :])


def answers_all(model, tokenizer) -> bool:
    return all(answer(model, tokenizer, asked) == f" {said}</s>" for asked, said in PAIRS)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(first: Path, second: Path) -> bool:
    """Whether two folders' weights are the same bits."""
    one, two = (folder / "model.safetensors" for folder in (first, second))
    return one.read_bytes() == two.read_bytes()


def alike(first: Path, second: Path) -> bool:
    """Whether two folders' weights are the same but for one rounding to 16 bits: on some processors
    matrix products add in an order that depends on where their operands lie in memory."""
    one, two = map(tensors, (first, second))
    return one.keys() == two.keys() and all(
        torch.allclose(one[name].float(), two[name].float(), rtol=2e-3, atol=1e-6) for name in one
    )


# What is trained -----------------------------------------------------------------------------


def test_all_weights_learn_and_the_folder_is_a_model(model_dir, data, tmp_path, capsys):
    out = tmp_path / "out"
    tune(model_dir, data, out, *LEARN)
    assert losses(out)[0] > 2
    assert losses(out)[-1] < 0.1
    for model, tokenizer in (
        gptq.load(out),
        (AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), gptq.load(out)[1]),
    ):
        assert answers_all(model, tokenizer)
    assert {tensor.dtype for tensor in tensors(out).values()} == {torch.float16}
    assert tensors(out).keys() == tensors(model_dir).keys()
    assert not (tmp_path / "out.training").exists()
    printed = capsys.readouterr().out
    for part in ("all weights", "4 used", "4 x 80 epochs, 80 steps", "out"):
        assert part in printed


def test_lora_learns_and_its_folder_is_an_adapter(base, data, tmp_path):
    out = tmp_path / "out"
    tune(base, data, out, *LEARN, "--rate", "1e-2", "--lora", "--all-linear", "--dropout", "0")
    weights = load_file(out / "adapter_model.safetensors")
    assert weights
    assert all(bool(tensor.any()) for tensor in weights.values())
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert answers_all(PeftModel.from_pretrained(model, out), gptq.load(base)[1])


def test_a_merged_adapter_is_a_full_model(base, data, tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    tune(base, data, adapter, *QUICK, "--rate", "2e-2", "--lora")
    tune(base, data, merged, *QUICK, "--rate", "2e-2", "--lora", "--merge")
    assert tensors(merged).keys() == tensors(base).keys()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(model, adapter)
    probe = torch.arange(20, 60).reshape(1, -1)
    with torch.no_grad():
        difference = expected(probe).logits - gptq.load(merged)[0](probe).logits
        assert difference.abs().max() < 0.02 * expected(probe).logits.abs().max()


def test_the_recipe_says_which_layers_have_an_adapter(model_dir, data, tmp_path):
    out = tmp_path / "out"
    tune(model_dir, data, out, "--recipe", "belle-llama-lora", "--batch", "4", "--rank", "2")
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (2, 16, 0.05)
    expected = {"llama": {"q_proj", "v_proj"}, "bloom": {"query_key_value"}}
    assert set(config["target_modules"]) == expected[model_dir.name.partition("-")[2].lower()]
    assert config["base_model_name_or_path"] == str(model_dir)


def test_top_blocks_change_nothing_else(base, data, tmp_path):
    out = tmp_path / "out"
    tune(base, data, out, *LEARN, "--top-blocks", "1")
    before, after = tensors(base), tensors(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".1." in name}
    assert losses(out)[-1] < losses(out)[0] / 4


def test_the_folder_declares_the_prompt_that_it_was_trained_with(llama_dir, data, tmp_path):
    """Also if the tokenizer had another chat template."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(llama_dir, base)
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": "other"}))
    tune(base, data, out, *QUICK)
    turns = [{"role": "user", "content": "Who?"}]
    written = gptq.load(out)[1].apply_chat_template(turns, tokenize=False)
    assert written == belle_prompt(turns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_keep_their_type(data, tmp_path, dtype):
    """BELLE issue 291: checkpoints were twice as large as the model."""
    base, out = make_model(tmp_path / "base", llama_config()), tmp_path / "out"
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(base)
    tune(base, data, out, *QUICK)
    assert {tensor.dtype for tensor in tensors(out).values()} == {dtype}
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype


def test_a_step_does_not_depend_on_what_a_device_takes_at_once(model_dir, more_data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ("--batch", "8", "--rate", "1e-3", "--epochs", "1", "--recompute")
    tune(model_dir, more_data, one, *settings[:-1], "--device-batch", "8")
    tune(model_dir, more_data, two, *settings, "--device-batch", "2")
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)


# Stopped runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(llama_dir, more_data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken") / "out"
    tune(llama_dir, more_data, out, *QUICK)
    return out


def stop_at(monkeypatch, step: int, number: int) -> None:
    """Send this process a signal as soon as a step is done."""
    on_log = Watch.on_log

    def stopping(self, args, state, control, logs=None, **others):
        if state.global_step == step:
            os.kill(os.getpid(), number)
        on_log(self, args, state, control, logs, **others)

    monkeypatch.setattr(Watch, "on_log", stopping)


@pytest.mark.parametrize("when", ["between steps", "while it saves"])
def test_a_killed_run_goes_on(when, llama_dir, more_data, unbroken, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = [*map(str, (llama_dir, more_data, out)), *QUICK, "--save-every", "5"]
    with monkeypatch.context() as patch:
        if when == "between steps":
            stop_at(patch, 13, signal.SIGKILL)
        else:
            save = TrainerState.save_to_json

            def dying(self, path):
                if self.global_step == 10:
                    os.kill(os.getpid(), signal.SIGKILL)
                save(self, path)

            patch.setattr(TrainerState, "save_to_json", dying)
        child = Child(lambda: main(command), tmp_path / "log", {})
    assert child.wait() == -signal.SIGKILL
    assert not out.exists()
    assert main(command) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main([*command, "--rate", "1e-4", "--resume"]) == 2
    assert "differs in recipe" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert same(out, unbroken)
    assert len(losses(out)) == 24


def test_ctrl_c_leaves_a_state(llama_dir, more_data, unbroken, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    command = [*map(str, (llama_dir, more_data, out)), *QUICK]
    with monkeypatch.context() as patch:
        stop_at(patch, 7, signal.SIGINT)
        assert main(command) == 130
    assert "add --resume to go on" in capsys.readouterr().err
    assert not out.exists()
    assert main([*command, "--resume"]) == 0
    assert same(out, unbroken)


def test_nan_ends_a_run_in_one_line(llama_dir, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*map(str, (llama_dir, data, out)), "--batch", "4", "--rate", "1e30"]) == 2
    (line,) = [it for it in capsys.readouterr().err.splitlines() if it.startswith("error")]
    assert line.startswith(
        "error: step 2: the gradient is nan at learning rate 1e+30; lower --rate"
    )
    assert not out.exists()


# Several scales of one run -------------------------------------------------------------------


@pytest.mark.parametrize("trained", [(), ("--lora", "--merge")], ids=["all", "lora"])
def test_scales_of_one_run_are_those_of_runs_on_so_many_records(
    trained, llama_dir, more_data, tmp_path
):
    settings = ("--batch", "4", "--epochs", "1", "--rate", "1e-3", *trained)
    tune(llama_dir, more_data, tmp_path / "scales", *settings, "--scales", "16,8")
    found = sorted(path.name for path in (tmp_path / "scales").iterdir())
    assert found == ["16", "8"]
    for count in (8, 16):
        part = write_records(tmp_path / f"{count}.jsonl", count)
        alone = tmp_path / f"alone{count}"
        tune(llama_dir, part, alone, *settings, "--file-order")
        assert alike(tmp_path / "scales" / str(count), alone)
    assert not alike(tmp_path / "scales" / "8", tmp_path / "scales" / "16")


def test_a_killed_run_goes_on_with_its_scales(llama_dir, more_data, tmp_path, monkeypatch):
    settings = ("--batch", "4", "--epochs", "1", "--rate", "1e-3", "--scales", "8,24")
    tune(llama_dir, more_data, tmp_path / "unbroken", *settings)
    out = tmp_path / "out"
    command = [*map(str, (llama_dir, more_data, out)), *settings]
    with monkeypatch.context() as patch:
        stop_at(patch, 4, signal.SIGKILL)
        child = Child(lambda: main(command), tmp_path / "log", {})
        assert child.wait() == -signal.SIGKILL
    assert [path.name for path in out.iterdir()] == ["8"]
    tune(*command, "--resume")
    for count in ("8", "24"):
        assert same(out / count, tmp_path / "unbroken" / count)


INEXACT = {
    ("--scales", "4", "--recipe", "2304.08109"): "exact only at a constant rate",
    ("--scales", "4", "--epochs", "1", "--warmup", "0.1"): "exact only at a constant rate",
    ("--scales", "4"): "exact only at a constant rate and in one epoch",
    ("--scales", "6", "--epochs", "1", "--batch", "4"): "6: is no multiple of the batch of 4",
    ("--scales", "8", "--epochs", "1", "--batch", "4"): "8: only 4 records",
}


@pytest.mark.parametrize("flags", INEXACT, ids=str)
def test_scales_that_are_not_exact(flags, llama_dir, data, tmp_path, capsys):
    assert main([*map(str, (llama_dir, data, tmp_path / "out")), *flags]) == 2
    assert INEXACT[flags] in capsys.readouterr().err


# Several devices -----------------------------------------------------------------------------


def test_two_processes_take_the_steps_of_one(llama_dir, more_data, unbroken, tmp_path):
    out = tmp_path / "out"
    command = [*map(str, (llama_dir, more_data, out)), *QUICK]

    def process() -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        # Else accelerate gives each process several threads, which a fork cannot start.
        os.environ["OMP_NUM_THREADS"] = "1"
        return main(command)

    children = team([process, process], tmp_path)
    assert [child.wait() for child in children] == [0, 0], children[0].said
    assert losses(out) == pytest.approx(losses(unbroken), rel=1e-3)
    assert "fine-tuning" in children[0].said
    assert "fine-tuning" not in children[1].said


# Mistakes ------------------------------------------------------------------------------------


def mistakes(llama_dir: Path, data: Path, tmp_path: Path):
    """(argv, part of the message)."""
    lone = tmp_path / "lone.jsonl"
    lone.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": ""}\n')
    there = tmp_path / "there"
    there.mkdir()
    out = tmp_path / "out"
    return {
        "data without an answer": ((llama_dir, lone, out), "line 2: has an empty answer"),
        "no data": ((llama_dir, tmp_path / "none.json", out), "none.json"),
        "no model": ((tmp_path / "none", data, out), "none does not exist"),
        "recipe": ((llama_dir, data, out, "--recipe", "best"), "invalid choice: 'best'"),
        "out exists": ((llama_dir, data, there), "there: exists; give a new name"),
        "a file": ((llama_dir, data, tmp_path / "out.pt"), "only --train scales writes a file"),
        "batch": ((llama_dir, data, out, "--batch", "0"), "--batch 0: must be at least 1"),
        "rate": ((llama_dir, data, out, "--rate", "nan"), "--rate must be above 0"),
        "device batch": ((llama_dir, data, out, "--device-batch", "3"), "is no multiple of the 3"),
        "top": ((llama_dir, data, out, "--top-blocks", "3"), "the model has 2 blocks"),
        "two": ((llama_dir, data, out, "--lora", "--top-blocks", "1"), "choose one of them"),
        "rank": ((llama_dir, data, out, "--rank", "4"), "add --lora"),
        "alpha": ((llama_dir, data, out, "--lora", "--alpha", "0"), "--alpha 0: must be at least"),
        "dropout": ((llama_dir, data, out, "--lora", "--dropout", "2"), "--dropout 2.0: must be"),
        "seed": ((llama_dir, data, out, "--seed", "-1"), "--seed -1: must be in 0..4294967295"),
        "scales": ((llama_dir, data, out, "--scales", "x"), "x is no list of whole numbers"),
        "merge": ((llama_dir, data, out, "--merge"), "leave it out"),
        "template": ((llama_dir, data, out, "--prompt", "template"), "template is missing"),
        "full": ((llama_dir, data, out, "--train", "scales"), "the model is not quantized"),
        "length": ((llama_dir, data, out, "--length", "3"), "within 3 tokens"),
    }


def test_a_mistake_is_one_line(llama_dir, data, tmp_path, capsys):
    for name, (argv, message) in mistakes(llama_dir, data, tmp_path).items():
        assert main([*map(str, argv)]) == 2, name
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("error: "), name
        assert message in line, name
    assert not list(tmp_path.glob("out*"))


def test_a_folder_of_somebody_else_is_left_alone(llama_dir, data, tmp_path, capsys):
    (tmp_path / "out.training").mkdir()
    own = tmp_path / "out.training" / "notes.txt"
    own.write_text("mine")
    assert main([*map(str, (llama_dir, data, tmp_path / "out")), *QUICK]) == 2
    assert "out.training: is not of a training" in capsys.readouterr().err
    assert own.read_text() == "mine"


def test_recipes_are_those_of_their_sources():
    found = {
        name: (it.batch, it.rate, it.schedule, it.warmup, it.epochs, it.decay, it.length)
        for name, it in RECIPES.items()
    }
    assert found["2303.14742"][:6] == (64, 3e-6, "constant", 0, 2, 0.001)
    assert found["belle-bloom"][:5] == (64, 1e-5, "linear", 0.1, 2)
    assert found["belle-llama"] == (128, 2e-5, "linear", 0.1, 2, 0, 1024)
    assert found["2304.08109"] == (32, 5e-6, "cosine", 0, 3, 0, 1024)
    assert found["2304.08109-lora"] == (128, 2e-4, "cosine", 0, 4, 0, 1024)
    assert all((it.lora is not None) == name.endswith("-lora") for name, it in RECIPES.items())
    assert math.isclose(RECIPES["belle-bloom-lora"].rate, RECIPES["belle-bloom"].rate)
