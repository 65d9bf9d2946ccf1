"""Text as tokens that suit Chinese and English alike."""

import re
import unicodedata

# Scripts that are written without spaces: Chinese, Japanese, Thai.
_UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"(?=\w)[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def tokens(text: str) -> list[str]:
    """Words, and single characters of scripts without spaces, in lower case and of one width."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
