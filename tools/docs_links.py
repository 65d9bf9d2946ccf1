"""A hook of mkdocs: links out of docs/ lead to the repository, because the site has no such file.

On disk they stay relative, and tests/project/test_readme.py checks them there.
"""

import re
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

OUTSIDE = re.compile(r"\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    base = f"{str(config.repo_url).rstrip('/')}/blob/main"

    def absolute(link: re.Match) -> str:
        return f"]({base}/{normpath(f'docs/{link[1]}')})"

    return OUTSIDE.sub(absolute, markdown)
