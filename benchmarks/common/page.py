"""Tables of Markdown, and pages whose parts between markers are made from results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from gptq.errors import UserError
from gptq.files.atomic import whole_file


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (header, *rows))
    return "\n".join([head, "|" + "---|" * len(header), *lines])


def updated(path: Path, parts: Mapping[str, str]) -> str:
    """The page with its parts made anew, each between `<!-- name -->` and `<!-- end of name -->`.

    Raises UserError if one is not there.
    """
    page = path.read_text(encoding="utf-8")
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        before, _, rest = page.partition(begin)
        _, _, after = rest.partition(end)
        if page.count(begin) != 1 or rest.count(end) != 1:
            raise UserError(f"{path}: has no part '{name}'; put it between {begin!r} and {end!r}")
        page = before + begin + text + "\n" + end + after
    return page


def write(path: Path, parts: Mapping[str, str]) -> None:
    """Write the page that `updated` returns."""
    page = updated(path, parts)
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
