"""What is written takes the place of nothing that somebody else put there."""

import errno
import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptq
import gptq.api
from gptq.checkpoints.writing import is_ours
from gptq.convert import convert
from gptq.errors import UserError
from gptq.files import atomic
from gptq.files.atomic import check_apart, check_writable, remove_partial, whole_folder

CONFIG = gptq.QuantConfig(bits=8, group_size=32, method="rtn", scale_search="minmax")
MODEL_FILES = {"config.json", "model.safetensors"}


def rounded(model: Path, **outputs) -> None:
    gptq.quantize(model, None, CONFIG, device="cpu", **outputs)


# Outputs inside one another ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outputs", "match"),
    [
        ({"save": "d/m.pt", "save_dir": "d"}, r"d/m.pt: lies inside .*/d, which is replaced"),
        ({"save": "d/x/../m.pt", "save_dir": "link"}, r"lies inside .*link, which is replaced"),
        ({"save": "m.pt", "save_dir": "d", "report": "d/page"}, r"d/page: lies inside"),
        ({"save": "same.pt", "save_dir": "same.pt"}, r"same.pt: is asked for twice"),
    ],
)
def test_outputs_inside_one_another_are_refused(llama_dir, tmp_path, outputs, match):
    (tmp_path / "d" / "x").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "d")
    paths = {name: tmp_path / path for name, path in outputs.items()}
    job = gptq.api.Job(CONFIG, gptq.api.Outputs(**paths), None)
    with pytest.raises(UserError, match=match):
        gptq.api.run(gptq.api.open_full(llama_dir, "cpu"), job)
    assert not list(tmp_path.rglob("*.journal"))


def test_a_report_around_other_outputs_is_fine(tmp_path):
    outputs = [tmp_path / "run" / "m.pt", tmp_path / "run" / "d", tmp_path / "run"]
    check_apart(outputs, [], folder=outputs[1])


def test_an_input_inside_an_output_is_refused(llama_dir, text_file, tmp_path):
    rounded(llama_dir, save_dir=tmp_path / "d")
    inside = tmp_path / "d" / "full"
    inside.mkdir()
    for file in llama_dir.iterdir():
        (inside / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"full: is read and would be replaced"):
        rounded(inside, save_dir=tmp_path / "d")
    text = tmp_path / "d" / "words.txt"
    text.write_bytes(text_file.read_bytes())
    with pytest.raises(UserError, match=r"words.txt: is read and would be replaced"):
        gptq.quantize(llama_dir, text, save_dir=tmp_path / "d")
    with pytest.raises(UserError, match=r"is a file of .*full, which is read"):
        rounded(inside, save_safetensors=inside / "model.safetensors")
    assert (inside / "model.safetensors").read_bytes() == (
        llama_dir / "model.safetensors"
    ).read_bytes()


