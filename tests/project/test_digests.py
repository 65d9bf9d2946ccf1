"""The same arguments give the same file, bit for bit, from one version to the next.

A change that is meant to alter the integers records new digests:
`RECORD_DIGESTS=1 python -m pytest tests/project/test_digests.py`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers.digests import ENVIRONMENT

RECORDED = ROOT / "tests" / "fixtures" / "digests.json"
SCRIPT = ROOT / "tests" / "helpers" / "digests.py"


def machine() -> str:
    """What the last bit of a float32 sum depends on: torch, and whose processor it runs on."""
    found = re.search(r"vendor_id\s*: (\S+)", Path("/proc/cpuinfo").read_text())
    return f"torch {torch.__version__}, {found[1] if found else 'unknown'}"


def test_files_are_those_of_the_version_before(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # Whatever the machine: a run that was stopped and resumed writes what an unstopped one does.
    for digests in found.values():
        assert digests["resumed: model.pt"] == digests["4 bit, gar: model.pt"]
    recorded = json.loads(RECORDED.read_text())
    if os.environ.get("RECORD_DIGESTS"):
        recorded[machine()] = found
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")
    if machine() not in recorded:
        pytest.skip(f"no digests were recorded on a machine with {machine()}")
    assert found == recorded[machine()]
