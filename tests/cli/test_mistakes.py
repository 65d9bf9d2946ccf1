"""What is wrong with a model, a text or a number: one line that names it, or it works."""

import io
import json
import os
import re
import shutil
import sys

import pytest
import torch
from conftest import llama_config, make_model
from helpers.logs import without_progress
from safetensors.torch import load_file, save_file

import gptq
from gptq.checkpoints.reading import open_checkpoint
from gptq.cli.run import main

QUANTIZE = ["--wbits", "4", "--groupsize", "32", "--nsamples", "4", "--seqlen", "32"]
RUN = ["--max-new-tokens", "3"]


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs a command line; returns its exit code, output, and errors without progress."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, stdin=""):
        capsys.readouterr()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main(None, [str(argument) for argument in argv])
        out, err = capsys.readouterr()
        return code, out, without_progress(err)

    return call


@pytest.fixture
def refused(run):
    """Runs a command line that must end with one line that has the message."""

    def call(message, *argv, stdin=""):
        code, _, err = run(*argv, stdin=stdin)
        assert code == 2, err
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        assert re.search(message, err), err

    return call


@pytest.fixture
def model(llama_dir, tmp_path):
    """A model of one's own to be damaged."""
    return shutil.copytree(llama_dir, tmp_path / "model")


def edit(path, **changes):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **changes}))


# The model -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, r"config\.json.*\(3\)"),
        ({"num_key_value_heads": 3}, r"config\.json: says num_key_value_heads is 3, which does"),
        (
            {"max_position_embeddings": 128.0},
            r"config\.json: says max_position_embeddings is 128\.0",
        ),
        ({"_attn_implementation": "flash_attention_2"}, r"remove attn_implementation from its"),
        ({"hidden_size": 10**400}, r"config\.json"),
    ],
)
def test_configurations_that_cannot_be(changes, message, refused, model, text_file):
    edit(model / "config.json", **changes)
    refused(message, model, text_file, *QUANTIZE, "--save", "x.pt")


def test_json_that_is_nested_too_deeply(refused, model, text_file):
    (model / "config.json").write_text('{"a": ' + "[" * 100_000)
    refused(r"config\.json", model, text_file, *QUANTIZE, "--save", "x.pt")


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 300, "a\0b"])
def test_names_that_no_model_has(name, refused, text_file):
    refused(re.escape(name[:20].replace("\0", r"\x00")), name, text_file, *QUANTIZE, "--save")


def test_a_file_that_cannot_be_copied_is_named_before_the_work(refused, model, text_file):
    (model / "generation_config.json").unlink()
    # A file that opens and whose first byte cannot be read, by nobody.
    (model / "generation_config.json").symlink_to("/proc/self/mem")
    message = r"model/generation_config\.json: .* cannot be read .*Input/output error"
    refused(message, model, text_file, *QUANTIZE, "--save-dir", "out")


def test_the_solvers_reason_names_the_layer(refused, llama_dir, text_file, monkeypatch):
    def unsolvable(*_arguments):
        raise ValueError("H cannot be made positive definite")

    monkeypatch.setattr("gptq.pipeline.blocks.solve_layer", unsolvable)
    message = r"layers\.0\.self_attn\.q_proj: H cannot be made positive definite\n"
    refused(message, llama_dir, text_file, *QUANTIZE, "--save", "x.pt")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            OSError(5, "Input/output error", "disk"),
            2,
            "error: disk: Input/output error; 1 finished",
        ),
        (MemoryError(), 2, "error: there is not enough memory; 1 finished blocks are kept"),
        (AssertionError("never"), 1, "unexpected AssertionError: please report it"),
    ],
)
def test_what_ends_a_run_in_the_middle(error, code, line, run, llama_dir, text_file, monkeypatch):
    from gptq.pipeline.journal import Journal

    write = Journal.write

    def first_only(journal, index, *rest):
        if index:
            raise error
        write(journal, index, *rest)

    monkeypatch.setattr(Journal, "write", first_only)
    ended, out, err = run(llama_dir, text_file, *QUANTIZE, "--save", "x.pt")
    assert (ended, out) == (code, "")
    assert err.startswith(line)
    assert ("Traceback" in err) == (code == 1)


# Running it ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--text", "the cat"], ["--chat"]])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4},
        {"return_dict_in_generate": True},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"do_sample": True, "temperature": 5.0},
    ],
)
def test_generation_is_greedy_whatever_the_model_asks_for(settings, flags, run, model):
    plain = run(model, *flags, *RUN, stdin="the cat\n")
    edit(model / "generation_config.json", **settings)
    assert plain[0] == 0
    assert run(model, *flags, *RUN, stdin="the cat\n")[:2] == plain[:2]


@pytest.mark.parametrize(
    "content",
    [
        "{oops",
        '{"early_stopping": "maybe"}',
        '{"num_return_sequences": 2}',
        '{"repetition_penalty": 0}',
        "[" * 100_000,
        '{"eos_token_id": "x"}',
    ],
)
def test_a_broken_generation_config_is_named(content, refused, model):
    (model / "generation_config.json").write_text(content)
    refused(r"generation_config\.json", model, "--text", "the cat", *RUN)


def test_a_bug_in_the_forward_is_no_setting(run, model, monkeypatch):
    def broken(*_arguments, **_options):
        raise ValueError("a bug")

    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", broken)
    code, _, err = run(model, "--text", "the cat", *RUN)
    assert code == 1
    assert err.endswith("ValueError: a bug\n")


def test_stop_strings_work(run, model):
    edit(model / "generation_config.json", stop_strings=["zebra"])
    assert run(model, "--text", "the cat", *RUN)[0] == 0


