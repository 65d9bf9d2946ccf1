"""The command lines: every job once, stopping and resuming, and bad input in one line."""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import PACKAGES, ROOT, llama_config, make_model
from helpers.logs import without_progress
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import gptq.pipeline.blocks
from gptq.checkpoints.reading import open_checkpoint
from gptq.cli.printing import harmless
from gptq.cli.run import main
from gptq.config import QUALITIES
from gptq.models import BLOOM, LLAMA

QUANTIZE = ["--wbits", "4", "--groupsize", "32", "--nsamples", "4", "--seqlen", "32"]
EVALUATE = ["--eval", "--seqlen", "32", "--eval-windows", "5"]


# Jobs ----------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Runs a command line that must work; returns what it printed."""

    def call(*argv, spec=LLAMA):
        capsys.readouterr()
        code = main(spec, [str(argument) for argument in argv])
        out, err = capsys.readouterr()
        assert (code, without_progress(err)) == (0, "")
        return out

    return call


@pytest.fixture
def refused(capsys):
    """Runs a command line that must end with one line and exit code 2; returns the line."""

    def call(message, *argv, spec=LLAMA):
        capsys.readouterr()
        code = main(spec, [str(argument) for argument in argv])
        out, err = capsys.readouterr()
        err = without_progress(err)
        assert code == 2, out + err
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert re.search(message, err), err
        assert out == ""
        return err

    return call


@pytest.fixture(scope="module")
def made(llama_dir, text_file, tmp_path_factory):
    """The same 4-bit model as .pt, .safetensors and folder."""
    folder = tmp_path_factory.mktemp("made")
    gptq.quantize(
        llama_dir,
        text_file,
        gptq.QuantConfig(bits=4, group_size=32),
        save=folder / "m.pt",
        save_safetensors=folder / "m.safetensors",
        save_dir=folder / "dir",
        nsamples=4,
        seqlen=32,
    )
    return folder


def command(script, *argv, cwd, **kwargs):
    """A real process, as a user starts it, with the package that is tested: that of the script's
    folder, or what pip has installed."""
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, argv)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Python 3.10 knows no such variable, and imports from the script's folder.
        env={**os.environ, **({"PYTHONSAFEPATH": "1"} if PACKAGES != ROOT else {})},
        # Python leaves SIGINT alone where its parent ignores it, as shells in the background do.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **kwargs,
    )


