"""Puts what was measured on a GPU into the pages that speak of it: tables and the sentences around
them, between markers of docs/cuda.md, docs/speed.md and both READMEs.

python -m benchmarks.gpu_report [benchmarks/results/nvidia-h200.json]

All of them become those of this one GPU: what has not been measured on it is left out.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks.common.gpu_results import Results, Row, Run, gpu, ran_on, read, rows_of, with_facts
from benchmarks.common.page import markdown, write
from benchmarks.gpu_predictions import DECODED, PARTS, PRODUCTS, WIDE
from gptq.errors import UserError

ROOT = Path(__file__).parents[1]
DEFAULT = ROOT / "benchmarks" / "results" / "nvidia-h200.json"
# Columns and the names of what was timed.
KERNELS = {"gemv": "gemv", "gemm": "gemm", "wgmma": "wgmma", "dense": "dense", "Triton": "triton"}
# Before results named the chosen kernel: the most rows of each, see quant_cuda/cuda/kernels.py.
UNTUNED = {"gemv": 32, "gemm": 64, "wgmma": 512, "dense": 1 << 30}
# Rows of x whose times the READMEs name.
TOLD = (1, 8, 64, 512)
STAGES = (
    *("forward", "moments", "damping", "feedback", "factorization", "sweep", "refinement"),
    "losses",
)

# What a setting of a quantization is called in prose.
SETTINGS = {"fast": "`--quality fast`", "default": "the defaults"}
SEQLEN = 2048

Rows = Sequence[Row]


def chosen(row: Row) -> str:
    """The kernel that a product was taken by."""
    return row.get("chosen") or next(k for k, most in UNTUNED.items() if row["rows"] <= most)


def faster(row: Row) -> float:
    """How many times as long torch's float16 product took as the chosen kernel."""
    return row["cublas_fp16"] / row[chosen(row)]


def kernel_tables(results: Results) -> str:
    """A table for each shape; the newest run's first."""
    rows, peers = rows_of(results, "kernels"), rows_of(results, "peers")
    parts = []
    for shape in dict.fromkeys((row["inputs"], row["outputs"]) for row in rows):
        of_shape = [
            [row for row in some if (row["inputs"], row["outputs"]) == shape]
            for some in (rows, peers)
        ]
        parts.append(f"{shape[0]} x {shape[1]}:\n\n{kernel_table(*of_shape)}")
    return "\n\n".join(parts)


def kernel_table(rows: Rows, peers: Rows = ()) -> str:
    """Microseconds of each kernel; the chosen one in bold, and how it compares with float16.

    peers: other packages' rows; each package is a column, as is torch's own 4-bit product.
    """
    theirs = {(row["peer"], row["bits"], row["rows"]): row["seconds"] for row in peers}
    packages = list(dict.fromkeys(row["peer"] for row in peers))
    int4 = ["torch int4"] if any("torch_int4" in row for row in rows) else []
    header = ["bits", "rows", *KERNELS, *packages, *int4, "torch float16", "chosen, times faster"]
    lines: list[list[str]] = []
    for row in rows:
        name = chosen(row)
        times = {column: _us(row.get(kernel)) for column, kernel in KERNELS.items()}
        if name in times:
            times[name] = f"**{times[name]}**"
        shown = f"{faster(row):.2f}"
        if name not in times:
            shown += f": {name}, **{_us(row[name])}**"
        key = row["bits"], row["rows"]
        others = [_us(theirs.get((package, *key))) for package in packages]
        others += [_us(row.get("torch_int4")) for _ in int4]
        lines.append([*map(str, key), *times.values(), *others, _us(row["cublas_fp16"]), shown])
    return markdown(header, lines)


def _us(seconds: float | None) -> str:
    return f"{1e6 * seconds:.1f}" if seconds else ""


# What is measured of decoding, and how the table calls it.
DECODED_WAYS = {
    "tokens_per_second": "tokens/s",
    "overlapping": "overlapping",
    "by_modules": "by modules",
    "answer": "of an answer",
    "generate": "by generate",
}


