"""Puts what was measured on a GPU into docs/cuda.md: its tables of kernels and of decoding.

python -m benchmarks.gpu_report [benchmarks/results/nvidia-h200.json]
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptq.errors import UserError
from gptq.files.atomic import whole_file

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / "benchmarks" / "results" / "nvidia-h200.json"
PAGE = ROOT / "docs" / "cuda.md"
# Columns and the names of what was timed.
KERNELS = {"gemv": "gemv", "gemm": "gemm", "wgmma": "wgmma", "dense": "dense", "Triton": "triton"}
# Before results named the chosen kernel: the most rows of each, see quant_cuda/cuda/kernels.py.
UNTUNED = {"gemv": 32, "gemm": 64, "wgmma": 512, "dense": 1 << 30}

Rows = list[dict[str, Any]]


def kernel_table(rows: Rows, peers: Sequence[dict[str, Any]] = ()) -> str:
    """Microseconds of each kernel; the chosen one in bold, and how it compares with float16.

    peers: other packages' rows; each package is a column.
    """
    theirs = {(row["peer"], row["bits"], row["rows"]): row["seconds"] for row in peers}
    packages = list(dict.fromkeys(row["peer"] for row in peers))
    header = ["bits", "rows", *KERNELS, *packages, "torch float16", "chosen, times faster"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        chosen = row.get("chosen") or next(k for k, most in UNTUNED.items() if row["rows"] <= most)
        times = {
            column: f"{1e6 * row[name]:.1f}" if name in row else ""
            for column, name in KERNELS.items()
        }
        if chosen in times:
            times[chosen] = f"**{times[chosen]}**"
        faster = f"{row['cublas_fp16'] / row[chosen]:.2f}"
        if chosen not in times:
            faster += f": {chosen}, **{1e6 * row[chosen]:.1f}**"
        key = row["bits"], row["rows"]
        beside = [theirs.get((package, *key)) for package in packages]
        beside = [f"{1e6 * seconds:.1f}" if seconds else "" for seconds in beside]
        dense = f"{1e6 * row['cublas_fp16']:.1f}"
        lines.append([*map(str, key), *times.values(), *beside, dense, faster])
    return _markdown(lines)


def decode_table(rows: Rows) -> str:
    """Tokens a second and GiB of memory."""
    lines = [["model", "bits", "tokens/s", "by modules", "tensors", "in use"], ["---"] * 6]
    for row in rows:
        rate, modules = row["tokens_per_second"], row.get("by_modules")
        gib = [f"{row[k] / 2**30:.2f}" if row[k] else "" for k in ("memory", "used")]
        shown = [row["model"], str(row["bits"]), f"{rate:.0f}" if rate else "does not fit"]
        lines.append([*shown, f"{modules:.0f}" if modules else "", *gib])
    return _markdown(lines)


def about(result: dict[str, Any]) -> str:
    """What was measured on what."""
    gpu, limits = result["gpu"].removeprefix("NVIDIA "), result["limits"]
    versions = [f"torch {result['torch'].partition('+')[0]}", f"CUDA {result['cuda']}"]
    versions += [f"{name} {result[name]}" for name in ("driver", "commit") if result.get(name)]
    return (
        f"{gpu}: {', '.join(versions)}. A kernel that reads and writes moves "
        f"{limits['copy'] / 1e9:.0f} GB/s there,\ntorch's float16 product reaches "
        f"{limits['matrix'] / 1e12:.0f} TFLOP/s."
    )


def updated(page: str, result: dict[str, Any]) -> str:
    """The page with its parts between markers made anew. Raises UserError if one is not there."""
    parts = {
        "about": about(result),
        "kernels": kernel_table(result["kernels"], result.get("peers", [])),
        "decode": decode_table(result["decode"]),
    }
    for name, text in parts.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise UserError(f"{PAGE}: has no part '{name}'; put it between {begin!r} and {end!r}")
        before, _, rest = page.partition(begin)
        page = before + begin + text + end + rest.partition(end)[2]
    return page


def _markdown(lines: list[list[str]]) -> str:
    first, rule, *others = lines
    cells = [" | ".join(line) for line in (first, *others)]
    made = [f"| {line} |" for line in cells]
    return "\n".join([made[0], "|" + "|".join(rule) + "|", *made[1:]])


def main(arguments: list[str]) -> int:
    path = Path(arguments[0]) if arguments else DEFAULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        page = updated(PAGE.read_text(encoding="utf-8"), result)
    except (OSError, ValueError, KeyError, UserError) as error:
        print(f"error: {path}: {error}; measure with benchmarks/gpu.sh", file=sys.stderr)
        return 2
    with whole_file(PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    print(f"{PAGE}: written from {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
