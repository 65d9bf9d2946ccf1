"""Each setting is declared once: its flag, valid values and name in messages follow from that."""

import ast
import pickle
import re

import numpy as np
import pytest
from conftest import ROOT

from gptq.cli.arguments import join_optional_values, parser
from gptq.cli.run import main
from gptq.cli.settings import quant_config, settings_from, spelled
from gptq.config import DEFAULTS, FULL_MODEL, METHODS, QUALITIES, SETTINGS, QuantConfig
from gptq.errors import SettingError, UserError

# Set by other flags (--percdamp, --quality) or by Python callers alone.
WITHOUT_A_FLAG = {"adaptive_damp", "residual_feedback", "sweeps"}
VALID = {
    "bits": 3,
    "group_size": -1,
    "sym": True,
    "order": "natural",
    "static_groups": True,
    "true_sequential": False,
    "percdamp": 0.5,
    "scale_search": "mse",
    "error_feedback": 0.25,
    "refine": 7,
    "method": "rtn",
    "embedding_bits": 4,
    "tune_tokens": 4096,
    "rotate": True,
}


def parse(line):
    return parser(None).parse_intermixed_args(join_optional_values(["MODEL", *line.split()]))


def test_a_setting_is_on_the_command_line_or_known_not_to_be():
    bare = {field for field, s in SETTINGS.items() if s.flag is None and s.shorthand is None}
    assert bare == WITHOUT_A_FLAG
    # What is off is as if there were no such setting.
    assert set(QuantConfig().to_dict()) == set(SETTINGS) - {"tune_tokens", "rotate"}
    assert set(SETTINGS) == set(DEFAULTS) == set(QuantConfig(tune_tokens=1, rotate=True).to_dict())
    assert set(VALID) == set(SETTINGS) - WITHOUT_A_FLAG
    assert all(set(changes) <= set(SETTINGS) for changes in QUALITIES.values())


def test_each_flag_is_taken_once_and_unset_by_default():
    flags = [flag for action in parser(None)._actions for flag in action.option_strings]
    for setting in SETTINGS.values():
        for flag in filter(None, (setting.flag, setting.shorthand and setting.shorthand.flag)):
            assert flags.count(flag) == 1
    assert settings_from(parse("")) == {}
    assert quant_config(parse("")) == QuantConfig()


@pytest.mark.parametrize("field", VALID)
def test_the_flag_that_a_message_names_sets_the_field(field):
    value = VALID[field]
    assert value != DEFAULTS[field]
    parsed = parse(spelled(field, value))
    assert settings_from(parsed) == {field: value}
    assert getattr(quant_config(parsed), field) == value


@pytest.mark.parametrize(
    ("line", "settings"),
    [
        ("--act-order", {"order": "act"}),
        ("--act-order --order act", {"order": "act"}),
        ("--nearest", {"method": "rtn"}),
        ("--plain", {"embedding_bits": 16}),
        ("--plain --embedding-bits 16", {"embedding_bits": 16}),
        ("--true-sequential", {"true_sequential": True}),
        (f"--wbits {FULL_MODEL}", {"bits": FULL_MODEL}),
    ],
)
def test_shorthands(line, settings):
    assert settings_from(parse(line)) == settings


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--act-order --order gar", "--act-order and --order gar disagree; give one of them"),
        ("--plain --embedding-bits 4", "--plain and --embedding-bits 4 disagree; give one"),
    ],
)
def test_shorthands_that_disagree(line, message):
    with pytest.raises(UserError, match=message):
        settings_from(parse(line))


def test_what_one_flag_means_for_other_settings():
    assert quant_config(parse("--percdamp 0.01")) == QuantConfig(adaptive_damp=False)
    nearest = QuantConfig(method="rtn", scale_search="minmax")
    assert quant_config(parse("--nearest")) == nearest
    assert quant_config(parse("--nearest --scale-search mse")).scale_search == "mse"
    for name, changes in QUALITIES.items():
        assert quant_config(parse(f"--quality {name}")) == QuantConfig(**changes)
    assert quant_config(parse("--quality fast --refine 2")).refine == 2


