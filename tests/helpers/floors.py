"""Prints the oldest version of everything that pyproject.toml allows, as constraints for pip."""

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


def floors(project: dict) -> list[str]:
    """`name==version` of each requirement, those of the optional parts too.

    project: the table [project] of pyproject.toml.
    """
    optional = project["optional-dependencies"]
    lines = [*project["dependencies"]]
    lines += [line for extra, wanted in optional.items() if extra != TOOLS for line in wanted]
    found = set()
    for requirement in map(Requirement, lines):
        (oldest,) = [part.version for part in requirement.specifier if part.operator == ">="]
        found.add(f"{requirement.name}=={oldest}")
    return sorted(found)


if __name__ == "__main__":
    print("\n".join(floors(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"])))
