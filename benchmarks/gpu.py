"""Kernels, decoding and quantization on the GPU of this machine; run by benchmarks/gpu.sh.

    python -m benchmarks.gpu check      a few products against float64, for compute-sanitizer
    python -m benchmarks.gpu measure    a table, and benchmarks/results/<gpu>.json

Weights are random and made on the device. A kernel is timed as a CUDA graph of calls that go
through more weights than the second-level cache holds.
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BloomConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

import quant_cuda
from gptq.config import QuantConfig
from gptq.decode import stepper
from gptq.models import ModelSpec
from gptq.models.bloom import BLOOM
from gptq.models.llama import LLAMA
from gptq.qlinear import QuantLinear
from gptq.skeleton import build, replace
from gptq.solver import solve
from quant_cuda import PackedWeight, cuda, gpu, reference, tiles
from quant_cuda.packing import pack_zeros, words_for

RESULTS = Path(__file__).parent / "results"
GROUP_SIZE = 128
SHAPE = (8192, 8192)
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
COLD_BYTES = 512 << 20  # ten times the second-level cache of an H100
REPEATS = 5
DECODED = 128
# The shapes of BELLE-LLAMA-7B and of BELLE-7B (BLOOMZ).
SEVEN_BILLION: tuple[tuple[ModelSpec, PretrainedConfig], ...] = (
    (LLAMA, LlamaConfig(vocab_size=49954, tie_word_embeddings=False)),
    (BLOOM, BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32)),
)


def random_weight(bits: int, inputs: int, outputs: int, device: str) -> PackedWeight:
    """Random integers, zero points and scales, the weight's mean near zero."""
    groups = -(-inputs // GROUP_SIZE)
    shape = (words_for(inputs, bits), outputs)
    words = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int64, device=device)
    middle = 2 ** (bits - 1)
    zeros = torch.randint(middle - 1, middle + 2, (groups, outputs), device=device)
    scales = torch.rand((groups, outputs), device=device) + 0.5
    return PackedWeight(
        qweight=words.to(torch.int32),
        qzeros=pack_zeros(zeros, bits, 1),
        scales=(scales * 0.04 / 2**bits).half(),
        g_idx=None,
        bits=bits,
        group_size=GROUP_SIZE,
        in_features=inputs,
    )