def decode_table(rows: Rows) -> str:
    """Tokens a second and GiB of memory."""
    if not rows:
        return ""
    lines: list[list[str]] = []
    for row in rows:
        rate, *others = (row.get(key) for key in DECODED_WAYS)
        gib = [f"{row[k] / 2**30:.2f}" if row[k] else "" for k in ("memory", "used")]
        shown = [row["model"], str(row["bits"]), f"{rate:.0f}" if rate else "does not fit"]
        lines.append([*shown, *(f"{it:.0f}" if it else "" for it in others), *gib])
    return markdown(["model", "bits", *DECODED_WAYS.values(), "tensors", "in use"], lines)


def about(results: Results) -> str:
    """What was measured on what, the kernels' newest run first."""
    run = results["kernels"][0]
    limits = run["about"]["limits"]
    lines = [
        f"{ran_on(run)}. A kernel that reads and writes moves {limits['copy'] / 1e9:.0f} GB/s "
        f"there,\ntorch's float16 product reaches {limits['matrix'] / 1e12:.0f} TFLOP/s."
    ]
    for part in ("kernels", "peers", "decode"):
        for it in results.get(part, []):
            if ran_on(it) != ran_on(run):
                lines.append(f"{_count(it)} of {part}: {ran_on(it)}.")
            if not it["finished"]:
                lines.append(f"The run of {part} was cut off after {_count(it)}.")
    return "\n".join(lines)


def _count(run: Run) -> str:
    return f"{len(run['rows'])} row{'' if len(run['rows']) == 1 else 's'}"


def rates(results: Results) -> str:
    """What one row takes, and what share of the matrix rate is reached."""
    wide = list(_wide(results))
    sentences = []
    for run, row in wide:
        if row["rows"] == 1:
            least = row["bytes"] / run["about"]["limits"]["copy"]
            sentences.append(
                f"One row of {row['bits']} bits takes {_us(row[chosen(row)])} us, where reading "
                f"its {row['bytes'] / 1e6:.0f} MB would take {_us(least)}."
            )
    sentences += [it for it in [_slower(results)] if it]
    for name in ("wgmma", "bulk"):
        best = max(
            (
                (row["flop"] / row[kernel] / run["about"]["limits"]["matrix"], row["rows"])
                for run, row in wide
                for kernel in row
                if row["bits"] == 4 and kernel.split("-")[0].split("_")[0] == name
            ),
            default=None,
        )
        if best:
            sentences.append(
                f"`{name}.cu` reaches {best[0]:.0%} of the matrix rate at most, at {best[1]} rows."
            )
    return "\n".join(sentences)


def slower(results: Results) -> tuple[list[int], bool, float] | None:
    """For how many rows of x torch's float16 product is faster at 4 bits.

    The rows that were measured, whether all from the first of them on are slower, and the largest
    factor; None if there are none.
    """
    rows = sorted((row for _, row in _wide(results) if row["bits"] == 4), key=lambda r: r["rows"])
    behind = [row for row in rows if faster(row) < 1]
    if not behind:
        return None
    most = max(1 / faster(row) for row in behind)
    return [row["rows"] for row in behind], behind == rows[-len(behind) :], most


def _slower(results: Results) -> str | None:
    """The same in words."""
    found = slower(results)
    if found is None:
        return None
    counts, all_from, most = found
    named = f"{counts[0]} rows and more" if all_from else f"{', '.join(map(str, counts))} rows"
    return f"At 4 bits torch's float16 product is faster for {named}, by up to {most:.1f} times."


def _wide(results: Results) -> Iterator[tuple[Run, Row]]:
    """Products of the square weight, and the runs that they are of."""
    for run, row in with_facts(results, "kernels"):
        if (row["inputs"], row["outputs"]) == WIDE:
            yield run, row


def token(results: Results) -> str:
    """What a token of LLaMA's shape takes, and what its tensors would."""
    lines = []
    for run, row in with_facts(results, "decode"):
        if (row["model"], row["bits"]) == ("llama", 4) and row["tokens_per_second"]:
            least = row["memory"] / run["about"]["limits"]["copy"]
            lines.append(
                f"A token of the 4-bit LLaMA takes {1e3 / row['tokens_per_second']:.1f} ms"
                f"{'' if row.get('by_modules') else ', by modules'}; its tensors could be read in "
                f"{1e3 * least:.1f}."
            )
    return "\n".join(lines)


