"""What packing the embedding and the output head alone costs, in nats a token.

    python -m benchmarks.embeddings [MODEL] [--bits 8 4] [--windows N]

All other weights stay as they are, so that nothing hides the difference. The head is rounded, and
solved for its inputs as a run solves it at 4 bits, calibrated on 16 windows of 512 tokens of web
pages that nothing is judged on.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.assets import model_path, text_path
from gptq.blockwise.activations import batches, embed
from gptq.blockwise.model import BlockwiseModel, free
from gptq.blockwise.source import ModelSource, open_model
from gptq.checkpoints.embeddings import Solve, pack_rows
from gptq.config import EMBEDDING_BITS, EMBEDDING_GROUPS, QuantConfig
from gptq.data.windows import calibration_windows, evaluation_windows
from gptq.errors import UserError
from gptq.files.lazy import Entry, LazyTensors
from gptq.inference import perplexity
from gptq.pipeline.head import head_hessian, head_solver
from gptq.solver.hessian import Hessian
from quant_cuda import PackedWeight
from quant_cuda.reference import dequantize

CPU = torch.device("cpu")
CALIBRATION, SEQLEN = 16, 512


def quantized(source: ModelSource, bits: int, solve: Solve | None) -> LazyTensors:
    """The model's tensors, with the embedding and the head packed and dequantized."""
    spec, tensors = source.spec, source.tensors
    assert isinstance(tensors, LazyTensors)
    # The last is the head, which may be the embedding too.
    names = [name for name in (f"{spec.embed[0]}.weight", f"{spec.head}.weight") if name in tensors]
    solvers = {name: None if name != names[-1] else solve for name in names}
    return tensors.changed(
        {
            name: Entry(
                partial(_quantized, tensors, name, bits, solvers[name]),
                tensors.shape(name),
                torch.float32,
            )
            for name in names
        }
    )


def _quantized(tensors: LazyTensors, name: str, bits: int, solve: Solve | None) -> torch.Tensor:
    weight = tensors[name]
    packed = pack_rows("x", weight, bits, sym=False, solve=solve)
    qweight, qzeros, scales = (packed[f"x.{key}"] for key in ("qweight", "qzeros", "scales"))
    inputs, size = weight.shape[1], EMBEDDING_GROUPS[bits]
    stored = PackedWeight(
        qweight, qzeros, scales, None, bits, size, in_features=inputs, zero_offset=0
    )
    return dequantize(stored, torch.float32).T


@torch.no_grad()
def statistics(source: ModelSource, text: Path) -> Hessian:
    """Of the full head's inputs, over windows of the second half of a text."""
    content = text.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder, "half.txt")
        half.write_text(content[len(content) // 2 :], encoding="utf-8")
        windows = calibration_windows(half, source.tokenizer(), CALIBRATION, SEQLEN, seed=0)
    model = BlockwiseModel.from_source(source, CPU, torch.float32)
    activations = embed(model, batches(windows, CPU))
    for index in range(model.block_count):
        block = model.load_block(index)
        activations.through(block)
        free(block.module)
    hessian = head_hessian(model, activations, QuantConfig())
    assert hessian is not None
    return hessian


def log_perplexity(source: ModelSource, tensors: LazyTensors, windows: torch.Tensor) -> float:
    model = replace(BlockwiseModel.from_source(source, CPU, torch.float32), tensors=tensors)
    return math.log(perplexity.perplexity(model, windows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.embeddings", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("model", nargs="?", help="default: SmolLM2-135M")
    parser.add_argument("--bits", nargs="+", type=int, choices=EMBEDDING_BITS[:-1], default=[8, 4])
    parser.add_argument(
        "--windows", type=int, default=10, help="of 512 tokens a text (default: 10)"
    )
    args = parser.parse_args(argv)
    try:
        source = open_model(args.model or model_path())
        texts: dict[str, Path] = {name: text_path(name) for name in ("wiki", "c4")}
        hessian = statistics(source, texts["c4"])
        for text, path in texts.items():
            windows = evaluation_windows(path, source.tokenizer(), SEQLEN, args.windows)
            assert isinstance(source.tensors, LazyTensors)
            full = log_perplexity(source, source.tensors, windows)
            print(f"{text}: ln perplexity {full:.5f} of the full model", flush=True)
            for bits in args.bits:
                solve = head_solver(hessian, QuantConfig(), bits)
                for how, solver in (("rounded", None), ("head solved", solve)):
                    found = log_perplexity(source, quantized(source, bits, solver), windows)
                    print(f"{text}: gap {found - full:+.5f} with {bits} bits, {how}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
