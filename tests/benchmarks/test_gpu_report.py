"""The pages that speak of a GPU, and the results that they are made of."""

import copy
import json
import re
import shutil

import pytest

from benchmarks import gpu_report
from benchmarks.common import gpu_results, page
from benchmarks.gpu_predictions import DECODED, PRODUCTS

RESULTS = gpu_results.read(gpu_report.DEFAULT)
SHAPE = {"inputs": 8192, "outputs": 8192}


@pytest.fixture
def results():
    return copy.deepcopy(RESULTS)


def cells(table: str) -> list[dict[str, str]]:
    """The lines of a table by its header."""
    header, _, *lines = (
        [cell.strip() for cell in it.split("|")[1:-1]] for it in table.splitlines()
    )
    return [dict(zip(header, line, strict=True)) for line in lines]


@pytest.mark.parametrize("name", gpu_report.PAGES)
def test_the_pages_are_what_the_results_make_of_them(name):
    path = gpu_report.ROOT / name
    parts = {part: text(RESULTS) for part, text in gpu_report.PAGES[name].items()}
    assert page.updated(path, parts) == path.read_text(encoding="utf-8")


def test_the_chosen_variant_is_named():
    name = "bulk-64x128-stages4-splits2"
    row = {"bits": 4, "rows": 64, "cublas_fp16": 4e-5, "gemm": 5e-5}
    made = gpu_report.kernel_table([row | {"chosen": name, name: 2e-5}])
    assert made.splitlines()[2] == f"| 4 | 64 |  | 50.0 |  |  |  | 40.0 | 2.00: {name}, **20.0** |"
    made = gpu_report.kernel_table([row | {"chosen": "gemm"}])
    assert made.splitlines()[2] == "| 4 | 64 |  | **50.0** |  |  |  | 40.0 | 0.80 |"


def test_peers_and_torchs_own_product_are_columns():
    row = {"bits": 4, "rows": 1, "gemv": 3e-5, "chosen": "gemv", "cublas_fp16": 6e-5}
    peers = [{"peer": "humming", "bits": 4, "rows": 1, "seconds": 2.5e-5}]
    first, second = cells(
        gpu_report.kernel_table([row | {"torch_int4": 4e-5}, row | {"rows": 2}], peers)
    )
    assert (first["humming"], first["torch int4"], first["gemv"]) == ("25.0", "40.0", "**30.0**")
    assert (second["humming"], second["torch int4"]) == ("", "")
    assert "torch int4" not in gpu_report.kernel_table([row])


def test_each_shape_has_its_table():
    row = {"bits": 4, "rows": 1, "gemv": 3e-5, "chosen": "gemv", "cublas_fp16": 6e-5, **SHAPE}
    other = row | {"inputs": 4096, "outputs": 11008, "gemv": 1e-5}
    peer = {"peer": "gemlite", "bits": 4, "rows": 1, "inputs": 4096, "outputs": 11008}
    made = gpu_report.kernel_tables(
        {
            "kernels": [{"rows": [row, other]}],
            "peers": [{"rows": [peer | {"seconds": 2e-5}]}],
        }
    )
    first, table, second, others = made.split("\n\n")
    assert (first, second) == ("8192 x 8192:", "4096 x 11008:")
    assert "gemlite" not in table
    assert cells(others)[0]["gemlite"] == "20.0"


def test_a_model_that_does_not_fit():
    row = {"model": "bloom", "bits": 32, "tokens_per_second": None, "memory": None, "used": None}
    assert gpu_report.decode_table([row]).endswith(
        "| bloom | 32 | does not fit |  |  |  |  |  |  |"
    )
    row |= {"tokens_per_second": 450.2, "by_modules": 209.4, "memory": 2**32, "used": 2**33}
    row |= {"overlapping": 510.3, "answer": 400.4, "generate": 250.1}
    shown = "| bloom | 32 | 450 | 510 | 209 | 400 | 250 | 4.00 | 8.00 |"
    assert gpu_report.decode_table([row]).endswith(shown)


