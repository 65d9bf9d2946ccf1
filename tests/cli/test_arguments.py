"""Arguments in every order, help, and arguments that make no sense together."""

import os
import re

import pytest

from gptq.cli.arguments import NEEDS, join_optional_values, parser
from gptq.cli.run import main
from gptq.models import BLOOM, LLAMA


def parse(line):
    return parser(LLAMA).parse_intermixed_args(join_optional_values(line.split()))


@pytest.mark.parametrize(
    ("line", "save", "save_safetensors"),
    [
        ("MODEL c4 --save", "", None),
        ("--save MODEL c4", "", None),
        ("MODEL --save c4", "", None),
        ("--save x.pt MODEL c4", "x.pt", None),
        ("MODEL --save x.pt c4", "x.pt", None),
        ("MODEL c4 --save x.pt", "x.pt", None),
        ("--save=x.pt MODEL c4", "x.pt", None),
        ("MODEL --save=x.pt c4", "x.pt", None),
        ("--save= MODEL c4", "", None),
        ("--save_safetensors MODEL c4", None, ""),
        ("MODEL --save_safetensors c4", None, ""),
        ("MODEL --save_safetensors y.safetensors c4", None, "y.safetensors"),
        ("MODEL --save_safetensors=y.safetensors c4", None, "y.safetensors"),
        ("--save --save_safetensors MODEL c4", "", ""),
        ("--save_safetensors --save x.pt MODEL c4", "x.pt", ""),
        ("MODEL --save --save_safetensors y.safetensors c4", "", "y.safetensors"),
        ("MODEL c4", None, None),
    ],
)
@pytest.mark.parametrize("flags", ["", "--wbits 4", "--sym --wbits 4"])
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_flags_and_positionals_in_any_order(line, save, save_safetensors, flags, place):
    lines = {"first": f"{flags} {line}", "last": f"{line} {flags}"}
    lines["middle"] = line.replace("MODEL", f"MODEL {flags}")
    parsed = parse(lines[place])
    assert (parsed.model, parsed.dataset) == ("MODEL", "c4")
    assert (parsed.save, parsed.save_safetensors) == (save, save_safetensors)
    assert parsed.wbits == (4 if flags else None)


