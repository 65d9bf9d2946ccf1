"""`--save model.gguf`, `--load model.gguf` and a .gguf as MODEL, as typed."""

import gguf
import pytest
import torch
from helpers.logs import without_progress

import gptq
from gptq import convert
from gptq.cli.run import main
from gptq.models import BLOOM, LLAMA


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command line in an empty folder; returns its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, spec=LLAMA):
        capsys.readouterr()
        code = main(spec, [str(argument) for argument in argv])
        out, err = capsys.readouterr()
        return code, out, without_progress(err)

    return call


QUICK = ("--nsamples", "4", "--seqlen", "16")


@pytest.mark.parametrize("spec", [LLAMA, BLOOM])
def test_it_is_quantized_in_groups_of_32_and_evaluated(
    spec, run, llama_dir, bloom_dir, text_file, tmp_path
):
    folder = llama_dir if spec is LLAMA else bloom_dir
    evaluate = ("--eval-data", text_file, "--eval-windows", "3", "--seqlen", "32")
    argv = (folder, text_file, "--wbits", "4", "--nsamples", "4", *evaluate)
    code, out, err = run(*argv, "--save", "m.gguf", spec=spec)
    assert (code, err) == (0, "")
    assert out.startswith("groups of 32: a .gguf file has a scale for 32 inputs; see --groupsize\n")
    assert "run it with: llama-cli -m m.gguf" in out.splitlines()
    types = {tensor.tensor_type.name for tensor in gguf.GGUFReader("m.gguf").tensors}
    assert types == {"Q4_1", "Q8_0", "F32"}
    (perplexity,) = [line for line in out.splitlines() if line.startswith("perplexity")]
    for model in ((folder, "--load", "m.gguf"), ("m.gguf",)):
        code, out, err = run(*model, *evaluate, spec=spec)
        assert (code, err) == (0, "")
        assert perplexity in out.splitlines()


@pytest.mark.parametrize("spec", [LLAMA, BLOOM])
@pytest.mark.parametrize(("sym", "kind"), [((), "Q4_1"), (("--sym",), "Q4_0")])
def test_an_embedding_and_a_head_of_4_bits(sym, kind, spec, run, llama_dir, bloom_dir, text_file):
    """They are those of a .pt file of the same settings, a head solved for its inputs too."""
    folder = llama_dir if spec is LLAMA else bloom_dir
    argv = (folder, text_file, "--wbits", "4", "--groupsize", "32", *sym, *QUICK)
    argv = (*argv, "--embedding-bits", "4")
    assert run(*argv, "--save", "m.gguf", "--save_safetensors", "m.safetensors", spec=spec)[0] == 0
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader("m.gguf").tensors}
    ends = {"token_embd.weight", "output.weight"} & types.keys()
    assert {types[name] for name in ends} == {kind}
    assert len(ends) == (2 if spec is LLAMA else 1)
    found, expected = (
        gptq.load(folder, path, device="cpu", dtype="float32")[0]
        for path in ("m.gguf", "m.safetensors")
    )
    state = expected.state_dict()
    packed = {name: it for name, it in found.state_dict().items() if name.endswith("qweight")}
    ends = {spec.embed[0]} | ({spec.head} if spec is LLAMA else set())
    assert {f"{name}.qweight" for name in ends} <= packed.keys()
    for name, integers in packed.items():
        assert torch.equal(integers, state[name]), name
    tokens = torch.arange(2, 30)[None]
    torch.testing.assert_close(found(tokens).logits, expected(tokens).logits, rtol=2e-2, atol=2e-2)


def test_groups_that_are_asked_for(run, llama_dir, text_file):
    argv = (llama_dir, text_file, "--wbits", "4", "--sym", "--save", "m.gguf", *QUICK)
    code, out, err = run(*argv, "--groupsize", "64", "--eval", "--eval-windows", "2")
    assert (code, err) == (0, "")
    assert "groups of" not in out
    # The file says what was asked for.
    assert run(llama_dir, "--load", "m.gguf", "--groupsize", "64", "--text", "the")[0] == 0
    code, _, err = run(llama_dir, "--load", "m.gguf", "--groupsize", "32", "--text", "the")
    assert code == 2
    assert "--groupsize 32 disagrees with m.gguf, which says 64" in err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--wbits", "3"),
            "q_proj has 3 bits, which format gguf does not hold exactly; use --wbits 4",
        ),
        (("--wbits", "8"), "use --sym"),
        (("--wbits", "4", "--act-order"), "use --order gar"),
        (("--wbits", "4", "--groupsize", "48"), "use --groupsize 32"),
        (("--wbits", "4", "--plain"), "--embedding-bits 16 is not for .gguf files"),
    ],
)
def test_what_does_not_fit(flags, words, run, llama_dir, text_file, tmp_path):
    code, _, err = run(llama_dir, text_file, *flags, "--save", "m.gguf", *QUICK)
    assert code == 2
    (line,) = err.splitlines()
    assert words in line
    assert not list(tmp_path.iterdir())


def test_another_ending(run, llama_dir, text_file):
    code, _, err = run(llama_dir, text_file, "--wbits", "4", "--save=m.bin")
    assert (code, err) == (2, "error: --save m.bin: give a name that ends in .pt or .gguf\n")


def test_convert(run, llama_dir, text_file, capsys):
    run(llama_dir, text_file, "--wbits", "4", "--save", "m.gguf", *QUICK)
    assert convert.main(["m.gguf", "folder"]) == 0
    assert "folder: 16 layers, the same weights as in m.gguf" in capsys.readouterr().out
    assert convert.main(["folder", "again.gguf", "--format", "gguf"]) == 0
    assert "run it with: llama-cli -m again.gguf" in capsys.readouterr().out.splitlines()
    assert convert.main(["folder", "again.bin", "--format", "gguf"]) == 2
    assert "format gguf is written to a .gguf" in capsys.readouterr().err