def test_each_parts_versions_are_named(results):
    assert gpu_report.about(results).startswith("H200: torch 2.11.0, CUDA 13.0. A kernel ")
    newest, facts = results["kernels"][0], results["kernels"][0]["about"]
    about = facts | {"driver": "580.1", "commit": "abc1234"}
    run = {"about": about, "finished": False, "rows": newest["rows"][:3]}
    peers = {"about": facts | {"gemlite": "0.5"}, "finished": True, "rows": [{}]}
    added = gpu_results.add(results, "kernels", run) | {"peers": [peers]}
    first, *lines = gpu_report.about(added).splitlines()
    assert first.startswith("H200: torch 2.11.0, CUDA 13.0, driver 580.1, commit abc1234. ")
    assert lines[1:] == [
        "The run of kernels was cut off after 3 rows.",
        "21 rows of kernels: H200: torch 2.11.0, CUDA 13.0.",
        "1 row of peers: H200: torch 2.11.0, CUDA 13.0, gemlite 0.5.",
        "7 rows of decode: H200: torch 2.11.0, CUDA 13.0.",
    ]


def test_what_was_predicted_stands_beside_what_was_measured(results):
    lines = cells(gpu_report.predicted_products(results))
    assert len(lines) == len(PRODUCTS)
    place = [(it.bits, it.shape, it.rows) for it in PRODUCTS].index((4, (8192, 8192), 64))
    names = ("rows", "predicted", "measured", "torch float16", "aim")
    assert [lines[place][name] for name in names] == ["64", "15.6", "53.7 gemm", "37.6", "18.8"]
    assert [lines[-1][name] for name in names] == ["1024", "121.7", "", "", ""]
    row = next(r for r in results["kernels"][0]["rows"] if (r["bits"], r["rows"]) == (4, 64))
    row |= {"chosen": "bulk-64x256-stages4-splits1", "bulk-64x256-stages4-splits1": 1.6e-5}
    lines = cells(gpu_report.predicted_products(results))
    assert lines[place]["measured"] == "16.0 bulk-64x256-stages4-splits1"


def test_predicted_tokens(results):
    line, *others = gpu_report.predicted_tokens(results).splitlines()[2:]
    assert line == "| llama | 4 | 505 | 610 | 209 by modules |  | 450 |"
    assert len(others) + 1 == len(DECODED)
    row = next(r for r in results["decode"][0]["rows"] if (r["model"], r["bits"]) == ("llama", 4))
    row |= {"by_modules": 209, "tokens_per_second": 500.4, "overlapping": 600.2}
    line = gpu_report.predicted_tokens(results).splitlines()[2]
    assert line == "| llama | 4 | 505 | 610 | 500 | 600 | 450 |"
    assert gpu_report.token(results).startswith("A token of the 4-bit LLaMA takes 2.0 ms; its")


def test_where_torch_is_faster(results):
    rows = {r["rows"]: r for r in results["kernels"][0]["rows"] if r["bits"] == 4}
    assert gpu_report.slower(results)[:2] == ([64, 128, 256, 512, 1024, 2048, 8192], True)
    for n in (1024, 2048, 8192):
        rows[n]["dense"] = 1e-4
    assert "faster for 64, 128, 256, 512 rows, by up to 2.0 times" in gpu_report.limits(
        results, "en"
    )
    assert "64、128、256、512 行" in gpu_report.limits(results, "zh")
    for row in rows.values():
        row["cublas_fp16"] = 1
    assert gpu_report.slower(results) is None
    assert gpu_report.limits(results, "en").endswith("GPU, an H200.")
    assert gpu_report.limits(results, "zh").endswith("上运行过。")


