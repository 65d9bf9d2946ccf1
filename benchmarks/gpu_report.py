"""Puts what was measured on a GPU into docs/cuda.md: its tables of kernels and of decoding.

python -m benchmarks.gpu_report [benchmarks/results/nvidia-h200.json]
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.page import markdown, write
from gptq.errors import UserError

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
    lines: list[list[str]] = []
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
        seconds = [theirs.get((package, *key)) for package in packages]
        beside = [f"{1e6 * it:.1f}" if it else "" for it in seconds]
        dense = f"{1e6 * row['cublas_fp16']:.1f}"
        lines.append([*map(str, key), *times.values(), *beside, dense, faster])
    return markdown(header, lines)


def decode_table(rows: Rows) -> str:
    """Tokens a second and GiB of memory."""
    lines: list[list[str]] = []
    for row in rows:
        rate, *others = (row.get(k) for k in ("tokens_per_second", "overlapping", "by_modules"))
        gib = [f"{row[k] / 2**30:.2f}" if row[k] else "" for k in ("memory", "used")]
        shown = [row["model"], str(row["bits"]), f"{rate:.0f}" if rate else "does not fit"]
        lines.append([*shown, *(f"{it:.0f}" if it else "" for it in others), *gib])
    return markdown(
        ["model", "bits", "tokens/s", "overlapping", "by modules", "tensors", "in use"], lines
    )


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


def parts(result: dict[str, Any]) -> dict[str, str]:
    """The parts of the page."""
    return {
        "about": about(result),
        "kernels": kernel_table(result["kernels"], result.get("peers", [])),
        "decode": decode_table(result["decode"]),
    }


def main(arguments: list[str]) -> int:
    path = Path(arguments[0]) if arguments else DEFAULT
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        write(PAGE, parts(result))
    except (OSError, ValueError, KeyError, UserError) as error:
        print(f"error: {path}: {error}; measure with benchmarks/gpu.sh", file=sys.stderr)
        return 2
    print(f"{PAGE}: written from {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
