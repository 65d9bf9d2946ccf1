"""Models of real shapes with random weights, for measuring time and memory without a download.

    python -m benchmarks.shapes llama-7b FOLDER [--blocks N]

Random weights say nothing of quality. Tokens are bytes, whatever the size of the vocabulary.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    BloomConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from gptq.blockwise import empty_model
from gptq.errors import UserError
from gptq.files.atomic import whole_folder
from gptq.files.lazy import Entry, LazyTensors
from gptq.files.safetensors_file import shards, write_tensors
from gptq.models import SPECS

SHARD_BYTES = 2_000_000_000
STD = 0.02


def _llama(
    hidden: int, intermediate: int, blocks: int, heads: int, key_heads: int | None = None
) -> PretrainedConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=heads if key_heads is None else key_heads,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )


def _bloom(vocabulary: int, hidden: int, blocks: int, heads: int) -> PretrainedConfig:
    return BloomConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        n_layer=blocks,
        n_head=heads,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )


# Touvron et al. 2023, arXiv 2302.13971, table 2, and 2307.09288; BigScience 2022, arXiv 2211.05100,
# table 3.
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama-7b": partial(_llama, 4096, 11008, 32, 32),
    "llama-13b": partial(_llama, 5120, 13824, 40, 40),
    "llama-70b": partial(_llama, 8192, 28672, 80, 64, 8),
    "bloom-560m": partial(_bloom, 250880, 1024, 24, 16),
    "bloom-7b1": partial(_bloom, 250880, 4096, 30, 32),
    "bloom-176b": partial(_bloom, 250880, 14336, 70, 112),
    # For tests: a block is 50 thousand weights.
    "llama-tiny": partial(_llama, 64, 96, 2, 4),
    "bloom-tiny": partial(_bloom, 320, 64, 2, 4),
}


def write_model(folder: Path, shape: str, blocks: int | None = None) -> Path:
    """Write a Hugging Face folder of this shape in float16 and return it; it must be new.

    blocks: that many instead of the shape's own. Weights are the same in every run, and a block's
        do not depend on how many there are. One tensor at a time is in memory.
    Raises UserError for a shape that is not known or a folder that cannot be written.
    """
    if shape not in SHAPES:
        raise UserError(f"no shape is called {shape}: use one of {', '.join(SHAPES)}")
    if folder.exists():
        raise UserError(f"{folder}: exists; give a new folder, or delete it")
    config = SHAPES[shape]()
    if blocks is not None:
        config.num_hidden_layers = blocks
    config.dtype = torch.float16
    tensors = _random(config)
    with whole_folder(folder) as temporary:
        parts = list(shards(tensors, list(tensors), SHARD_BYTES))
        weight_map: dict[str, str] = {}
        for number, names in enumerate(parts, start=1):
            file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            write_tensors(temporary / file, tensors, names, {"format": "pt"})
            weight_map |= dict.fromkeys(names, file)
        total = sum(map(tensors.nbytes, tensors))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
        config.architectures = [SPECS[config.model_type].architecture]
        config.save_pretrained(temporary)
        _byte_tokenizer().save_pretrained(temporary)
    return folder


def _random(config: PretrainedConfig) -> LazyTensors:
    """Every tensor of a model of this configuration, made when it is read."""
    model = empty_model.build(config, SPECS[config.model_type], torch.device("cpu"))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    return LazyTensors(
        {
            name: Entry(partial(_tensor, name, shape), shape, torch.float16)
            for name, shape in shapes.items()
        }
    )


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = torch.empty(shape, dtype=torch.float16)
    if "norm" in name or ".ln_f" in name:
        return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return tensor.normal_(std=STD, generator=generator)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Special tokens 0 and 1, and one token for each byte."""
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, metavar="N", help="instead of the shape's own number")
    arguments = parser.parse_args()
    try:
        print(write_model(arguments.folder, arguments.shape, arguments.blocks))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
