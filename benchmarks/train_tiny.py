"""Small models of any architecture, trained on real text in about a minute each on two cores.

Random weights say little about quantization: their layers have no structure to lose. These models
have learned enough for rounding to hurt, and come with a part of the text they have never seen.

    python -m benchmarks.train_tiny ARCHITECTURE [--size tiny|small] [--steps N] [--cache FOLDER]
"""

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from benchmarks.common.assets import DEFAULT_CACHE, TEXTS, text_path
from gptq.errors import UserError
from gptq.files.atomic import whole_folder
from gptq.models import SPECS

END_OF_TEXT = "<|endoftext|>"
HELD_OUT = 0.1
SEQLEN = 256


@dataclass(frozen=True)
class Recipe:
    """All that decides what a trained model is; a model is trained again when any of it changes."""

    arch: str
    hidden: int
    intermediate: int
    """Width inside the MLP; BLOOM fixes it at four times `hidden`."""
    blocks: int
    heads: int
    kv_heads: int
    """Key and value heads; BLOOM has as many as query heads."""
    vocab: int
    steps: int
    batch: int = 2
    seqlen: int = SEQLEN
    lr: float = 5e-3
    init_std: float = 0.02
    warmup: int = 40
    weight_decay: float = 0.1
    seed: int = 0
    version: int = 1
    """Raised when the code below changes what comes out."""

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:8]