def test_convert_does_not_replace_what_it_reads(llama_dir, tmp_path):
    rounded(llama_dir, save_dir=tmp_path / "d")
    before = (tmp_path / "d" / "model.safetensors").read_bytes()
    for source in (tmp_path / "d" / "model.safetensors", tmp_path / "d"):
        with pytest.raises(UserError, match="is read and would be replaced"):
            convert(source, tmp_path / "d", model=llama_dir, format="dense")
    assert (tmp_path / "d" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("name", ["new", "new.pt", "new.safetensors"])
def test_convert_compares_before_it_replaces(llama_dir, tmp_path, monkeypatch, name):
    rounded(llama_dir, save=tmp_path / "m.pt")
    convert(tmp_path / "m.pt", tmp_path / name, model=llama_dir)
    target = tmp_path / name / "model.safetensors" if name == "new" else tmp_path / name
    before = target.read_bytes()

    def differs(*_args):
        raise RuntimeError("was not written as it was read")

    monkeypatch.setattr("gptq.convert.verify", differs)
    with pytest.raises(RuntimeError, match="was not written"):
        convert(tmp_path / "m.pt", tmp_path / name, model=llama_dir, format="dense")
    assert target.read_bytes() == before
    assert set(os.listdir(tmp_path)) == {"m.pt", name}


# What somebody else put into a folder ------------------------------------------------------------


def test_what_a_person_keeps_in_a_folder_stays(llama_dir, bloom_dir, tmp_path):
    folder = tmp_path / "d"
    rounded(bloom_dir, save_dir=folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_text("mine")
    (folder / "adapter_model.safetensors").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("ours, and of an older model")
    rounded(llama_dir, save_dir=folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "adapter" / "adapter_model.safetensors").read_text() == "mine"
    assert (folder / "adapter_model.safetensors").read_text() == "mine"
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert set(os.listdir(tmp_path)) == {"d"}
    rounded(llama_dir, save=tmp_path / "m.pt")
    convert(tmp_path / "m.pt", folder, model=llama_dir)
    assert (folder / "notes.txt").read_text() == "mine"


def folder_with(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_that_cannot_be_replaced_is_the_older_one(tmp_path, monkeypatch, exchange):
    folder = folder_with(tmp_path / "d", config__json="old", notes__txt="mine")
    calls = []

    def refused(*args):
        calls.append(args)
        if len(calls) == (1 if exchange else 2):
            raise OSError(errno.EIO, "Input/output error")
        return replace(*args)

    replace = os.replace
    if exchange:
        monkeypatch.setattr(atomic, "_exchange", refused)
    else:
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_a, **_k: object())
        monkeypatch.setattr(os, "replace", refused)
    with (
        pytest.raises(UserError, match="Input/output error"),
        whole_folder(folder, is_ours) as temporary,
    ):
        (temporary / "config.json").write_text("new")
    assert (folder / "config.json").read_text() == "old"
    assert (folder / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["d"]


def test_without_an_exchange_it_is_two_renames(tmp_path, monkeypatch):
    folder = folder_with(tmp_path / "d", config__json="old", notes__txt="mine")
    monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_a, **_k: object())
    with whole_folder(folder, is_ours) as temporary:
        (temporary / "config.json").write_text("new")
    assert (folder / "config.json").read_text() == "new"
    assert (folder / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["d"]


def test_what_is_not_ours_comes_back_from_a_killed_replacement(tmp_path):
    """Killed after the exchange: the older folder, with the notes, has a temporary name."""
    folder = folder_with(tmp_path / "d", config__json="new")
    folder_with(tmp_path / ".d.0123abcd.partial", config__json="old", notes__txt="mine")
    remove_partial(folder, is_ours)
    assert (folder / "config.json").read_text() == "new"
    assert (folder / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["d"]


def test_partial_files_of_another_output_stay(tmp_path):
    """`model` and `model.pt` are two runs' outputs."""
    names = {".model.pt.0123abcd.partial", ".model.0123abcd.partial"}
    for name in names:
        (tmp_path / name).touch()
    remove_partial(tmp_path / "model")
    assert os.listdir(tmp_path) == [".model.pt.0123abcd.partial"]


# Places that a folder can be -----------------------------------------------------------------


def assert_written(folder: Path) -> None:
    assert set(os.listdir(folder)) >= MODEL_FILES
    assert not [name for name in os.listdir(folder) if "partial" in name or "journal" in name]


def test_a_symbolic_link_to_a_folder(llama_dir, tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big")
    for _ in range(2):
        rounded(llama_dir, save_dir=tmp_path / "link")
        assert_written(tmp_path / "big")
    assert (tmp_path / "link").is_symlink()


def test_a_symbolic_link_to_a_file(llama_dir, tmp_path):
    (tmp_path / "real.pt").touch()
    (tmp_path / "m.pt").symlink_to(tmp_path / "real.pt")
    rounded(llama_dir, save=tmp_path / "m.pt")
    assert (tmp_path / "m.pt").is_symlink()
    assert (tmp_path / "real.pt").stat().st_size > 0


def test_the_folder_that_the_process_is_in(llama_dir, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path / "here")
    before = Path.cwd().stat().st_ino
    for _ in range(2):
        rounded(llama_dir, save_dir=".")
        assert_written(tmp_path / "here")
    assert (tmp_path / "here" / "notes.txt").exists()
    assert (tmp_path / "here").stat().st_ino == before


def test_a_mount_point(llama_dir, tmp_path):
    """A container's volume: it cannot be renamed."""
    mount = tmp_path / "volume"
    mount.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", mount], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting needs root")
    try:
        for _ in range(2):
            rounded(llama_dir, save_dir=mount)
            assert_written(mount)
    finally:
        subprocess.run(["umount", mount], check=True)


@pytest.mark.parametrize("folder", [True, False])
def test_a_name_that_is_too_long_is_refused_before_the_work(tmp_path, folder):
    with pytest.raises(UserError, match=r"cannot be written \(File name too long\)"):
        check_writable(tmp_path / ("x" * 250), folder=folder)
    assert os.listdir(tmp_path) == []


def test_what_is_no_ordinary_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is no ordinary file"):
        check_writable(tmp_path / "pipe")


# A finished journal ------------------------------------------------------------------------------

RUN = {"nsamples": 3, "seqlen": 32, "device": "cpu"}


def stopped_at_the_end(llama_dir, text_file, monkeypatch, **outputs) -> None:
    def refuse(*_args, **_kwargs):
        raise UserError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("gptq.quantization.write", refuse)
        with pytest.raises(UserError, match="the disk is full"):
            gptq.quantize(llama_dir, text_file, **outputs, **RUN)


@pytest.mark.parametrize("change", ["embedding bits", "more outputs", "another order"])
def test_finished_blocks_can_be_written_in_another_way(
    llama_dir, text_file, tmp_path, monkeypatch, change
):
    config = gptq.QuantConfig(group_size=32)
    folder, file = tmp_path / "d", tmp_path / "m.pt"
    stopped_at_the_end(llama_dir, text_file, monkeypatch, config=config, save_dir=folder)
    monkeypatch.setattr("gptq.pipeline.blocks.solve_layer", None)  # no layer is solved again
    later: dict = {"config": config, "save_dir": folder}
    if change == "embedding bits":
        later["config"] = gptq.QuantConfig(group_size=32, embedding_bits=4)
    else:
        later["save"] = file
    gptq.quantize(llama_dir, text_file, **later, **RUN, resume=True)
    assert_written(folder)
    assert file.exists() == ("save" in later)
    assert set(os.listdir(tmp_path)) <= {"d", "m.pt"}


@pytest.mark.parametrize(
    ("changed", "value"), [("version", "0.0"), ("solver", "other"), ("device", "cuda")]
)
def test_blocks_of_another_solver_are_refused(
    llama_dir, text_file, tmp_path, monkeypatch, changed, value
):
    stopped_at_the_end(llama_dir, text_file, monkeypatch, save=tmp_path / "m.pt")
    file = tmp_path / "m.pt.journal" / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), changed: value}))
    with pytest.raises(UserError, match=f"differs in {changed}"):
        gptq.quantize(llama_dir, text_file, save=tmp_path / "m.pt", resume=True, **RUN)


