"""What benchmarks/llama_cpp.py measured: the best of the runs, ratios to llama.cpp, and a table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from gptq.errors import UserError

PEER = "llama.cpp"


@dataclass(frozen=True)
class Run:
    """One pass, or the best of several."""

    method: str
    head: int
    """Bits of the output head in the file."""
    file_bytes: int
    read_bytes: int
    """Weights in memory that each token needs: all but the embedding."""
    prefill_seconds: float
    """Of the whole prompt."""
    start_seconds: float
    """Of the START tokens before the decoded ones."""
    whole_seconds: float
    """Of those and of the decoded tokens."""

    def decode_rate(self, tokens: int) -> float:
        """Tokens a second, one at a time. Raises UserError if they took no time."""
        spent = self.whole_seconds - self.start_seconds
        if spent <= 0:
            raise UserError(f"--tokens {tokens}: too few to be timed; give more")
        return tokens / spent


def best(runs: Sequence[Run]) -> list[Run]:
    """The least seconds of each kind, by head and method, in the order they first came in."""
    least: dict[tuple[int, str], Run] = {}
    for run in runs:
        before = least.setdefault((run.head, run.method), run)
        least[run.head, run.method] = replace(
            before,
            prefill_seconds=min(before.prefill_seconds, run.prefill_seconds),
            start_seconds=min(before.start_seconds, run.start_seconds),
            whole_seconds=min(before.whole_seconds, run.whole_seconds),
        )
    return list(least.values())


def results(runs: Sequence[Run], prompt: int, tokens: int) -> list[dict[str, Any]]:
    """The best of each method: tokens a second, GB/s of weights in decoding, and how many times as
    fast as llama.cpp with a head of the same bits."""
    made: list[dict[str, Any]] = []
    for run in best(runs):
        decode = run.decode_rate(tokens)
        made.append(
            {
                "method": run.method,
                "head": run.head,
                "file_bytes": run.file_bytes,
                "read_bytes": run.read_bytes,
                "decode": decode,
                "gigabytes": run.read_bytes * decode / 1e9,
                "prefill": prompt / run.prefill_seconds,
            }
        )
    peers = {row["head"]: row for row in made if row["method"] == PEER}
    for row in made:
        for kind in ("decode", "prefill"):
            row[f"{kind}_ratio"] = row[kind] / peers[row["head"]][kind]
    return made


def table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(
        title=f"compared with {PEER}", caption=f"x: times as fast as {PEER}; best of the repeats"
    )
    headings = ("method", "head", "file MB", "read MB", "decode tok/s", "GB/s", "x")
    for heading in (*headings, "prefill tok/s", "x"):
        made.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    for row in rows:
        ours = row["method"] != PEER
        cells = [
            row["method"],
            str(row["head"]),
            f"{row['file_bytes'] / 1e6:.0f}",
            f"{row['read_bytes'] / 1e6:.0f}",
            f"{row['decode']:.2f}",
            f"{row['gigabytes']:.1f}",
            f"{row['decode_ratio']:.2f}" if ours else "",
            f"{row['prefill']:.1f}",
            f"{row['prefill_ratio']:.2f}" if ours else "",
        ]
        made.add_row(*cells)
    return made