def predicted_products(results: Results) -> str:
    """Microseconds: what was predicted for bulk.cu, and what the chosen kernel took."""
    header = ["bits", "shape", "rows", "tile", *PARTS, "predicted", "measured", "torch float16"]
    measured = {
        (row["bits"], (row["inputs"], row["outputs"]), row["rows"]): row
        for row in rows_of(results, "kernels")
    }
    lines = []
    for it in PRODUCTS:
        row = measured.get((it.bits, it.shape, it.rows))
        ends = ["", "", ""]
        if row is not None:
            dense = row["cublas_fp16"]
            ends = [f"{_us(row[chosen(row)])} {chosen(row)}", _us(dense)]
            ends.append(_us(dense / it.aim) if it.aim else "")
        shape = f"{it.shape[0]} x {it.shape[1]}"
        microseconds = map(str, (*it.parts, it.predicted))
        lines.append([str(it.bits), shape, str(it.rows), it.tile, *microseconds, *ends])
    return markdown([*header, "aim"], lines)


def predicted_tokens(results: Results) -> str:
    """Tokens a second: predicted for decode.cu and measured, by modules if it did not run."""
    header = ["model", "bits", "predicted", "overlapping", "measured", "overlapping", "aim"]
    measured = {(row["model"], row["bits"]): row for row in rows_of(results, "decode")}
    lines = []
    for it in DECODED:
        row = measured.get((it.model, it.bits), {})
        rates = [row.get(name) for name in ("tokens_per_second", "overlapping")]
        shown = [f"{rate:.0f}" if rate else "" for rate in rates]
        if rates[0] and not row.get("by_modules"):
            shown[0] += " by modules"
        numbers = [it.bits, it.predicted, it.overlapping or ""]
        lines.append([it.model, *map(str, numbers), *shown, str(it.aim)])
    return markdown(header, lines)


def blocks(results: Results) -> str:
    """Seconds a block of a quantization, by stage, and what a whole model takes; nothing where not
    both settings were measured."""
    found: dict[str, tuple[Run, Row]] = {}
    for run in results.get("blocks", []):
        # The first of a setting also takes what is done once in a process: the last one counts.
        of_run = {
            row["setting"]: (run, row)
            for row in run["rows"]
            if row.get("activations", "device") == "device"
        }
        found = of_run | found
    if not set(SETTINGS) <= set(found):
        return ""
    (run, fast), (other, default) = found["fast"], found["default"]
    both = (fast, default)
    counts = " and ".join(dict.fromkeys(str(row["blocks"]) for row in both))
    named = "; ".join(dict.fromkeys(map(ran_on, (run, other))))
    seconds = [f"{row['seconds'] / row['blocks'] * 32:.0f} s" for row in both]
    memory = [f"{row['memory'] / 2**30:.1f}" for row in both]
    return (
        f"LLaMA-7B's shape with random weights on an {gpu(run)}, {fast['tokens'] // SEQLEN} x "
        f"{SEQLEN} tokens, 4 bits in groups of 128, activations\non the GPU: seconds a block, of a "
        f"run of {counts}\n(`python -m benchmarks.gpu measure blocks`; {named}).\n"
        f"{_whole(results, seconds)}\n\n{_stages(both)}\n\n"
        f"The most that torch's allocator held was {memory[0]} and {memory[1]} GiB."
    )


def _stages(rows: Rows) -> str:
    """A column for each row of results, of `--quality fast` and of the defaults."""
    lines = [
        [stage, *(_seconds(row[stage], row) if stage in row else "" for row in rows)]
        for stage in STAGES
    ]
    rest = [row["seconds"] - sum(row.get(stage, 0) for stage in STAGES) for row in rows]
    lines.append(["reading, packing, journal, all else", *map(_seconds, rest, rows)])
    lines.append(["all", *(_seconds(row["seconds"], row) for row in rows)])
    return markdown(["stage", "`--quality fast`", "defaults"], lines)


def _seconds(seconds: float, row: Row) -> str:
    """A block's."""
    return f"{seconds / row['blocks']:.2f}"