def random_model(
    spec: ModelSpec, config: PretrainedConfig, bits: int, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """A model of this shape whose layers hold random numbers, or for bits < 16 random integers."""
    model = build(config, spec, torch.device(device))
    names = {
        f"{spec.block(i)}.{name}" for i in range(_blocks(config)) for g in spec.groups for name in g
    }
    for name, module in list(model.named_modules()):
        if name in names and bits < 16:
            assert isinstance(module, nn.Linear)
            layer = QuantLinear(
                module.in_features,
                module.out_features,
                bits,
                GROUP_SIZE,
                bias=module.bias is not None,
                g_idx=False,
                device=device,
            )
            made = random_weight(bits, module.in_features, module.out_features, device)
            layer.qweight, layer.qzeros, layer.scales = made.qweight, made.qzeros, made.scales
            replace(model, name, layer)
            continue
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:
                numbers = torch.randn(parameter.shape, device=device, dtype=dtype) * 0.02
                numbers = 1 + numbers if parameter.dim() == 1 and key == "weight" else numbers
                module._parameters[key] = nn.Parameter(numbers, requires_grad=False)
    model.tie_weights()
    return model


def _blocks(config: PretrainedConfig) -> int:
    return config.num_hidden_layers


def time_graph(calls: list[Callable[[], Any]]) -> float:
    """Seconds a call, the median of REPEATS replays of all of them in one graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    seconds = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(stop) / 1e3 / len(calls))
    return statistics.median(seconds)


def limits() -> dict[str, float]:
    """Bytes a second of a copy, read and written, and FLOP a second of cuBLAS in float16."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copied = time_graph([lambda: target.copy_(source)] * 4)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    b = torch.empty_like(a)
    multiplied = time_graph([lambda: torch.mm(a, a, out=b)] * 4)
    return {"copy": 2 * source.nbytes / copied, "matrix": 2 * 8192**3 / multiplied}


def kernels(bits: int) -> list[dict[str, Any]]:
    """Times of one product of SHAPE for each number of rows, by each way to take it."""
    inputs, outputs = SHAPE
    count = max(4, COLD_BYTES // (inputs * outputs * bits // 8))
    weights = [random_weight(bits, inputs, outputs, "cuda") for _ in range(count)]
    tiled = [tiles.prepack(weight) for weight in weights]
    plain = [tiles.plain(weight) for weight in weights[:4]]
    dense = [torch.randn(outputs, inputs, device="cuda", dtype=torch.float16) for _ in range(4)]
    stored = sum(t.nbytes for t in gpu.prepare(weights[0]).tensors)
    del weights
    found = []
    for rows in ROWS:
        x = torch.randn(rows, inputs, device="cuda", dtype=torch.float16)
        row: dict[str, Any] = {"bits": bits, "rows": rows}
        for name, calls in _ways(x, tiled, plain, dense).items():
            row[name] = _time_with(name, calls)
        row["bytes"] = stored + x.nbytes + 2 * rows * outputs
        row["flop"] = 2 * rows * inputs * outputs
        found.append(row)
    return found


def _ways(
    x: Tensor, tiled: list[tiles.Prepacked], plain: list[tiles.Plain], dense: list[Tensor]
) -> dict[str, list[Callable[[], Tensor]]]:
    """Calls for each way of taking the product, as far as it is meant for so many rows."""

    def written_out(weight: tiles.Prepacked) -> Tensor:
        return x @ cuda.dequantize(weight, x.dtype)

    ways = {
        "cublas_fp16": [partial(nn.functional.linear, x, w) for w in dense],
        "dense": [partial(written_out, w) for w in tiled[:8]],
    }
    if len(x) <= 2048:
        ways["fused"] = [partial(cuda.matmul, x, w) for w in tiled]
    if len(x) <= 8:
        ways["legacy_style"] = [partial(cuda.matmul, x, w) for w in plain]
    if "triton" in gpu.engines() and len(x) <= 256:
        from quant_cuda import triton_kernels

        ways["triton"] = [partial(triton_kernels.matmul, x, w) for w in tiled[:8]]
    return cast(dict[str, list[Callable[[], Tensor]]], ways)


def _time_with(name: str, calls: list[Callable[[], Tensor]]) -> float:
    """`time_graph`, the fused kernels for any number of rows."""
    before = cuda.DENSE_ROWS
    try:
        cuda.DENSE_ROWS = 1 << 30 if name == "fused" else before
        return time_graph(calls)
    finally:
        cuda.DENSE_ROWS = before


@torch.no_grad()
def decode() -> list[dict[str, Any]]:
    """Tokens a second at batch 1 from a captured graph, and memory, of 7B-shaped models."""
    found = []
    for spec, config in SEVEN_BILLION:
        for bits in (16, 8, 4):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            model = random_model(spec, config, bits, "cuda", torch.float16)
            step = stepper(model, DECODED)
            token = torch.full((1, 1), 7, device="cuda")
            seconds = []
            for _ in range(DECODED - 1):
                torch.cuda.synchronize()
                started = perf_counter()
                logits = step(token)
                torch.cuda.synchronize()
                seconds.append(perf_counter() - started)
            assert bool(torch.isfinite(logits).all()), "decoding gave numbers that are not finite"
            found.append(
                {
                    "model": spec.model_type,
                    "bits": bits,
                    "tokens_per_second": 1 / statistics.median(seconds),
                    "memory": torch.cuda.memory_allocated(),
                    "peak_memory": torch.cuda.max_memory_allocated(),
                }
            )
            del model, step
    return found


def quantization() -> list[dict[str, Any]]:
    """Seconds to solve one layer of each shape of a LLaMA-7B block, those of one input together."""
    found: list[dict[str, Any]] = []
    for inputs, outputs in ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096)):
        x = torch.randn(2 * inputs, inputs, device="cuda")
        H = x.T @ x / len(x)
        W = torch.randn(outputs, inputs, device="cuda") * 0.02
        for search in ("minmax", "hessian"):
            config = QuantConfig(bits=4, group_size=GROUP_SIZE, scale_search=search)
            torch.cuda.synchronize()
            started = perf_counter()
            solve(W, H, config)
            torch.cuda.synchronize()
            shape = {"inputs": inputs, "outputs": outputs, "search": search}
            found.append({**shape, "seconds": perf_counter() - started})
    return found


