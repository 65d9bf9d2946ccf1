"""The tables of docs/cuda.md, and the files that they are made of."""

import json

import pytest

from benchmarks import gpu_report
from benchmarks.common import page

RESULT = json.loads(gpu_report.DEFAULT.read_text(encoding="utf-8"))


def test_the_page_is_what_the_results_make_of_it():
    path = gpu_report.PAGE
    assert page.updated(path, gpu_report.parts(RESULT)) == path.read_text(encoding="utf-8")


def test_the_chosen_variant_is_named():
    name = "bulk-64x128-stages4-splits2"
    row = {"bits": 4, "rows": 64, "cublas_fp16": 4e-5, "gemm": 5e-5}
    made = gpu_report.kernel_table([row | {"chosen": name, name: 2e-5}])
    assert made.splitlines()[2] == f"| 4 | 64 |  | 50.0 |  |  |  | 40.0 | 2.00: {name}, **20.0** |"
    made = gpu_report.kernel_table([row | {"chosen": "gemm"}])
    assert made.splitlines()[2] == "| 4 | 64 |  | **50.0** |  |  |  | 40.0 | 0.80 |"


def test_a_model_that_does_not_fit():
    row = {"model": "bloom", "bits": 32, "tokens_per_second": None, "memory": None, "used": None}
    assert gpu_report.decode_table([row]).endswith("| bloom | 32 | does not fit |  |  |  |  |")
    row |= {"tokens_per_second": 450.2, "by_modules": 209.4, "memory": 2**32, "used": 2**33}
    row |= {"overlapping": 510.3}
    assert gpu_report.decode_table([row]).endswith("| bloom | 32 | 450 | 510 | 209 | 4.00 | 8.00 |")


def test_versions_are_named():
    named = RESULT | {"driver": "580.1", "commit": "abc1234"}
    text = "H200: torch 2.11.0, CUDA 13.0, driver 580.1, commit abc1234. "
    assert gpu_report.about(named).startswith(text)


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "result.json"
    target = tmp_path / "cuda.md"
    target.write_text("no markers")
    monkeypatch.setattr(gpu_report, "PAGE", target)
    for text, expected in (
        ("", "Expecting value"),
        ("{}", "'gpu'"),
        (json.dumps(RESULT), "has no part 'about'"),
    ):
        path.write_text(text)
        assert gpu_report.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}: ")
        assert expected in error
        assert error.count("\n") == 1
    assert gpu_report.main([str(tmp_path / "none.json")]) == 2
    assert target.read_text() == "no markers"


@pytest.mark.parametrize("ours", ["gemv", "dense"])
def test_results_of_before_name_no_kernel(ours):
    """The limits of then choose."""
    row = {"bits": 4, "rows": 8 if ours == "gemv" else 600, "cublas_fp16": 4e-5, ours: 5e-5}
    assert "**50.0**" in gpu_report.kernel_table([row])