def finished(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_bare_save_in_a_process(llama_dir, text_file, made, tmp_path):
    done = finished(command("llama.py", llama_dir, "--save", text_file, *QUANTIZE, cwd=tmp_path))
    code, out, err = done
    assert (code, without_progress(err)) == (0, "")
    assert os.listdir(tmp_path) == ["tiny-llama-4bit-32g.pt"]
    assert (tmp_path / "tiny-llama-4bit-32g.pt").read_bytes() == (made / "m.pt").read_bytes()
    assert all(f"{block} self_attn.k_proj" in out for block in (0, 1))
    assert "tiny-llama-4bit-32g.pt (0.1 MiB)" in out


def test_evaluation_without_saving(here, run, bloom_dir, text_file):
    argv = [bloom_dir, text_file, *QUANTIZE, "--eval", "--eval-windows", "5"]
    out = run(*argv, spec=BLOOM)
    assert re.search(r"^perplexity words\.txt [1-9]\d*\.\d{4} \(5 x 32 tokens\)$", out, re.M)
    assert os.listdir(here) == []


def test_default_names(here, run, llama_dir, text_file):
    run("--save", llama_dir, "--save_safetensors", text_file, *QUANTIZE, "--groupsize", -1)
    assert sorted(os.listdir(here)) == ["tiny-llama-4bit.pt", "tiny-llama-4bit.safetensors"]


def test_default_name_where_the_model_is_the_current_folder(run, bloom_dir, tmp_path, monkeypatch):
    folder = shutil.copytree(bloom_dir, tmp_path / "My-Bloom")
    monkeypatch.chdir(folder)
    run(".", "--wbits", 3, "--groupsize", 64, "--nearest", "--save", spec=BLOOM)
    assert (folder / "my-bloom-3bit-64g.pt").exists()


def test_every_form_in_folders_that_are_made(here, run, made, llama_dir, text_file):
    argv = ["--save", "a/x.pt", "--save_safetensors", "b/c/y.safetensors", "--save-dir", "d/e"]
    out = run(*argv, llama_dir, text_file, *QUANTIZE)
    assert all(name in out for name in argv[1::2])
    assert (here / "a/x.pt").read_bytes() == (made / "m.pt").read_bytes()
    for written, expected in (
        ("b/c/y.safetensors", "m.safetensors"),
        ("d/e/model.safetensors", "dir/model.safetensors"),
    ):
        tensors = load_file(here / written)
        assert all(torch.equal(tensors[n], t) for n, t in load_file(made / expected).items())


def test_flags_become_settings(here, run, llama_dir, text_file):
    flags = "--sym --act-order --static-groups --no-true-sequential --percdamp 0.02"
    more = "--error-feedback 0.25 --scale-search mse --quality best --refine 1 --save-dir d"
    run(llama_dir, text_file, *QUANTIZE, *flags.split(), *more.split())
    settings = json.loads((here / "d" / "quantize_config.json").read_text())
    assert (settings["bits"], settings["group_size"], settings["sym"]) == (4, 32, True)
    assert (settings["static_groups"], settings["true_sequential"]) == (True, False)
    assert settings["damp_percent"] == 0.02
    assert (settings["meta"]["order"], settings["meta"]["scale_search"]) == ("act", "mse")
    assert settings["meta"]["error_feedback"] == 0.25
    assert (settings["meta"]["sweeps"], settings["meta"]["refine"]) == (
        QUALITIES["best"]["sweeps"],
        1,
    )
    assert settings["meta"]["dataset"] == "words.txt"


def test_fast_leaves_out_what_takes_time(here, run, llama_dir, text_file):
    run(llama_dir, text_file, *QUANTIZE, "--quality", "fast", "--save-dir", "d")
    settings = open_checkpoint(here / "d")[1]["meta"]
    assert (settings["error_feedback"], settings["adaptive_damp"], settings["refine"]) == (
        0.0,
        False,
        0,
    )
    assert settings["scale_search"] == "hessian"


@torch.no_grad()
def direct_perplexity(model, windows):
    losses = [
        torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:])
        for window in windows
    ]
    return torch.stack(losses).mean().exp().item()


@pytest.mark.parametrize("form", ["m.pt", "m.safetensors", "dir", "full", "full 16", "itself"])
def test_evaluation(form, run, made, llama_dir, text_file):
    argv, model = [llama_dir, text_file, "--load", made / form], llama_dir
    if form.startswith("full"):
        argv = [llama_dir, text_file, *(["--wbits", 16] if "16" in form else [])]
    elif form == "itself":
        argv = [made / "dir", text_file]
    out = run(*argv, *EVALUATE)
    printed = float(re.fullmatch(r"perplexity words\.txt (\S+) \(5 x 32 tokens\)\n", out)[1])
    if form.startswith("full"):
        model = AutoModelForCausalLM.from_pretrained(llama_dir, dtype=torch.float32).eval()
    else:
        model, _ = gptq.load(llama_dir, made / ("dir" if form == "itself" else form))
    tokens = AutoTokenizer.from_pretrained(llama_dir)(text_file.read_text()).input_ids
    windows = torch.tensor(tokens[: 5 * 32]).view(5, 32)
    assert printed == pytest.approx(direct_perplexity(model, windows), rel=1e-4)


