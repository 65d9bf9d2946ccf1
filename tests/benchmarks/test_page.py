"""Parts of a page that are made from results."""

import pytest

from benchmarks.common.page import updated
from gptq.errors import UserError

PARTS = {"sizes": "| a |\n|---|"}


@pytest.mark.parametrize("old", ["", "old\n", "old\n\nlines\n"])
def test_what_stands_around_a_part_stays(old, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n\n<!-- sizes -->\n{old}<!-- end of sizes -->\n\nafter\n")
    made = updated(path, PARTS)
    expected = "before\n\n<!-- sizes -->\n| a |\n|---|\n<!-- end of sizes -->\n\nafter\n"
    assert made == expected
    path.write_text(made)
    assert updated(path, PARTS) == expected


@pytest.mark.parametrize(
    "text",
    [
        "none",
        "<!-- sizes -->\nno end",
        "<!-- end of sizes -->\n<!-- sizes -->\n",
        "<!-- sizes -->\n<!-- sizes -->\n<!-- end of sizes -->\n",
        "<!-- sizes -->\n<!-- end of sizes -->\n<!-- end of sizes -->\n",
    ],
)
def test_a_part_that_is_not_there_once(text, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(text)
    with pytest.raises(UserError, match="has no part 'sizes'"):
        updated(path, PARTS)