def check() -> None:
    """A few products of each kernel against float64; raises where one is wrong."""
    for engine in gpu.engines():
        for bits in (2, 3, 4, 8):
            weight = random_weight(bits, 640, 80, "cuda")
            exact = reference.dequantize(weight, torch.float64)
            for rows in (1, 8, 20, 70, 300):
                x = torch.randn(rows, 640, device="cuda", dtype=torch.float16)
                y = quant_cuda.matmul(x, quant_cuda.prepare(weight, engine), engine)
                naive = x @ exact.half()
                truth = x.double() @ exact
                error, limit = ((t.double() - truth).norm() for t in (y, naive))
                assert error <= 2 * limit + 5e-4 * truth.norm(), (engine, bits, rows)
    torch.cuda.synchronize()
    print("products agree with float64")


def measure(console: Console) -> Path:
    properties = torch.cuda.get_device_properties(0)
    known = limits()
    result: dict[str, Any] = {
        "gpu": properties.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "shape": SHAPE,
        "group_size": GROUP_SIZE,
        "limits": known,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (re.sub(r"[^a-z0-9]+", "-", properties.name.lower()).strip("-") + ".json")
    console.print(f"{properties.name}: copy {known['copy'] / 1e9:.0f} GB/s, ", end="")
    console.print(f"cuBLAS float16 {known['matrix'] / 1e12:.0f} TFLOP/s")
    for name, part in (
        ("kernels", lambda: kernels(4) + kernels(8)),
        ("decode", decode),
        ("quantization", quantization),
    ):
        result[name] = part()
        console.print(table(name, result[name], known))
        # After each part: what was measured is kept should a later part fail.
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def table(name: str, rows: list[dict[str, Any]], known: dict[str, float]) -> Table:
    """One line a row; kernels' times in microseconds, with their share of the limits."""
    made = Table(title=name)
    if name != "kernels":
        for key in rows[0]:
            made.add_column(key)
        for row in rows:
            made.add_row(*(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()))
        return made
    ways = ("fused", "dense", "triton", "legacy_style", "cublas_fp16")
    for key in ("bits", "rows", *(f"{way} us" for way in ways), "copy rate", "matrix rate"):
        made.add_column(key)
    for row in rows:
        times = [f"{1e6 * row[way]:.1f}" if way in row else "" for way in ways]
        best = min(row[way] for way in ("fused", "dense") if way in row)
        shares = (row["bytes"] / best / known["copy"], row["flop"] / best / known["matrix"])
        made.add_row(str(row["bits"]), str(row["rows"]), *times, *(f"{s:.0%}" for s in shares))
    return made


def main(arguments: list[str]) -> int:
    if not torch.cuda.is_available():
        print("error: torch finds no GPU here; run this where there is one", file=sys.stderr)
        return 2
    if "cuda" not in gpu.engines():
        print("error: no CUDA kernels; run benchmarks/gpu.sh, which builds them", file=sys.stderr)
        return 2
    if arguments == ["check"]:
        check()
        return 0
    if arguments == ["measure"]:
        console = Console()
        console.print(f"written to {measure(console)}")
        return 0
    print("error: say check or measure: python -m benchmarks.gpu measure", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
