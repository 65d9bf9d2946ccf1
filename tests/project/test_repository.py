"""The files that tools outside the package read: documentation, issue templates, commit hooks."""

import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from helpers.floors import PROJECT as PYPROJECT
from helpers.floors import tomllib

PROJECT = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def parsed(name: str) -> dict:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_every_page_is_in_the_navigation_once():
    pages = [page for entry in parsed("mkdocs.yml")["nav"] for page in entry.values()]
    assert sorted(pages) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    assert pages[0] == "index.md"


def test_the_index_links_to_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for path in (ROOT / "docs").glob("*.md"):
        assert path.name == "index.md" or f"]({path.name})" in index, path.name


def test_the_site_needs_no_other_server():
    settings = parsed("mkdocs.yml")
    assert settings["theme"] == {"name": "mkdocs", "highlightjs": False}
    assert "repo_url" not in settings


def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "integrations.html").read_text(encoding="utf-8")
    # What lies outside docs/ is named, because the site has no such page.
    assert "README (<code>README.md</code> in the repository)" in page


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_are_valid(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form)
    names = [field["id"] for field in form["body"]]
    assert len(set(names)) == len(names)
    for field in form["body"]:
        assert field["type"] in ("input", "textarea")
        assert {"label", "description"} <= set(field["attributes"])


def test_a_bug_report_asks_for_what_finds_the_cause():
    assert [path.name for path in FORMS] == ["bug.yml", "feature.yml"]
    body = parsed(".github/ISSUE_TEMPLATE/bug.yml")["body"]
    required = {field["id"] for field in body if field.get("validations", {}).get("required")}
    assert required == {"command", "error", "version", "torch", "device"}
    text = str(body)
    for asked in ("`error:`", "traceback", "`gptq --version`", "torch.__version__", "nvidia-smi"):
        assert asked in text, asked


def test_commit_hooks_fetch_nothing_and_name_tools_that_are_required():
    (repository,) = parsed(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    tools = set()
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        folder, _, tool = hook["entry"].split()[0].rpartition("/")
        assert folder == ".venv/bin"
        assert tool in str(PROJECT["optional-dependencies"]["test"])
        assert ROOT.joinpath(folder, tool).exists() or not (ROOT / folder).exists()
        tools.add(tool)
    assert tools == {"ruff", "mypy"}


def test_the_wheel_script_can_be_run():
    script = ROOT / "tools" / "wheel.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
