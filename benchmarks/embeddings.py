"""What packing the embedding and the output head alone costs, in nats a token.

    python -m benchmarks.embeddings [MODEL] [--bits 8 4] [--windows N]

All other weights stay as they are, so that nothing hides the difference.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.common.assets import model_path, text_path
from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import ModelSource, open_model
from gptq.checkpoints.embeddings import pack_rows
from gptq.config import EMBEDDING_BITS, EMBEDDING_GROUP
from gptq.data.windows import evaluation_windows
from gptq.errors import UserError
from gptq.files.lazy import Entry, LazyTensors
from gptq.inference import perplexity
from quant_cuda import PackedWeight
from quant_cuda.reference import dequantize

CPU = torch.device("cpu")


def rounded(source: ModelSource, bits: int) -> LazyTensors:
    """The model's tensors, with the embedding and the head packed and dequantized."""
    spec, tensors = source.spec, source.tensors
    assert isinstance(tensors, LazyTensors)
    names = [name for name in (f"{spec.embed[0]}.weight", f"{spec.head}.weight") if name in tensors]
    return tensors.changed(
        {
            name: Entry(partial(_rounded, tensors, name, bits), tensors.shape(name), torch.float32)
            for name in names
        }
    )


def _rounded(tensors: LazyTensors, name: str, bits: int) -> torch.Tensor:
    weight = tensors[name]
    packed = pack_rows("x", weight, bits, sym=False)
    qweight, qzeros, scales = (packed[f"x.{key}"] for key in ("qweight", "qzeros", "scales"))
    inputs = weight.shape[1]
    stored = PackedWeight(
        qweight, qzeros, scales, None, bits, EMBEDDING_GROUP, in_features=inputs, zero_offset=0
    )
    return dequantize(stored, torch.float32).T


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
        for text, path in texts.items():
            windows = evaluation_windows(path, source.tokenizer(), 512, args.windows)
            assert isinstance(source.tensors, LazyTensors)
            full = log_perplexity(source, source.tensors, windows)
            print(f"{text}: ln perplexity {full:.5f} of the full model", flush=True)
            for bits in args.bits:
                quantized = log_perplexity(source, rounded(source, bits), windows)
                print(f"{text}: gap {quantized - full:+.5f} with {bits} bits", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
