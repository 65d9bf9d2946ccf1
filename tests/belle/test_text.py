"""Tokens of Chinese and English text."""

from belle.text import tokens


def test_words_are_whole_and_han_characters_single():
    assert tokens("用 Python 写一个 quick-sort，ＯＫ？") == [
        *["用", "python", "写", "一", "个", "quick", "sort", "ok"]
    ]


def test_text_without_words_has_no_tokens():
    assert tokens("  ，。!? ") == []