def test_a_flipped_bit_in_a_block_is_noticed(llama_dir, text_file, tmp_path, monkeypatch):
    stopped_at_the_end(llama_dir, text_file, monkeypatch, save=tmp_path / "m.pt")
    part = tmp_path / "m.pt.journal" / "block-0001.safetensors"
    data = bytearray(part.read_bytes())
    data[-100] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match=r"block-0001.safetensors: is damaged; delete it"):
        gptq.quantize(llama_dir, text_file, save=tmp_path / "m.pt", resume=True, **RUN)
    part.unlink()
    gptq.quantize(llama_dir, text_file, save=tmp_path / "m.pt", resume=True, **RUN)
    assert os.listdir(tmp_path) == ["m.pt"]


def test_columns_that_trade_places_are_another_block(llama_dir, text_file, tmp_path, monkeypatch):
    """Their sums are the same, row by row."""
    model = tmp_path / "model"
    model.mkdir()
    for file in llama_dir.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tensors = load_file(model / "model.safetensors")
    # The first and the last block count in the model's own hash: a third one lies between them.
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (model / "config.json").write_text(json.dumps(config))
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    stopped_at_the_end(model, text_file, monkeypatch, save=tmp_path / "m.pt")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:, torch.randperm(tensors[name].shape[1])].contiguous()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="block 1 was made from another model's weights"):
        gptq.quantize(model, text_file, save=tmp_path / "m.pt", resume=True, **RUN)


# What a caller asks for ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to write"),
        ({"save": "m.safetensors"}, "m.safetensors: save needs a name that ends in .pt or .gguf"),
        ({"save": "m.GGUF"}, "m.GGUF: save needs"),
        ({"save_safetensors": "m.pt"}, "m.pt: save_safetensors needs .* ends in .safetensors"),
        ({"save_dir": "m.gguf"}, "m.gguf: a folder cannot be read by that name"),
        ({"save": "m.pt", "nsamples": "4"}, "nsamples '4': give a whole number from 1 on"),
        ({"save": "m.pt", "nsamples": 2.5}, "nsamples 2.5: give"),
        ({"save": "m.pt", "seqlen": 1}, "seqlen 1: give a whole number from 2 on"),
        ({"save": "m.pt", "seed": "x"}, "seed 'x': give"),
        ({"save": "m.pt", "dataset": ["a"]}, r"dataset \['a'\]: give a name or a path"),
        ({"save": "m.pt", "config": {"bits": 4}}, "config {'bits': 4}: give a QuantConfig"),
        ({"save": "m.pt", "average_bits": float("nan")}, "average_bits nan: give more than 2"),
        ({"save": "m.pt", "average_bits": "3.5"}, "average_bits '3.5': give"),
        ({"save": "m.pt", "size": 0}, "size 0 is not a size"),
        ({"save": "m.pt", "size": "big"}, "size big is not a size"),
        ({"save": "m.pt", "max_memory": 10}, "memory"),
    ],
)
def test_arguments_that_cannot_work(
    arguments, message, llama_dir, text_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        gptq.quantize(llama_dir, **{"dataset": text_file, **arguments})
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_sizes_in_bytes(llama_dir, text_file, tmp_path):
    settings = {"nsamples": 4, "seqlen": 32, "max_memory": 8 * 2**30}
    gptq.quantize(llama_dir, text_file, size=200_000, save=tmp_path / "m.pt", **settings)
    assert (tmp_path / "m.pt").stat().st_size <= 200_000
