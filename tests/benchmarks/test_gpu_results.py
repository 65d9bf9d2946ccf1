"""Results of one kind of GPU: what a run takes the place of."""

import pytest

from benchmarks.common import gpu_results
from benchmarks.common.gpu_results import add


def run(commit, *bits, finished=True, **more):
    rows = [{"model": "llama", "bits": it, "commit": commit, **more} for it in bits]
    return {"about": {"commit": commit}, "finished": finished, "rows": rows}


def rows(results):
    return [(r["commit"], row["bits"]) for r, row in facts(results)]


def facts(results):
    return [(it["about"], row) for it, row in gpu_results.with_facts(results, "decode")]


def test_a_finished_run_replaces_all():
    results = add(add({}, "decode", run("old", 16, 8)), "decode", run("new", 8, 4))
    assert rows(results) == [("new", 8), ("new", 4)]
    assert len(results["decode"]) == 1


def test_a_run_that_was_cut_off_leaves_what_it_did_not_reach():
    old = add({}, "decode", run("old", 16, 8, 4))
    results = add(old, "decode", run("new", 16, 8, finished=False))
    assert rows(results) == [("new", 16), ("new", 8), ("old", 4)]
    assert rows(old) == [("old", 16), ("old", 8), ("old", 4)], "what was given is as it was"
    results = add(results, "decode", run("newest", 4, finished=False))
    assert rows(results) == [("newest", 4), ("new", 16), ("new", 8)]


def test_other_parts_stay():
    results = add({"blocks": [run("old", 4)]}, "decode", run("new", 4))
    assert results["blocks"] == [run("old", 4)]


def test_only_some_rows_are_replaced():
    results = add({}, "decode", run("old", 16, 8))
    results = add(results, "decode", run("new", 4), lambda row: row["bits"] == 8)
    assert rows(results) == [("new", 4), ("old", 16)]


def test_files(tmp_path):
    path = tmp_path / "folder" / "a.json"
    assert gpu_results.read(path) == {}
    gpu_results.write(path, {"decode": [run("new", 4)]})
    assert gpu_results.read(path) == {"decode": [run("new", 4)]}
    path.write_text("no")
    with pytest.raises(ValueError, match="Expecting value"):
        gpu_results.read(path)
