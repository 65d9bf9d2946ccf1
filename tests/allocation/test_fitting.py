"""Models that have to fit: files of at most the size that was asked for, in every format."""

import json

import gguf
import pytest
import torch
from helpers.old_tools import PROBE

import gptq
from gptq import QuantConfig, api
from gptq.checkpoints.sizes import tokenizer_bytes
from gptq.cli.run import main
from gptq.config import Width
from gptq.errors import UserError
from gptq.models import LLAMA

RUN = {"nsamples": 8, "seqlen": 32}
CONFIG = QuantConfig()


def weight_bytes(path):
    files = path.glob("*.safetensors") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def widths_of(folder, path):
    model, _ = gptq.load(folder, path)
    layers = [it for name, it in model.named_modules() if "layers" in name]
    return {(it.bits, it.group_size) for it in layers if isinstance(it, gptq.QuantLinear)}


def least_size(folder, text_file, outputs, config=CONFIG):
    """The smallest size in bytes that a message names."""
    with pytest.raises(UserError, match="smallest possible is") as refused:
        gptq.quantize(folder, text_file, config, size="1B", **outputs, **RUN)
    mib = float(str(refused.value).split("smallest possible is ")[1].split(" MiB")[0])
    return int(mib * 2**20)


OUTPUTS = {
    "pt": {"save": "m.pt"},
    "safetensors": {"save_safetensors": "m.safetensors"},
    "gguf": {"save": "m.gguf"},
    "gguf, asymmetric": {"save": "m.gguf"},
    **{
        name: {"save_dir": "folder", "format": name}
        for name in ("gptq", "gptq_v2", "compressed-tensors", "mlx")
    },
    "both": {"save": "m.pt", "save_dir": "folder"},
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("fixture", ["llama_dir", "bloom_dir"])
def test_files_fit(fixture, kind, request, text_file, tmp_path):
    folder = request.getfixturevalue(fixture)
    if (fixture, kind) == ("bloom_dir", "mlx"):
        pytest.skip("mlx-lm has no BLOOM")
    outputs = {
        key: tmp_path / name if key != "format" else name for key, name in OUTPUTS[kind].items()
    }
    config = QuantConfig(sym=kind == "gguf")
    least = least_size(folder, text_file, outputs, config)
    size = int(least * 1.02)
    gptq.quantize(folder, text_file, config, size=f"{size}B", **outputs, **RUN)
    written = [path for key, path in outputs.items() if key != "format"]
    for path in written:
        assert 0 < weight_bytes(path) <= size


def test_more_bytes_are_used(llama_dir, text_file, tmp_path):
    bits = []
    for average in (3.0, 4.5, 5.5):
        path = tmp_path / f"{average}.pt"
        report = gptq.quantize(llama_dir, text_file, CONFIG, average_bits=average, save=path, **RUN)
        bits.append(sum(it.bits for it in report.layers))
        assert widths_of(llama_dir, path) == {(it.bits, it.group_size) for it in report.layers}
    assert bits == sorted(set(bits))


def test_a_stopped_run_goes_on_with_the_widths_it_chose(
    llama_dir, text_file, tmp_path, monkeypatch
):
    arguments = (llama_dir, text_file, CONFIG)
    settings = {"average_bits": 4.4, **RUN}
    gptq.quantize(*arguments, save=tmp_path / "whole.pt", **settings)

    def stop(layer, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptq.quantize(*arguments, save=tmp_path / "m.pt", progress=stop, **settings)
    kept = json.loads((tmp_path / "m.pt.journal" / "widths.json").read_text())
    assert len(kept) == 14
    with pytest.raises(UserError, match="holds the chosen widths of an earlier run; add --resume"):
        gptq.quantize(*arguments, save=tmp_path / "m.pt", **settings)
    with pytest.raises(UserError, match="differs in budget"):
        gptq.quantize(
            *arguments, save=tmp_path / "m.pt", resume=True, **{**settings, "average_bits": 4.6}
        )
    # What was chosen is not measured again.
    monkeypatch.setattr("gptq.quantization.fitting_widths", None)
    gptq.quantize(*arguments, save=tmp_path / "m.pt", resume=True, **settings)
    assert (tmp_path / "m.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert not (tmp_path / "m.pt.journal").exists()


def test_other_groups_than_the_one_given_are_not_chosen(llama_dir, text_file, tmp_path, capsys):
    path = tmp_path / "m.pt"
    argv = [llama_dir, text_file, "--wbits", "3.9", "--groupsize", "32", "--save", path]
    assert main(LLAMA, [*map(str, argv), "--nsamples", "8", "--seqlen", "32"]) == 0
    widths = widths_of(llama_dir, path)
    assert {size for _, size in widths} == {32}
    assert len(widths) > 1
    model, _ = gptq.load(llama_dir, path)
    assert bool(torch.isfinite(model(PROBE).logits).all())


def test_the_default_name_says_what_it_fits(llama_dir, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [str(llama_dir), str(text_file), "--save", "--nsamples", "8", "--seqlen", "32"]
    assert main(LLAMA, [*argv, "--wbits", "4.5"]) == 0
    assert main(LLAMA, [*argv, "--size", "1MiB"]) == 0
    assert {path.suffix for path in tmp_path.iterdir()} == {".pt"}
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{llama_dir.name}-1MiB.pt".lower().replace("mib", "MiB"), names[1]]
    assert names[1].endswith("-4.5bit.pt")


BAD = {
    "--size 1kB": "smallest possible is",
    "--size lots": "--size lots is not a size",
    "--size 1GiB --wbits 4": "--size and --wbits 4 disagree",
    "--wbits 2.05": "an average of 2.05 bits is too little; the least possible is",
    "--wbits 17.5": "17.5 is not possible",
    "--wbits 5": "5 is not possible: choose one of 2, 3, 4, 8, 16, or an average such as 3.5",
    "--wbits x.5": "--wbits",
    "--wbits 3.5 --load x.pt": "--wbits 3.5 is for quantizing",
    "--size 1GiB --load x.pt": "--size is for quantizing",
}


@pytest.mark.parametrize("flags", BAD)
def test_what_cannot_work_is_said_before_the_run(flags, llama_dir, text_file, tmp_path, capsys):
    argv = [str(llama_dir), str(text_file), *flags.split()]
    save = [] if "--load" in flags else ["--save", str(tmp_path / "m.pt")]
    assert main(LLAMA, [*argv, *save]) == 2
    error = capsys.readouterr().err.strip()
    assert BAD[flags] in error
    assert "\n" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_format_that_holds_no_width_says_why(bloom_dir, text_file, tmp_path):
    outputs = {"save_dir": tmp_path / "folder", "format": "mlx"}
    with pytest.raises(UserError, match="no width can be written: --format mlx: transformer"):
        gptq.quantize(bloom_dir, text_file, average_bits=4.5, **outputs, **RUN)


def test_without_text_nothing_can_be_measured(llama_dir, tmp_path):
    config = QuantConfig(method="rtn")
    with pytest.raises(UserError, match="needs DATASET"):
        gptq.quantize(llama_dir, None, config, average_bits=4.5, save=tmp_path / "m.pt")


def test_one_way_of_saying_widths(llama_dir, text_file, tmp_path):
    widths = {"model.layers.0.self_attn.o_proj": Width(8, 32)}
    with pytest.raises(UserError, match="exclude each other"):
        gptq.quantize(llama_dir, text_file, widths=widths, average_bits=3.5, save=tmp_path / "m.pt")
    assert api.Job(CONFIG, api.Outputs(tmp_path / "m.pt"), text_file).target is None


# The embedding and the head -----------------------------------------------------------------------


def ends_of(folder, path):
    """Bits of the embedding of a loaded model."""
    model, _ = gptq.load(folder, path)
    return model.get_input_embeddings().bits


@pytest.mark.parametrize("fixture", ["llama_dir", "bloom_dir"])
def test_the_embedding_gets_what_the_size_allows(fixture, request, text_file, tmp_path):
    folder = request.getfixturevalue(fixture)
    outputs = {"save": tmp_path / "m.pt"}
    least = least_size(folder, text_file, outputs)
    fixed = QuantConfig(embedding_bits=16)
    assert least < least_size(folder, text_file, outputs, fixed)
    report = gptq.quantize(folder, text_file, size=f"{int(least * 1.01)}B", **outputs, **RUN)
    assert report.embedding == Width(4, 32)
    assert ends_of(folder, outputs["save"]) == 4
    assert weight_bytes(outputs["save"]) <= least * 1.01
    report = gptq.quantize(folder, text_file, size="10MiB", save=tmp_path / "large.pt", **RUN)
    assert report.embedding == Width(8, 64)
    assert ends_of(folder, tmp_path / "large.pt") == 8


@pytest.mark.parametrize(("flags", "bits"), [("--embedding-bits 8", 8), ("--plain", None)])
def test_what_is_asked_for_is_not_chosen(flags, bits, llama_dir, text_file, tmp_path, capsys):
    path = tmp_path / "m.pt"
    with_choice = least_size(llama_dir, text_file, {"save": path})
    argv = [str(llama_dir), str(text_file), *flags.split(), "--save", str(path)]
    argv += ["--nsamples", "8", "--seqlen", "32", "--size"]
    assert main(LLAMA, [*argv, f"{int(with_choice * 1.01)}B"]) == 2
    assert "smallest possible is" in capsys.readouterr().err
    assert main(LLAMA, [*argv, "1MiB"]) == 0
    assert "embedding and head" not in capsys.readouterr().out
    assert getattr(gptq.load(llama_dir, path)[0].get_input_embeddings(), "bits", None) == bits


def test_ends_that_no_output_packs_are_not_chosen(llama_dir, text_file, tmp_path):
    config, path = QuantConfig(sym=True), tmp_path / "folder"
    report = gptq.quantize(llama_dir, text_file, config, size="1MiB", save_dir=path, **RUN)
    assert report.embedding is None


@pytest.mark.parametrize(("sym", "few"), [(True, "Q4_0"), (False, "Q4_1")])
def test_the_ends_of_a_gguf_file_are_chosen(sym, few, llama_dir, text_file, tmp_path):
    path, config = tmp_path / "m.gguf", QuantConfig(sym=sym)
    least = least_size(llama_dir, text_file, {"save": path}, config)
    for size, kind in ((int(least * 1.01), few), (2**20, "Q8_0")):
        gptq.quantize(llama_dir, text_file, config, size=f"{size}B", save=path, **RUN)
        assert path.stat().st_size <= size
        tensors = {it.name: it.tensor_type.name for it in gguf.GGUFReader(path).tensors}
        assert {tensors[name] for name in ("token_embd.weight", "output.weight")} == {kind}
        path.unlink()


@pytest.mark.parametrize("folder", ["llama_dir", "bloom_dir"])
def test_the_bytes_of_a_tokenizer_are_those_in_a_file(folder, request, text_file, tmp_path):
    folder, path = request.getfixturevalue(folder), tmp_path / "m.gguf"
    gptq.quantize(folder, text_file, QuantConfig(method="rtn", group_size=32), save=path, **RUN)
    fields = gguf.GGUFReader(path).fields
    keys = [key for key in fields if key.startswith("tokenizer.")]
    assert "tokenizer.ggml.tokens" in keys
    size = sum(part.nbytes for key in keys for part in fields[key].parts)
    assert tokenizer_bytes(api.open_full(folder, "cpu", "float32")) == size


def test_a_stopped_run_goes_on_with_the_embedding_it_chose(
    llama_dir, text_file, tmp_path, monkeypatch
):
    least = least_size(llama_dir, text_file, {"save": tmp_path / "m.pt"})
    settings = {"size": f"{int(least * 1.02)}B", **RUN}
    gptq.quantize(llama_dir, text_file, save=tmp_path / "whole.pt", **settings)

    def stop(layer, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptq.quantize(llama_dir, text_file, save=tmp_path / "m.pt", progress=stop, **settings)
    monkeypatch.setattr("gptq.quantization.fitting_widths", None)
    gptq.quantize(llama_dir, text_file, save=tmp_path / "m.pt", resume=True, **settings)
    assert (tmp_path / "m.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


def test_the_table_says_what_the_embedding_got(llama_dir, text_file, tmp_path, capsys):
    argv = [str(llama_dir), str(text_file), "--size", "1MiB", "--save", str(tmp_path / "m.pt")]
    assert main(LLAMA, [*argv, "--nsamples", "8", "--seqlen", "32"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "embedding and head" in line]
    assert len(lines) == 1
    assert "8 bit g64" in lines[0]
