"""Exact and near duplicates, for datatrove's blocks: what is equal, and what is similar."""

import struct
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.exact_dedup import ExactDedupConfig
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from belle.release.blocks import documents, json_line

# Priorities of exact duplicates are 16-bit numbers.
MOST_TASKS = 65_000
GRAM = 5
# xxhash 4 takes no strings any more, and datatrove 0.10 gives it some.
_HASH = HashConfig(hash_fc="sha1")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def _text_of(document: Document) -> str:
    return document.text


def _earlier_first(document: Document) -> int:
    return MOST_TASKS + 1 - document.metadata["shard"]


# Of equal texts the first in the input stays.
EXACT = ExactDedupConfig(
    content_getter=_text_of, document_priority=_earlier_first, hash_config=_HASH
)
# The chance that two texts share a bucket is 1 - (1 - J^6)^10 at a Jaccard similarity J:
# 0.15 at 0.5, 0.71 at 0.7, 0.95 at 0.8 and 0.9995 at 0.9. Similar pairs are compared exactly
# afterwards, so that the buckets may be wide.
NEAR = MinhashConfig(n_grams=GRAM, num_buckets=10, hashes_per_bucket=6, hash_config=_HASH)


def grams(text: str) -> np.ndarray:
    """Hashes of all runs of GRAM characters, uint64, (max(1, characters - GRAM + 1),)."""
    text = text.ljust(GRAM, "\0")
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    count = len(codes) - GRAM + 1
    hashes = np.zeros(count, dtype=np.uint64)
    for i in range(GRAM):
        hashes = hashes * _MULTIPLIER + codes[i : i + count]
    hashes ^= hashes >> np.uint64(32)
    return hashes * _MULTIPLIER


def jaccard(a: str, b: str) -> float:
    """Share of the runs of GRAM characters of either text that both have."""
    first, second = np.unique(grams(a)), np.unique(grams(b))
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (len(first) + len(second) - common)


class _NoWords(WordTokenizer):
    """The one for a language would need its package, and 5-grams are of characters."""

    word_tokenize = sent_tokenize = span_tokenize = None  # type: ignore[assignment]


class Signatures(MinhashDedupSignature):
    """MinHash signatures of 5-grams of characters, which suit Chinese too.

    In numpy: datatrove hashes one 5-gram after another, which takes 15 times as long, and permutes
    the hashes by a remainder, which takes three times as long as an odd factor.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, NEAR, language=_NoWords())
        factors, offsets = self.parameters
        self.factors, self.offsets = factors.T | np.uint64(1), offsets.T

    def get_shingles(self, text: str) -> np.ndarray:
        return grams(text)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        hashes = np.min(self.factors * shingles + self.offsets, axis=1)
        # The next stage takes hashes below 2**61.
        return (hashes >> np.uint64(3)).reshape(NEAR.num_buckets, -1).tolist()


class ComparePairs(PipelineStep):
    """Keeps of the pairs that share a bucket those of a similarity from `threshold` on.

    For each record in such a pair it notes the most similar one, in the file `partners`.
    """

    name = "compare"
    type = "🫂 - DEDUP"

    def __init__(self, pairs: str, shards: str, folder: str, threshold: float) -> None:
        super().__init__()
        self.pairs = Path(pairs)
        self.shards = Path(shards)
        self.folder = Path(folder)
        self.partners = self.folder / "partners.json"
        self.threshold = threshold

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        # Task and number of one document, and of another.
        record = struct.Struct("<4I")
        files = {path.name: path.read_bytes() for path in sorted(self.pairs.glob("*.dups"))}
        pairs = {pair for content in files.values() for pair in record.iter_unpack(content)}
        compared = self._documents({end for pair in pairs for end in (pair[:2], pair[2:])})
        similar, partners = bytearray(), dict[str, tuple[float, str]]()
        for pair in sorted(pairs):
            first, second = compared[pair[:2]], compared[pair[2:]]
            similarity = jaccard(first.text, second.text)
            if similarity < self.threshold:
                continue
            similar += record.pack(*pair)
            for here, there in ((first.id, second.id), (second.id, first.id)):
                found = (round(similarity, 3), there)
                partners[here] = max(partners.get(here, found), found)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.partners.write_bytes(json_line(partners))
        # The next step wants as many files as there are buckets.
        for name in files:
            (self.folder / name).write_bytes(similar)
            similar = bytearray()

    def _documents(self, ends: set[tuple[int, ...]]) -> dict[tuple[int, ...], Document]:
        return {
            (shard, number): Document(document.text, document.id)
            for shard in {shard for shard, _ in ends}
            for number, document in enumerate(documents(self.shards / f"{shard:05d}.jsonl"))
            if (shard, number) in ends
        }
