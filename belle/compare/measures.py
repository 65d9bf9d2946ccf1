"""What an answer has in common with a reference: exact match, ROUGE-L and chrF.

ROUGE-L is rouge-score's, over words, or over characters for text without spaces; chrF is
sacrebleu's.
"""

import unicodedata

from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import CHRF

from belle.text import tokens


def compare(written: str, reference: str) -> dict[str, float]:
    """Each from 0 to 1, by the name of the measure."""
    scorer = RougeScorer(["rougeL"], tokenizer=_Tokens())
    return {
        "exact match": float(normal(written) == normal(reference)),
        "ROUGE-L": scorer.score(reference, written)["rougeL"].fmeasure,
        "chrF": CHRF().sentence_score(written, [reference]).score / 100,
    }


def normal(text: str) -> str:
    """Width, case, spaces and a closing full stop set aside."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.rstrip(".。")


class _Tokens:
    """Words, and single characters of scripts without spaces; rouge-score's own knows only a-z."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)