def test_values_that_look_like_flags():
    assert parse("MODEL c4 --groupsize -1 --save").groupsize == -1
    parsed = parse("MODEL --groupsize -1 --load x.pt --eval-data a.txt --eval-data b.txt")
    assert (parsed.dataset, parsed.load) == (None, "x.pt")
    assert parsed.eval_data == ["a.txt", "b.txt"]


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main(BLOOM, ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    flags = (
        "MODEL DATASET --wbits --groupsize --sym --nearest --nsamples --seqlen --seed --percdamp "
        "--error-feedback --order --act-order --static-groups --true-sequential --scale-search "
        "--refine --quality --save --save_safetensors --save-dir --resume --load --eval --new-eval "
        "--eval-data --eval-windows --text --chat --max-new-tokens "
        "--temperature --top-p --top-k --repetition-penalty --benchmark --check "
        "--device --dtype"
    )
    for flag in flags.split():
        # Where it is explained, with two spaces or a line's end before the explanation.
        line = re.search(rf"^  .*{flag}( [A-Z{{][^ ]*|, .*)?( {{2,}}|\n {{10,}})\w", shown, re.M)
        assert line, flag
    assert "python bloom.py MODEL c4 --wbits 4 --groupsize 128 --save" in shown
    assert "llama" not in shown.replace("GPTQ-for-LLaMa", "")
    assert max(map(len, shown.splitlines())) <= 100


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "required: MODEL; see llama.py --help"),
        ("MODEL c4 more --eval", "unrecognized arguments: more"),
        ("MODEL c4 --wbit 4 --save", "unrecognized arguments: --wbit"),
        ("MODEL c4 --wbits 5 --save", "--wbits: 5 is not possible: choose one of"),
        ("MODEL c4 --wbits four --save", "--wbits: 'four' is not a number of bits"),
        ("MODEL c4 --wbits 4 --groupsize abc --save", "--groupsize: invalid int value: 'abc'"),
        ("MODEL c4 --wbits 4 --groupsize 0 --save", "--groupsize 0 is not possible"),
        ("MODEL c4 --wbits 4 --groupsize -2 --save", "--groupsize -2 is not possible"),
        ("MODEL c4 --wbits 4 --percdamp 0 --save", "--percdamp 0.0 is not possible"),
        ("MODEL c4 --wbits 4 --error-feedback 2 --save", "--error-feedback 2.0 is not possible"),
        ("MODEL c4 --wbits 4 --refine -1 --save", "--refine -1 is not possible: give 0 to 1000"),
        ("MODEL c4 --wbits 4 --quality worst --save", "--quality: invalid choice: 'worst'"),
        ("MODEL c4 --quality best --load x.pt --eval", "--quality is for quantizing"),
        ("MODEL c4 --wbits 4 --order none --save", "--order: invalid choice: 'none'"),
        ("MODEL c4 --wbits 4 --order gar --act-order --save", "--act-order and --order gar"),
        ("MODEL c4 --wbits 4 --save=x.bin", "--save x.bin: give a name that ends in .pt"),
        ("MODEL c4 --wbits 4 --save_safetensors=x.pt", "ends in .safetensors"),
        ("MODEL c4 --wbits 4 --save x.safetensors", "ends in .pt or .gguf, or --save_safetensors"),
        (
            "MODEL c4 --wbits 4 --save-dir d --embedding-bits 4",
            "--embedding-bits does nothing to a folder",
        ),
        ("MODEL c4 --wbits 4 --save-dir d --plain", "--plain does nothing to a folder"),
        ("MODEL --wbits 4 --nearest --save --refine 9", "--refine does nothing with --nearest"),
        ("MODEL --wbits 4 --nearest --save --act-order", "--act-order does nothing"),
        ("MODEL --wbits 4 --nearest --save --quality best", "--quality does nothing"),
        ("MODEL c4 --wbits 4 --nsamples 0 --save", "--nsamples 0 is not possible: give 1"),
        ("MODEL c4 --wbits 4 --seqlen 1 --save", "--seqlen 1 is not possible: give 2"),
        ("MODEL c4 --wbits 4 --resume", "--resume needs --save or"),
        ("MODEL", "nothing to do: give --wbits"),
        ("MODEL c4", "nothing to do"),
        ("MODEL c4 --wbits 16", "nothing to do"),
        ("MODEL --load x.pt", "nothing to do"),
        ("MODEL c4 --save", "--save is for quantizing: it needs --wbits"),
        ("MODEL c4 --save x.pt --load y.pt --eval", "--save is for quantizing.* no --load"),
        ("MODEL c4 --save-dir d --wbits 16 --eval", "--save-dir is for quantizing"),
        ("MODEL c4 --nsamples 8 --load x.pt --eval", "--nsamples is for quantizing"),
        ("MODEL c4 --seed 0 --eval", "--seed needs --wbits or --size or --chat"),
        ("MODEL c4 --load x.pt --resume --eval", "--resume is for quantizing"),
        ("MODEL c4 --wbits 16 --load x.pt --eval", "--wbits 16 is the full model"),
        ("MODEL --eval", "--eval needs DATASET"),
        ("MODEL --wbits 4 --nearest --eval", "--eval needs DATASET"),
        ("MODEL --load x.pt --benchmark 8", "--benchmark needs DATASET"),
        ("MODEL c4 --eval --check", "--check needs --benchmark"),
        ("MODEL c4 --text hi --eval-windows 2", "--eval-windows needs --eval or --eval-data"),
        ("MODEL c4 --eval --max-new-tokens 2", "--max-new-tokens needs --text or --chat"),
        ("MODEL --text hi --temperature 1", "--temperature needs --chat"),
        ("MODEL --chat --temperature nan", "--temperature nan is not possible: give 0 to 10"),
        ("MODEL --chat --temperature -1", "--temperature -1.0 is not possible"),
        ("MODEL --chat --top-p 0", "--top-p 0.0 is not possible: give 0.001 to 1"),
        ("MODEL --chat --top-k -1", "--top-k -1 is not possible: give 0 or more"),
        ("MODEL --chat --repetition-penalty 0", "--repetition-penalty 0.0 is not possible"),
        ("MODEL c4 --benchmark 0", "--benchmark 0 is not possible: give 1"),
        ("MODEL c4 --benchmark 1 --check", "--benchmark 1 is not possible: give 2"),
        ("MODEL c4 --text hi --max-new-tokens 0", "--max-new-tokens 0 is not possible"),
        ("MODEL c4 --eval --eval-windows -3", "--eval-windows -3 is not possible"),
        ("MODEL c4 --eval --dtype int8", "--dtype: invalid choice"),
    ],
)
def test_arguments_that_make_no_sense(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(LLAMA, line.split()) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", err)
    assert out == ""
    assert os.listdir(tmp_path) == []


def test_needs_are_of_flags_that_exist():
    flags = {flag for action in parser(LLAMA)._actions for flag in action.option_strings}
    assert flags.issuperset([*NEEDS, *(flag for needed in NEEDS.values() for flag in needed)])
