"""How much a new instruction resembles those that there are: ROUGE-L F1 (Lin, 2004)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz import process
from rapidfuzz.distance import Indel

from belle.text import tokens

MOST_SIMILAR = 10


@dataclass(frozen=True)
class Similarity:
    highest: float
    """The score of the most similar instruction, 0 to 1."""
    most_similar: dict[str, float]
    """The MOST_SIMILAR instructions with the highest scores, highest first."""
    average: float
    """The mean score of all instructions."""


class Pool:
    """Instructions that new ones are compared with.

    ROUGE-L F1 of two token lists, 2 LCS / (m + n), is their normalized Indel similarity. Each list
    is kept as a string of one character a token, of which rapidfuzz compares a million in 0.1 s.
    So a new instruction is compared with all: that is exact, and gives the mean too.
    """

    def __init__(self, instructions: Sequence[str], limit: float, workers: int = 1) -> None:
        """limit: the highest score with which an instruction is new.
        workers: threads; no more are used than instructions are compared at a time."""
        self._codes: dict[str, str] = {}
        self._limit = limit
        self._workers = workers
        self._texts: list[str] = []
        self._encoded: list[str] = []
        for text in instructions:
            self.add(text)

    def add(self, instruction: str) -> None:
        self._texts.append(instruction)
        self._encoded.append(self._encode(instruction))

    def compare(self, instructions: Sequence[str]) -> list[Similarity]:
        """Each with the pool, and with those before it that `limit` lets in."""
        encoded = [self._encode(text) for text in instructions]
        scores = process.cdist(
            encoded,
            self._encoded + encoded,
            scorer=Indel.normalized_similarity,
            dtype=np.float64,
            workers=self._workers,
        )
        texts, columns, results = list(self._texts), list(range(len(self._texts))), []
        for i, text in enumerate(instructions):
            results.append(_summary(scores[i, columns], texts))
            if results[-1].highest <= self._limit:
                columns.append(len(self._texts) + i)
                texts.append(text)
        return results

    def _encode(self, instruction: str) -> str:
        # Frequent tokens come early, and rapidfuzz is twice as fast with the first 256 characters.
        return "".join(
            self._codes.setdefault(token, chr(len(self._codes))) for token in tokens(instruction)
        )


def _summary(row: np.ndarray, texts: Sequence[str]) -> Similarity:
    """row: the scores of an instruction (len(texts),)."""
    if not row.size:
        return Similarity(0.0, {}, 0.0)
    most = np.argpartition(-row, min(MOST_SIMILAR, row.size) - 1)[:MOST_SIMILAR]
    ranked = sorted(most.tolist(), key=lambda index: (-row[index], index))
    similar = {texts[index]: float(row[index]) for index in ranked}
    return Similarity(float(row[ranked[0]]), similar, float(row.mean()))
