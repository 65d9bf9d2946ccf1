"""A hook of mkdocs: a link out of docs/ becomes the path that it names.

The site has no such page. On disk the links work; tests/project/test_readme.py checks them there.
"""

import re
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def with_path(link: re.Match) -> str:
        return f"{link[1]} (`{normpath(f'docs/{link[2]}')}` in the repository)"

    return OUTSIDE.sub(with_path, markdown)