def test_blocks_are_of_the_newest_run_and_the_last_of_a_setting(results):
    assert "would take 31 s with" in gpu_report.blocks(results)
    old = next(r for r in results["blocks"][0]["rows"] if r["setting"] == "fast")
    device = {"blocks": 4, "activations": "device"}
    rows = [
        old | device | {"seconds": 40},
        old | device | {"seconds": 8},
        old | device | {"activations": "host", "seconds": 80},
    ]
    about = results["blocks"][0]["about"]
    run = {"about": about, "finished": False, "rows": rows}
    whole = {"setting": "fast", "blocks": 32, "activations": "host", "seconds": 61.2}
    results = gpu_results.add(results, "blocks", run)
    results |= {"quantization": [{"about": about, "finished": True, "rows": [whole]}]}
    made = gpu_report.blocks(results)
    assert "| all | 2.00 | 2.25 |" in made
    assert "of a run of 4 and 2\n" in made
    assert "All 32 blocks took 61 s with `--quality fast`, activations on the host." in made


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The pages in a folder of their own; called, it writes them from results and returns them."""
    for name in gpu_report.PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(gpu_report.ROOT / name, tmp_path / name)
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)

    def write(results):
        path = tmp_path / "result.json"
        path.write_text(json.dumps(results))
        assert gpu_report.main([str(path)]) == 0
        return {name: (tmp_path / name).read_text("utf-8") for name in gpu_report.PAGES}

    return write


def test_what_was_not_measured_is_on_no_page(copied, results):
    """Also nothing that another GPU's results had put there."""
    for run in results["kernels"] + results["decode"]:
        run["about"]["gpu"] = "NVIDIA H100"
    for run in results["decode"]:
        run["rows"] = [row for row in run["rows"] if row["bits"] != 16]
    pages = copied({name: results[name] for name in ("kernels", "decode")})
    assert "<!-- gpu -->\n\n<!-- end of gpu -->" in pages["docs/speed.md"]
    assert "(H100, 4 bits, 8192 x 8192)" in pages["README.md"]
    assert re.search(r"shape decodes \d+ tokens/s: \[docs", pages["README.md"])
    assert re.search(r"每秒解码 \d+ 个 token：\[docs", pages["README.zh.md"])
    pages = copied({"kernels": results["kernels"]})
    assert "shape decodes" not in pages["README.md"]
    assert "每秒解码" not in pages["README.zh.md"]
    assert "<!-- decode -->\n\n<!-- end of decode -->" in pages["docs/cuda.md"]


def test_one_setting_of_blocks_is_not_enough(results):
    for run in results["blocks"]:
        run["rows"] = [row for row in run["rows"] if row["setting"] == "fast"]
    assert gpu_report.blocks(results) == ""


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "result.json"
    pages = [tmp_path / name for name in gpu_report.PAGES]
    for target in pages:
        target.parent.mkdir(exist_ok=True)
        target.write_text("no markers")
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    for text, expected in (
        ("", "Expecting value"),
        ("{}", "'kernels'"),
        (json.dumps(RESULTS), "has no part 'about'"),
    ):
        path.write_text(text)
        assert gpu_report.main([str(path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {path}: ")
        assert expected in error
        assert error.count("\n") == 1
    assert gpu_report.main([str(tmp_path / "none.json")]) == 2
    assert {target.read_text() for target in pages} == {"no markers"}


def test_all_pages_are_written(tmp_path, monkeypatch, capsys):
    for name in gpu_report.PAGES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(gpu_report.ROOT / name, tmp_path / name)
        text = (tmp_path / name).read_text(encoding="utf-8")
        (tmp_path / name).write_text(text.replace("3.08", "9.99").replace("2.25", "9.99"))
    before = {name: (gpu_report.ROOT / name).read_bytes() for name in gpu_report.PAGES}
    monkeypatch.setattr(gpu_report, "ROOT", tmp_path)
    assert gpu_report.main([]) == 0
    assert {name: (tmp_path / name).read_bytes() for name in gpu_report.PAGES} == before


@pytest.mark.parametrize("ours", ["gemv", "dense"])
def test_results_of_before_name_no_kernel(ours):
    """The limits of then choose."""
    row = {"bits": 4, "rows": 8 if ours == "gemv" else 600, "cublas_fp16": 4e-5, ours: 5e-5}
    assert "**50.0**" in gpu_report.kernel_table([row])