def test_evaluation_on_other_data(run, made, llama_dir, tmp_path, text_file):
    (tmp_path / "other.txt").write_text(text_file.read_text()[::-1])
    data = ["--eval-data", text_file, "--eval-data", tmp_path / "other.txt"]
    out = run(llama_dir, "--load", made / "m.pt", *EVALUATE[1:], *data)
    both = [float(line.split()[2]) for line in out.splitlines()]
    assert [line.split()[1] for line in out.splitlines()] == ["words.txt", "other.txt"]
    assert both[0] != both[1]


def test_text(run, made, llama_dir):
    model, tokenizer = gptq.load(llama_dir, made / "m.pt")
    encoded = tokenizer("the cat sat", return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**encoded, max_new_tokens=6, do_sample=False, pad_token_id=1)
    argv = [llama_dir, "--load", made / "m.pt", "--text", "the cat sat", "--max-new-tokens", 6]
    assert run(*argv) == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"


TEMPLATE = "{{ '<s>' }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[reply]"


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_chat(template, run, made, llama_dir, tmp_path, monkeypatch):
    folder = shutil.copytree(llama_dir, tmp_path / "model")
    if template:
        (folder / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n\nthe dog\n"))
    out = run(folder, "--load", made / "m.pt", "--chat", "--max-new-tokens", 5)
    model, tokenizer = gptq.load(folder, made / "m.pt")

    def answer(prompt):
        ids = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        new = model.generate(**ids, max_new_tokens=5, do_sample=False, pad_token_id=1)
        return tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    if template:
        first = answer("<s>[user] the cat[reply]")
        then = f"<s>[user] the cat[assistant] {first.strip()}[user] the dog[reply]"
    else:
        first = answer("Human: the cat\n\nAssistant:")
        then = f"Human: the cat\n\nAssistant: {first.strip()}\n\nHuman: the dog\n\nAssistant:"
    # A random model writes control characters, too.
    assert out == harmless(f"{first}\n{answer(then)}\n")


def test_benchmark(run, made, llama_dir, text_file):
    argv = [llama_dir, text_file, "--load", made / "m.pt", "--benchmark", 8]
    plain = run(*argv)
    assert re.fullmatch(
        r"median \d+\.\d\d ms a token, \d+\.\d\d tokens/s\npeak resident memory \d+ MiB\n", plain
    )
    checked = run(*argv, "--check").splitlines()[-1]
    printed = float(re.fullmatch(r"perplexity of these 8 tokens (\S+)", checked)[1])
    model, tokenizer = gptq.load(llama_dir, made / "m.pt")
    tokens = torch.tensor(tokenizer(text_file.read_text()).input_ids[:8])
    assert printed == pytest.approx(direct_perplexity(model, tokens[None]), rel=1e-4)


def test_what_was_rounded_can_be_trained(here, llama_dir, text_file):
    flags = "--wbits 2 --groupsize 32 --nearest --nsamples 4 --seqlen 32"
    words = [str(llama_dir), str(text_file), *flags.split()]
    assert main(LLAMA, [*words, "--save", "rounded.pt"]) == 0
    tuned = ["--quality", "tune", "--tune-tokens", "2048", "--save", "m.pt"]
    assert main(LLAMA, [*words, *tuned]) == 0
    name = "model.layers.0.mlp.up_proj"
    before, after = (torch.load(here / it, weights_only=True) for it in ("rounded.pt", "m.pt"))
    assert torch.equal(before[f"{name}.qweight"], after[f"{name}.qweight"])
    assert not torch.equal(before[f"{name}.scales"], after[f"{name}.scales"])


def test_the_embedding_of_a_model_that_is_not_kept(here, run, llama_dir, text_file):
    flags = ["--wbits", 8, "--groupsize", 32, "--nearest", "--eval", "--seqlen", 32]
    flags += ["--eval-windows", 4]
    found = [run(llama_dir, text_file, *flags, *more)[-60:] for more in ([], ["--plain"])]
    assert found[0] != found[1]


def test_nearest_needs_no_dataset(here, run, llama_dir):
    out = run(llama_dir, "--wbits", 4, "--groupsize", 32, "--nearest", "--save", "x.pt")
    assert "rows that keep rounding" in out
    gptq.load(llama_dir, here / "x.pt")


# Stopping ------------------------------------------------------------------------------------


def test_interrupted_and_resumed_is_byte_for_byte_the_same(run, tmp_path, text_file):
    model = make_model(tmp_path / "Deep", llama_config(num_hidden_layers=12))
    argv = [model, text_file, *QUANTIZE]
    process = command("llama.py", *argv, "--save", "x.pt", cwd=tmp_path)
    first = tmp_path / "x.pt.journal" / "block-0000.safetensors"
    while not first.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    code, out, err = finished(process)
    assert (code, out) == (130, "")
    expected = (
        r"interrupted: \d+ finished blocks are kept; add --resume to the same command to go on\n"
    )
    assert re.fullmatch("\n" + expected, without_progress(err))
    assert not (tmp_path / "x.pt").exists()
    done = len(list(first.parent.glob("block-*")))
    assert 1 <= done < 12
    solved = []
    solve = gptq.pipeline.blocks.solve_layer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptq.pipeline.blocks.solve_layer", lambda *a: solved.append(1) or solve(*a))
        patch.chdir(tmp_path)
        run(*argv, "--save", "x.pt", "--resume")
        # Four groups of layers a block, of the blocks that were not finished.
        assert len(solved) == 4 * (12 - done)
        run(*argv, "--save", "whole.pt", "--resume")
    assert (tmp_path / "x.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["Deep", "whole.pt", "x.pt"]


@pytest.mark.parametrize("where", ["no output", "before the first layer", "while evaluating"])
def test_no_advice_to_resume_where_nothing_can_be(
    where, here, capsys, monkeypatch, llama_dir, text_file
):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    target = {
        "no output": "gptq.checkpoints.writing.write_pt",
        "before the first layer": "gptq.pipeline.blocks.solve_layer",
        "while evaluating": "gptq.inference.perplexity.perplexity",
    }[where]
    monkeypatch.setattr(target, stop)
    save = [] if where == "no output" else ["--save"]
    argv = [llama_dir, text_file, *QUANTIZE, "--eval", *save]
    assert main(LLAMA, list(map(str, argv))) == 130
    assert without_progress(capsys.readouterr().err) == "\ninterrupted\n"


# Bad input: the model ------------------------------------------------------------------------


@pytest.fixture
def copy(llama_dir, tmp_path):
    """A model of its own to be damaged."""
    return shutil.copytree(llama_dir, tmp_path / "model")


SAVE = ["--save", "out/x.pt"]


@pytest.fixture
def nothing_written(here):
    yield
    assert not list(here.glob("out/[!.]*.pt"))


@pytest.mark.usefixtures("nothing_written")
class TestBadModels:
    def test_not_found(self, refused, text_file, tmp_path):
        refused("none.* does not exist", tmp_path / "none", text_file, *QUANTIZE, *SAVE)
        refused("cannot be fetched", "nobody/no-such-model", text_file, *QUANTIZE, *SAVE)

    def test_of_another_kind(self, refused, tmp_path, text_file):
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        refused(
            "it is a 'gpt2' model; llama, bloom, mistral,",
            *(tmp_path, text_file, *QUANTIZE, *SAVE),
        )

    def test_bloom_and_llama_mixed_up(self, refused, bloom_dir, llama_dir, text_file):
        argv = [text_file, *QUANTIZE, *SAVE]
        refused("is a bloom model; use bloom.py", bloom_dir, *argv)
        refused("is a llama model; use llama.py", llama_dir, *argv, spec=BLOOM)

    def test_a_shard_cut_short(self, refused, copy, text_file):
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        refused("model.safetensors is cut short", copy, text_file, *QUANTIZE, *SAVE)

    def test_no_tokenizer(self, refused, copy, text_file):
        (copy / "tokenizer.json").unlink()
        refused("no tokenizer in .*model", copy, text_file, *QUANTIZE, *SAVE)
        nearest = ["--wbits", 4, "--nearest", "--text", "hi"]
        refused("no tokenizer in .*model", copy, *nearest, *SAVE)

    def test_layers_that_cannot_be_packed(self, refused, tmp_path, text_file):
        model = make_model(tmp_path / "odd", llama_config(intermediate_size=100))
        refused("gate_proj: out_features 100 at 4 bits", model, text_file, *QUANTIZE, *SAVE)

    def test_weights_that_are_not_numbers(self, refused, copy, text_file):
        state = load_file(copy / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        state[name][3, 4] = float("nan")
        save_file(state, copy / "model.safetensors", {"format": "pt"})
        # In the middle of a run, where a bar might be half drawn.
        refused(f"{name}: holds NaN or infinity", copy, text_file, *QUANTIZE, *SAVE)

    def test_activations_that_are_not_numbers(self, refused, copy, text_file):
        state = load_file(copy / "model.safetensors")
        state["model.embed_tokens.weight"][:] = float("inf")
        save_file(state, copy / "model.safetensors", {"format": "pt"})
        message = r"model\.embed_tokens\.weight: holds NaN or infinity"
        refused(message, copy, text_file, *QUANTIZE, *SAVE)
        refused("perplexity is nan", copy, text_file, *EVALUATE)

    def test_more_tokens_than_positions(self, refused, llama_dir, text_file):
        long = ["--seqlen", 129]
        refused("129 exceeds the 128 positions", llama_dir, text_file, *QUANTIZE, *long, *SAVE)
        refused("129 exceeds the 128 positions", llama_dir, text_file, "--eval", *long)
        refused("--benchmark 129 exceeds", llama_dir, text_file, "--benchmark", 129)

    def test_quantized_already(self, refused, made, text_file):
        refused("is quantized already", made / "dir", text_file, *QUANTIZE, *SAVE)

    def test_settings_for_the_full_model(self, refused, llama_dir, text_file):
        refused("--sym is for a quantized model", llama_dir, text_file, "--eval", "--sym")
        argv = [llama_dir, text_file, "--eval", "--wbits", 16, "--groupsize", 32]
        refused("--groupsize 32 is for a quantized", *argv)

    def test_a_device_that_is_not_there(self, refused, llama_dir, text_file):
        argv = [llama_dir, text_file, *QUANTIZE, *SAVE]
        refused("--device warp:3 cannot be used.*--device cpu", *argv, "--device", "warp:3")


# Bad input: text -----------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_written")
class TestBadText:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("none.txt", None, "none.txt: neither a file nor a known data set.*wikitext2"),
            ("empty.txt", "", "empty.txt: has no text"),
            ("short.txt", "the cat", "the text is .* tokens, one window is 32"),
            ("bad.jsonl", '{"text": \n', "bad.jsonl, line 1: is not JSON"),
        ],
    )
    def test_files(self, name, content, message, refused, llama_dir, text_file, tmp_path):
        if content is not None:
            (tmp_path / name).write_text(content)
        refused(message, llama_dir, tmp_path / name, *QUANTIZE, *SAVE)
        refused(message, llama_dir, tmp_path / name, *EVALUATE)
        # Found before, not after, the hours of quantizing.
        refused(message, llama_dir, text_file, *QUANTIZE, *SAVE, "--eval-data", tmp_path / name)

    def test_a_named_set_while_offline(self, refused, llama_dir):
        message = "c4(-new)?: cannot get allenai/c4 .*pass the path of a local"
        refused(message, llama_dir, "c4", *QUANTIZE, *SAVE)
        refused(message, llama_dir, "c4", *EVALUATE, "--new-eval")

    def test_none(self, refused, llama_dir):
        refused("no DATASET to calibrate on", llama_dir, *QUANTIZE, *SAVE)

    def test_an_empty_prompt(self, refused, llama_dir):
        refused("the prompt is empty", llama_dir, "--text", "")


# Bad input: checkpoints ----------------------------------------------------------------------


class TestBadCheckpoints:
    def test_not_found(self, refused, llama_dir, text_file):
        refused("none.pt: no such", llama_dir, text_file, "--load", "none.pt", *EVALUATE)

    @pytest.mark.parametrize("name", ["m.pt", "m.safetensors"])
    def test_cut_short(self, name, refused, made, llama_dir, text_file, tmp_path):
        (tmp_path / name).write_bytes((made / name).read_bytes()[:-1000])
        argv = [llama_dir, text_file, "--load", tmp_path / name]
        refused(f"{name} is cut short", *argv, *EVALUATE)

    def test_with_code(self, refused, llama_dir, text_file, tmp_path):
        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        torch.save({"model.layers.0.mlp.up_proj.qweight": Bomb()}, tmp_path / "m.pt")
        argv = [llama_dir, text_file, "--load", tmp_path / "m.pt"]
        refused("m.pt holds code", *argv, *EVALUATE)
        assert not (tmp_path / "ran").exists()

    def test_of_another_model(self, refused, made, bloom_dir, text_file):
        argv = [bloom_dir, text_file, "--load", made / "m.pt", *EVALUATE]
        refused("m.pt: its packed layers are another model's", *argv, spec=BLOOM)

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            ("--wbits 8", "--wbits 8 disagrees with .*m.pt, which says 4"),
            ("--groupsize 64", "--groupsize 64 disagrees with .*m.pt, which says 32"),
            ("--sym", "--sym disagrees with .*m.pt, which says sym False; leave it out"),
            ("--act-order", "--order act disagrees with .*m.pt, which says order gar"),
            ("--order natural", "--order natural disagrees with .*order gar"),
            ("--static-groups", "--static-groups disagrees with .*static_groups False"),
            ("--no-true-sequential", "--no-true-sequential disagrees with .*sequential True"),
            ("--percdamp 0.02", "--percdamp 0.02 disagrees with .*percdamp 0.01"),
            ("--error-feedback 0", "--error-feedback 0.0 disagrees with .*error_feedback 0.5"),
            ("--scale-search mse", "--scale-search mse disagrees with .*search hessian"),
            ("--nearest", "--nearest disagrees with .*method gptq"),
            ("--rotate", "--rotate disagrees with .*rotate False"),
            ("--tune-tokens 500", "--tune-tokens 500 disagrees with .*tune_tokens 0"),
        ],
    )
    def test_flags_that_disagree(self, flags, message, refused, made, llama_dir, text_file):
        argv = [llama_dir, text_file, "--load", made / "m.pt"]
        refused(message, *argv, *EVALUATE, *flags.split())

    def test_flags_that_agree(self, run, made, llama_dir, text_file):
        argv = [llama_dir, text_file, "--load", made / "m.pt", *EVALUATE]
        flags = "--wbits 4 --groupsize 32 --order gar --true-sequential --percdamp 0.01"
        assert run(*argv, *flags.split(), "--scale-search", "hessian") == run(*argv)

    def test_a_quantized_folder_and_its_own_settings(self, refused, made, text_file):
        refused("--wbits 16 disagrees", made / "dir", text_file, *EVALUATE, "--wbits", 16)
        refused("--sym disagrees", made / "dir", text_file, *EVALUATE, "--sym")

    @pytest.mark.parametrize(
        ("desc_act", "wrong", "right"),
        [(True, ["--order", "natural"], ["--act-order"]), (False, ["--act-order"], [])],
    )
    def test_files_of_other_tools(
        self, desc_act, wrong, right, run, refused, made, llama_dir, text_file, tmp_path
    ):
        settings = json.dumps({"bits": 4, "group_size": 32, "desc_act": desc_act, "sym": False})
        path = tmp_path / "m.safetensors"
        save_file(load_file(made / "m.safetensors"), path, {"quantize_config": settings})
        argv = [llama_dir, text_file, "--load", path, *EVALUATE]
        refused(f"--order .* disagrees with .*says desc_act {desc_act}", *argv, *wrong)
        # Nothing is said of how scales were found.
        run(*argv, *right, "--scale-search", "mse")