def test_help_tells_the_defaults():
    shown = re.sub(r"\s+", " ", parser(None).format_help())
    for field in ("group_size", "order", "scale_search", "error_feedback", "refine"):
        described = shown.split(f" {SETTINGS[field].help} ")[1]
        assert described.startswith(f"(default: {DEFAULTS[field]})"), field
    assert "(default: chosen for each layer)" in shown


@pytest.mark.parametrize("path", sorted((ROOT / "gptq").rglob("*.py")), ids=lambda path: path.stem)
def test_a_list_of_choices_is_written_once(path):
    lists = {s.choices for s in SETTINGS.values() if s.choices}
    written = [
        tuple(element.value for element in node.elts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Tuple | ast.List | ast.Set)
        and all(isinstance(element, ast.Constant) for element in node.elts)
    ]
    copies = [choices for choices in written if choices in lists]
    assert len(copies) == (len(lists) if path.stem == "config" else 0), copies


# Values that cannot work ---------------------------------------------------------------------

WRONG = [
    ("bits", 5, "choose one of 2, 3, 4, 8"),
    ("bits", FULL_MODEL, "choose one of 2, 3, 4, 8"),
    ("bits", 4.0, "choose one of"),
    ("bits", "4", "choose one of"),
    ("order", "none", "choose one of gar, natural, act"),
    ("scale_search", "none", "choose one of hessian, mse, minmax"),
    ("method", "awq", f"choose one of {', '.join(METHODS)}"),
    ("embedding_bits", True, "choose one of 4, 8, 16"),
    ("group_size", 0, "give a number of inputs such as 128, or -1 for one group of all inputs"),
    ("group_size", -2, "give a number of inputs"),
    ("group_size", 64.0, "give a number of inputs"),
    ("group_size", True, "give a number of inputs"),
    ("percdamp", 0, "give a share of the mean diagonal above 0 and below 10, such as 0.01"),
    ("percdamp", 10, "give a share of the mean diagonal"),
    ("percdamp", float("nan"), "give a share of the mean diagonal"),
    ("percdamp", "0.01", "give a share of the mean diagonal"),
    ("error_feedback", -0.1, "give a share from 0 to 1"),
    ("error_feedback", 1.1, "give a share from 0 to 1"),
    ("refine", -1, "give 0 to 1000 rounds"),
    ("refine", 1001, "give 0 to 1000 rounds"),
    ("refine", 1.0, "give 0 to 1000 rounds"),
    ("sweeps", 0, "give 1 to 1000"),
    ("sym", "no", "give True or False"),
    ("sym", 1, "give True or False"),
    ("rotate", "x", "give True or False"),
    ("sweeps", 1001, "give 1 to 1000"),
]


@pytest.mark.parametrize(("field", "value", "advice"), WRONG)
def test_a_python_caller_is_told_the_field(field, value, advice):
    with pytest.raises(SettingError) as caught:
        QuantConfig(**{field: value})
    assert str(caught.value).startswith(f"{field} {value} is not possible: {advice}")
    assert (caught.value.field, caught.value.value) == (field, value)
    assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--groupsize 0", "--groupsize 0 is not possible: give a number of inputs"),
        ("--percdamp 10", "--percdamp 10.0 is not possible: give a share of the mean diagonal"),
        ("--error-feedback 2", "--error-feedback 2.0 is not possible: give a share from 0 to 1"),
        ("--refine 1001", "--refine 1001 is not possible: give 0 to 1000 rounds"),
    ],
)
def test_a_command_line_is_told_the_flag(line, message, capsys):
    assert main(None, ["MODEL", "c4", "--wbits", "4", *line.split()]) == 2
    assert re.fullmatch(rf"error: {message}[^\n]*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("group_size", (1, 128, 10**6, -1)),
        ("percdamp", (1e-12, 1, 9.99, np.float32(0.5))),
        ("error_feedback", (0, 1, 0.5)),
        ("refine", (0, 1000)),
        ("sweeps", (1, 1000)),
        *((field, s.choices) for field, s in SETTINGS.items() if s.choices),
    ],
)
def test_values_that_work(field, values):
    for value in values:
        assert getattr(QuantConfig(**{field: value}), field) == value


def test_the_error_can_be_pickled():
    error = SettingError("bits", 5, "is not possible")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.field, copy.value) == ("bits 5 is not possible", "bits", 5)
    assert isinstance(copy, UserError)