BAD_TEMPLATES = [
    ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("{{ x", "template refuses .*unexpected end of template"),
    ("{{ foo() }}", "'foo' is undefined"),
    ("{{ 'a' + 1 }}", "can only concatenate"),
]


@pytest.mark.parametrize(("template", "message"), [*BAD_TEMPLATES, ("", "makes no text")])
def test_a_template_that_fails_in_chat(template, message, refused, model):
    (model / "chat_template.jinja").write_text(template)
    refused(message, model, "--chat", *RUN, stdin="hi\n")


@pytest.mark.parametrize(("template", "message"), BAD_TEMPLATES)
def test_a_template_that_fails_on_a_record(template, message, refused, model, tmp_path):
    (model / "chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": turns}))
    refused("m.jsonl, line 1: .*" + message, model, tmp_path / "m.jsonl", *QUANTIZE, "--save")


def test_a_perplexity_beyond_any_number(run, tmp_path, text_file):
    model = make_model(tmp_path / "m", llama_config(num_hidden_layers=1))
    state = load_file(model / "model.safetensors")
    state["lm_head.weight"] *= 1000
    save_file(state, model / "model.safetensors", {"format": "pt"})
    code, out, err = run(model, text_file, "--eval", "--seqlen", 32, "--eval-windows", 2)
    assert (code, err) == (0, "")
    assert out == "perplexity words.txt inf (2 x 32 tokens)\n"


# Numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flag",
    ["--benchmark", "--nsamples", "--seqlen", "--eval-windows", "--max-new-tokens", "--groupsize"],
)
def test_huge_counts(flag, refused, bloom_dir, text_file):
    more = {
        "--benchmark": [],
        "--eval-windows": ["--eval"],
        "--max-new-tokens": ["--text", "a"],
    }.get(flag, ["--wbits", "4", "--save"])
    for number in (2**31, "9" * 20):
        message = f"{flag} {number} is not possible: give 2147483647 or less"
        refused(message, bloom_dir, text_file, *more, flag, number)


@pytest.mark.parametrize("size", ["9" * 400 + "TB", "0.0GB", "9" * 308 + "TiB"])
def test_sizes_that_cannot_be(size, refused, llama_dir, text_file):
    argv = [llama_dir, text_file, *QUANTIZE, "--save", "x.pt", "--max-memory", size]
    refused(f"--max-memory {size} is not a size", *argv)


def test_a_device_that_holds_nothing(refused, llama_dir, text_file):
    argv = [llama_dir, text_file, *QUANTIZE, "--save", "x.pt", "--device", "meta"]
    refused("--device meta cannot be used", *argv)


# Text that is none ---------------------------------------------------------------------------


def test_lone_surrogates_in_records(run, llama_dir, tmp_path, text_file):
    words = text_file.read_text()[:4000]
    for name, odd in (("a", "\ud83d"), ("b", "\ufffd")):
        lines = (json.dumps({"text": text}) for text in (words, f"the cat {odd} sat", words))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        argv = [llama_dir, tmp_path / f"{name}.jsonl", *QUANTIZE, "--save", f"{name}.pt"]
        assert run(*argv)[0] == 0
    first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_prompts_of_other_bytes(run, llama_dir):
    code, out, err = run(llama_dir, "--text", os.fsdecode("数据".encode("gbk")), *RUN)
    assert (code, err) == (0, "")
    assert out.startswith("\ufffd")
    assert run(llama_dir, "--chat", *RUN, stdin="a\udcff\n")[0] == 0


def test_output_in_ascii(llama_dir, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(None, [str(llama_dir), "--text", "数", *RUN]) == 0
    assert raw.getvalue().startswith(b"\\u6570")


def test_names_of_other_bytes(run, refused, llama_dir, text_file, tmp_path):
    odd = os.fsdecode("数据.txt".encode("gbk"))
    shutil.copy(text_file, odd)
    outputs = ["--save-dir", "out", "--report", "page", "--eval", "--eval-windows", 2]
    code, _, err = run(llama_dir, odd, *QUANTIZE, *outputs)
    assert (code, err) == (0, "")
    _, settings = open_checkpoint(tmp_path / "out")
    assert settings["meta"]["dataset"].endswith("\ufffd.txt")
    assert r"\udc" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    target = os.fsdecode("模型.pt".encode("gbk"))
    refused(r"\.pt: is not UTF-8; give another name\n", llama_dir, odd, *QUANTIZE, "--save", target)


@pytest.mark.parametrize("flag", ["--save", "--save-dir", "--report"])
def test_a_name_with_a_zero_byte(flag, refused, llama_dir, text_file):
    argv = [llama_dir, text_file, *QUANTIZE, "--save", "x.pt", flag, "a\0.pt"]
    refused(r"a\\x00\.pt.*: no name can hold a zero byte", *argv)


def test_names_with_control_characters(run, refused, llama_dir, text_file):
    odd = "a\x1b[2J\n\u202e.txt"
    shutil.copy(text_file, odd)
    code, out, err = run(llama_dir, odd, *QUANTIZE, "--save", "\x1b]0;x.pt", "--eval")
    assert (code, err) == (0, "")
    assert r"\x1b]0;x.pt (" in out
    assert r"perplexity a\x1b[2J\n\u202e.txt " in out
    assert "\x1b" not in out + err
    refused(
        r"no\\x1b\[2J\.pt: no such checkpoint", llama_dir, "--load", "no\x1b[2J.pt", "--text", "a"
    )
    assert gptq.load(llama_dir, "\x1b]0;x.pt")