# A minute on two cores is few steps and few tokens. Models this narrow are the ones that get past
# word frequencies in it, and fill their weights, so that rounding costs something. 224 = 128 + 96
# and 1056 = 8 x 128 + 32 leave the last group of 128 short.
RECIPES = {
    ("llama", "tiny"): Recipe("llama", 64, 224, 4, 2, 1, vocab=512, steps=3000),
    ("bloom", "tiny"): Recipe("bloom", 64, 256, 4, 2, 2, vocab=512, steps=3000, init_std=0.08),
    ("llama", "small"): Recipe("llama", 384, 1056, 8, 12, 4, vocab=4096, steps=1500, lr=2e-3),
    ("bloom", "small"): Recipe("bloom", 384, 1536, 8, 12, 12, vocab=4096, steps=1500, lr=2e-3),
}
# Architectures whose blocks see a window of the text: one that is shorter than a training window.
WINDOWS: dict[str, dict[str, object]] = {
    **{
        name: {"sliding_window": SEQLEN // 4}
        for name in ("mistral", "olmo3", "exaone4", "gemma2", "gemma3_text")
    },
    **{
        name: {"sliding_window": SEQLEN // 4, "use_sliding_window": True, "max_window_layers": 2}
        for name in ("qwen2", "qwen3")
    },
}


def recipe_of(arch: str, size: str = "tiny") -> Recipe:
    """The recipe of an architecture: LLaMA's own, if it has none. Raises UserError for others."""
    if arch not in SPECS or (SPECS[arch].script, size) not in RECIPES:
        names, sizes = ", ".join(SPECS), ", ".join(sorted({size for _, size in RECIPES}))
        raise UserError(f"no recipe for {arch} {size}: use one of {names}; of size {sizes}")
    return replace(RECIPES[SPECS[arch].script, size], arch=arch)


def tiny_model(
    arch: str,
    cache: Path = DEFAULT_CACHE,
    *,
    size: str = "tiny",
    steps: int | None = None,
) -> Path:
    """A Hugging Face folder with a trained model, its tokenizer, `train.txt` and `heldout.txt`.

    arch is a key of `gptq.models.SPECS`, size `tiny` (a quarter of a million parameters) or `small`
    (about 15 million). Trained on the first call and found in `cache` after that; processes that
    ask for the same model at the same time train it once. Raises UserError for an unknown arch or
    size, or if the text cannot be fetched.
    """
    recipe = recipe_of(arch, size)
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    folder = cache / f"{size}-{arch}-{recipe.key}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            train_text, heldout_text = split_text(cache)
            with whole_folder(folder) as unfinished:
                (unfinished / "train.txt").write_text(train_text, encoding="utf-8")
                (unfinished / "heldout.txt").write_text(heldout_text, encoding="utf-8")
                train(recipe, unfinished)
    return folder


def split_text(cache: Path) -> tuple[str, str]:
    """(train, held out): the first 90% of the lines of each text, and the rest of them."""
    train: list[str] = []
    heldout: list[str] = []
    for name in TEXTS:
        lines = text_path(name, cache).read_text(encoding="utf-8").splitlines(keepends=True)
        lines = [line for line in lines if not line.startswith(("<doc ", "</doc>"))]
        ends = torch.tensor([len(line) for line in lines]).cumsum(0)
        cut = int((ends <= (1 - HELD_OUT) * ends[-1]).sum())
        train += lines[:cut]
        heldout += lines[cut:]
    return "".join(train), "".join(heldout)


def train(recipe: Recipe, folder: Path) -> None:
    """Train a tokenizer and a model on `folder/train.txt` and save both into `folder`."""
    text = (folder / "train.txt").read_text(encoding="utf-8")
    tokenizer = _train_tokenizer(text, recipe)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _new_model(recipe).train()
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=recipe.lr,
            betas=(0.9, 0.95),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr(step, recipe))
        for windows in _batches(ids, recipe):
            loss = model(input_ids=windows, labels=windows, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    tokenizer.save_pretrained(folder)
    model.eval().save_pretrained(folder)


def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> float:
    """exp of the mean cross entropy over windows of SEQLEN that do not overlap; tail dropped."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    windows = ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    with torch.inference_mode():
        losses = [
            float(model(input_ids=part, labels=part, use_cache=False).loss) * len(part)
            for part in windows.split(8)
        ]
    return math.exp(sum(losses) / len(windows))


def _train_tokenizer(text: str, recipe: Recipe) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def _new_model(recipe: Recipe) -> PreTrainedModel:
    sizes: dict[str, object] = {
        "vocab_size": recipe.vocab,
        "hidden_size": recipe.hidden,
        "initializer_range": recipe.init_std,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if recipe.arch == "bloom":
        sizes |= {"n_layer": recipe.blocks, "n_head": recipe.heads}
    else:
        sizes |= {
            "intermediate_size": recipe.intermediate,
            "num_hidden_layers": recipe.blocks,
            "num_attention_heads": recipe.heads,
            "num_key_value_heads": recipe.kv_heads,
            "max_position_embeddings": recipe.seqlen,
        }
    if recipe.arch == "llama":
        sizes |= {"tie_word_embeddings": True}
    elif recipe.arch != "bloom":
        # Some have a width of heads, or a padding token, that such a model has no room for.
        sizes |= {"head_dim": recipe.hidden // recipe.heads, "pad_token_id": 0}
    sizes |= WINDOWS.get(recipe.arch, {})
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(recipe.arch, **sizes))


def _lr(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero; a share of recipe.lr."""
    rise = min(1.0, (step + 1) / recipe.warmup)
    return rise * 0.5 * (1 + math.cos(math.pi * min(1.0, step / recipe.steps)))


def _batches(ids: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """int64 [batch, seqlen] windows that begin anywhere in ids (int64 [tokens])."""
    offsets = torch.arange(recipe.seqlen)
    for _ in range(recipe.steps):
        starts = torch.randint(len(ids) - recipe.seqlen, (recipe.batch, 1))
        yield ids[starts + offsets]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_tiny", description="Train a small model on real text."
    )
    parser.add_argument("arch", choices=SPECS, metavar="ARCHITECTURE", help=", ".join(SPECS))
    parser.add_argument("--size", choices=sorted({size for _, size in RECIPES}), default="tiny")
    parser.add_argument("--steps", type=int, help="optimizer steps, instead of the recipe's")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="where models are kept")
    args = parser.parse_args(arguments)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps {args.steps} is not possible: give 1 or more")
    started = time.monotonic()
    try:
        folder = tiny_model(args.arch, args.cache, size=args.size, steps=args.steps)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.monotonic() - started
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heldout = (folder / "heldout.txt").read_text(encoding="utf-8")
    print(
        f"{folder}: {model.num_parameters() / 1e6:.2f} million parameters, "
        f"held-out perplexity {perplexity(model, tokenizer, heldout):.2f}, {seconds:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
