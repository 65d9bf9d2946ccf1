"""Prints the oldest version of everything that pyproject.toml allows, as constraints for pip.

python tests/helpers/floors.py [EXTRA...]     of these optional parts alone
"""

import sys
from pathlib import Path

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = Path(__file__).parents[2] / "pyproject.toml"
# What develops the package has no oldest version that matters.
TOOLS = "test"


def floors(project: dict, *extras: str) -> list[str]:
    """`name==version` of each requirement, those of the optional parts too.

    project: the table [project] of pyproject.toml. extras: the optional parts, if only theirs are
        asked for.
    """
    optional = project["optional-dependencies"]
    lines = [] if extras else [*project["dependencies"]]
    parts = extras or [extra for extra in optional if extra != TOOLS]
    lines += [line for extra in parts for line in optional[extra]]
    found = set()
    for requirement in map(Requirement, lines):
        if requirement.name == project["name"]:
            found.update(floors(project, *requirement.extras))
            continue
        (oldest,) = [part.version for part in requirement.specifier if part.operator == ">="]
        found.add(f"{requirement.name}=={oldest}")
    return sorted(found)


if __name__ == "__main__":
    text = PROJECT.read_text(encoding="utf-8")
    print("\n".join(floors(tomllib.loads(text)["project"], *sys.argv[1:])))
