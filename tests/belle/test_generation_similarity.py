"""Similarity against an independent ROUGE-L."""

import random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from belle.generation.similarity import MOST_SIMILAR, Pool
from belle.text import tokens

WORDS = ["the", "of", "cat", "dog", "runs", "写", "一", "首", "诗", "关于", "翻译", "的", "句子"]


class _Tokenizer:
    """Words as rouge_score wants them: its own tokenizer drops Chinese."""

    def tokenize(self, text: str) -> list[str]:
        return tokens(text)


def rouge(first: str, second: str) -> float:
    scorer = RougeScorer(["rougeL"], tokenizer=_Tokenizer())
    return scorer.score(first, second)["rougeL"].fmeasure


def texts(count: int, seed: int) -> list[str]:
    chooser = random.Random(seed)
    return [" ".join(chooser.choices(WORDS, k=chooser.randint(1, 30))) for _ in range(count)]


def test_scores_are_those_of_rouge_l():
    known, new = texts(30, 1), texts(5, 2)
    for text, found in zip(new, Pool(known, limit=-1).compare(new), strict=True):
        scores = [rouge(text, it) for it in known]
        assert found.highest == pytest.approx(max(scores))
        assert found.average == pytest.approx(sum(scores) / len(scores))
        assert len(found.most_similar) == MOST_SIMILAR
        listed = list(found.most_similar.values())
        assert listed == pytest.approx(sorted(scores, reverse=True)[:MOST_SIMILAR])
        for other, score in found.most_similar.items():
            assert score == pytest.approx(rouge(text, other))


def test_case_width_and_punctuation_do_not_matter():
    (found,) = Pool(["Write an ＡＰＩ, please!"], 0.7).compare(["write an api please"])
    assert found.highest == 1


@pytest.mark.parametrize("limit", [0.3, 0.6, 0.9])
def test_a_batch_is_as_one_after_another(limit):
    known, new = texts(10, 3), [*texts(40, 4), *texts(2, 4)]
    together = Pool(known, limit, workers=2).compare(new)
    pool = Pool(known, limit)
    for text, found in zip(new, together, strict=True):
        (alone,) = pool.compare([text])
        assert alone == found
        if alone.highest <= limit:
            pool.add(text)
    assert 0 < sum(found.highest <= limit for found in together) < len(new)


def test_an_empty_pool_and_nothing_new():
    pool = Pool([], 0.7)
    assert pool.compare([]) == []
    (found,) = pool.compare(["first of all"])
    assert (found.highest, found.most_similar, found.average) == (0, {}, 0)