# Bad input: outputs --------------------------------------------------------------------------


def full_disk(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


class TestBadOutputs:
    def test_paths(self, here, refused, llama_dir, text_file):
        (here / "file").touch()
        argv = [llama_dir, text_file, *QUANTIZE]
        refused("file/x.pt: cannot be written", *argv, "--save", "file/x.pt")
        refused("nowhere/x.pt: cannot be written", *argv, "--save", "/proc/nowhere/x.pt")
        (here / "x.pt").mkdir()
        refused("x.pt: is a folder", *argv, "--save", "x.pt")
        assert sorted(os.listdir(here)) == ["file", "x.pt"]

    def test_a_folder_of_something_else(self, here, refused, llama_dir, text_file):
        (here / "mine").mkdir()
        (here / "mine" / "config.json").touch()
        argv = [llama_dir, text_file, *QUANTIZE, "--save-dir", "mine"]
        refused("mine: exists and is no quantized checkpoint, but has config.json", *argv)
        assert os.listdir(here / "mine") == ["config.json"]
        assert os.listdir(here) == ["mine"]

    @pytest.mark.parametrize(
        "target", ["os.fsync", "os.replace", "gptq.checkpoints.writing.write_state_dict"]
    )
    def test_a_full_disk(self, target, here, refused, run, monkeypatch, llama_dir, text_file, made):
        (here / "x.pt").write_text("older")
        argv = [llama_dir, text_file, *QUANTIZE, "--save", "x.pt"]
        with monkeypatch.context() as patch:
            patch.setattr(target, full_disk)
            refused(r"cannot be written \(No space left on device\); free space", *argv)
        assert (here / "x.pt").read_text() == "older"
        assert not list(here.rglob("*.partial"))
        run(*argv, "--resume")
        assert (here / "x.pt").read_bytes() == (made / "m.pt").read_bytes()

    def test_an_earlier_run_is_not_overwritten(
        self, here, refused, run, monkeypatch, llama_dir, text_file
    ):
        argv = [llama_dir, text_file, *QUANTIZE, "--save", "x.pt"]
        with monkeypatch.context() as patch:
            patch.setattr("gptq.checkpoints.writing.write_state_dict", full_disk)
            refused("No space left", *argv)
        refused("x.pt.journal: holds 2 finished blocks.* add --resume", *argv)
        refused("differs in bits", *argv, "--resume", "--wbits", 8)
        run(*argv, "--resume")

    def test_resume_without_anything_to_resume(self, here, run, made, llama_dir, text_file):
        run(llama_dir, text_file, *QUANTIZE, "--save", "x.pt", "--resume")
        assert (here / "x.pt").read_bytes() == (made / "m.pt").read_bytes()


def test_an_error_in_a_process_is_one_line(bloom_dir, text_file, tmp_path):
    model = shutil.copytree(bloom_dir, tmp_path / "model")
    state = load_file(model / "model.safetensors")
    name = "transformer.h.1.mlp.dense_h_to_4h.weight"
    state[name][0, 0] = float("inf")
    save_file(state, model / "model.safetensors", {"format": "pt"})
    argv = [model, text_file, *QUANTIZE, "--save", "out.pt"]
    code, out, err = finished(command("bloom.py", *argv, cwd=tmp_path))
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: {name}: holds NaN [^\n]+\n", without_progress(err))
    assert not (tmp_path / "out.pt").exists()