def _whole(results: Results, estimates: Sequence[str]) -> str:
    """What all 32 blocks took, or would take."""
    whole = [
        f"{row['seconds']:.0f} s with {SETTINGS[row['setting']]}, activations on the "
        f"{row['activations']}"
        for row in rows_of(results, "quantization")
    ]
    if whole:
        return f"All 32 blocks took {'; '.join(whole)}."
    return (
        f"32 such blocks would take {estimates[0]} with {SETTINGS['fast']} and {estimates[1]} with "
        f"{SETTINGS['default']}; a run of all 32\nhas not been measured."
    )


def speed(results: Results, language: str) -> str:
    """The README's line of speed."""
    rows = {row["rows"]: row for _, row in _wide(results) if row["bits"] == 4}
    run = results["kernels"][0]
    times = [(n, f"{faster(rows[n]):.2f}") for n in TOLD if n in rows]
    tokens = {
        row["bits"]: f"{row['tokens_per_second']:.0f}"
        for row in rows_of(results, "decode")
        if row["model"] == "llama" and row["tokens_per_second"]
    }
    link = "[docs/cuda.md](docs/cuda.md#measured)"
    decoded = ""
    if language == "zh":
        named = "、".join(f"{n} 行 {it}" for n, it in times)
        if 4 in tokens:
            dense = f"，float16 为 {tokens[16]}" if 16 in tokens else ""
            decoded = f"。\n  LLaMA-7B 形状的模型每秒解码 {tokens[4]} 个 token{dense}"
        return (
            f"- GPU 速度（{gpu(run)}，4 位，8192 x 8192）：torch float16 乘法与本项目的用时之比："
            f"{named}{decoded}：{link}。"
        )
    named = ", ".join(f"{it} at {n}" for n, it in times)
    if 4 in tokens:
        dense = f",\n  in float16 {tokens[16]}" if 16 in tokens else ""
        decoded = f". A model of LLaMA-7B's shape decodes {tokens[4]} tokens/s{dense}"
    return (
        f"- Speed on a GPU ({gpu(run)}, 4 bits, 8192 x 8192): the time of torch's float16 product "
        f"over ours, by rows,\n  is {named}{decoded}: {link}."
    )


def limits(results: Results, language: str) -> str:
    """The README's line of limits."""
    name = gpu(results["kernels"][0])
    if language == "zh":
        line = f"- CUDA 与 Triton 算子只在一种 GPU（{name}）上运行过。"
        found = slower(results)
        if found is None:
            return line
        counts, all_from, times = found
        named = f"{counts[0]} 行及以上" if all_from else f"{'、'.join(map(str, counts))} 行"
        return f"{line}4 位时，{named} torch 的 float16 乘法更快，最多 {times:.1f} 倍。"
    line = f"- The CUDA and Triton kernels have run on one kind of GPU, an {name}."
    behind = _slower(results)
    return line if behind is None else f"{line}\n  {behind}"


# The parts of each page, by their names between its markers.
PAGES: dict[str, dict[str, Callable[[Results], str]]] = {
    "docs/cuda.md": {
        "about": about,
        "kernels": kernel_tables,
        "rates": rates,
        "decode": lambda results: decode_table(rows_of(results, "decode")),
        "token": token,
        "predicted products": predicted_products,
        "predicted tokens": predicted_tokens,
    },
    "docs/speed.md": {"gpu": blocks},
    "README.md": {
        "gpu speed": lambda results: speed(results, "en"),
        "gpu limits": lambda results: limits(results, "en"),
    },
    "README.zh.md": {
        "gpu speed": lambda results: speed(results, "zh"),
        "gpu limits": lambda results: limits(results, "zh"),
    },
}


def main(arguments: list[str]) -> int:
    path = Path(arguments[0]) if arguments else DEFAULT
    try:
        if not path.exists():
            raise UserError("there is no such file")
        results = read(path)
        made = {
            page: {name: text(results) for name, text in parts.items()}
            for page, parts in PAGES.items()
        }
        for page, parts in made.items():
            write(ROOT / page, parts)
    except (OSError, ValueError, KeyError, UserError) as error:
        print(f"error: {path}: {error}; measure with benchmarks/gpu.sh", file=sys.stderr)
        return 2
    print(f"{', '.join(PAGES)}: written from {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
