"""The tokenizer of a model's folder or .gguf file, with the quirks of each."""

import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from gptq.blockwise.weight_files import read_json
from gptq.errors import UserError, first_line

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# LLaMA's special tokens; its earliest conversions left them empty.
_LLAMA_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# How byte-level tokenizers split text before merging, by llama.cpp's names. All of these give the
# same tokens as GPT-2's: vocabularies that have digits one by one have no merges of them.
_LIKE_GPT2 = ("gpt-2", "mpt", "olmo", "exaone4", "smollm", "starcoder", "refact")
# llama.cpp's types of tokens that text is searched for, before it is split.
_CONTROL, _USER_DEFINED = 3, 4
_ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
# Those that transformers knows by another name only.
_KNOWN_AS = {"stablelm2": "qwen2", "glm4": "llama-bpe", "chatglm-bpe": "llama-bpe"}


def open_tokenizer(
    folder: Path, gguf: str | None, config: PretrainedConfig
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or in the .gguf file of that name in it.

    Raises UserError if there is none or it cannot be read.
    """
    where = folder if gguf is None else folder / gguf
    if gguf is None and not any((where / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"no tokenizer in {where} (none of {', '.join(_TOKENIZER_FILES)}): copy the "
            "tokenizer's files there"
        )
    try:
        if gguf is not None:
            return _gguf_tokenizer(folder, gguf, config)
        return _folder_tokenizer(folder, config)
    except UserError:
        raise
    # Damaged tokenizer files make the libraries raise almost anything.
    except Exception as error:
        mend = "copy its files again"
        # transformers 5.17 goes by the architecture that a .gguf file names, later versions by the
        # kind of its tokenizer.
        if gguf is not None and not _splittings():
            mend = f"install transformers 5.18 or later, this is {transformers.__version__}"
        raise UserError(
            f"the tokenizer in {where} cannot be read ({first_line(error)}): {mend}"
        ) from error


def _gguf_tokenizer(folder: Path, name: str, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=name)
    # transformers 5.17 mixes up which special token is which; the file's header says.
    for kind in ("bos", "eos", "pad", "unk"):
        number = getattr(config, f"{kind}_token_id", None)
        if number is not None:
            setattr(tokenizer, f"{kind}_token", tokenizer.convert_ids_to_tokens(number))
    restore_byte_level(tokenizer, folder / name)
    return tokenizer


def restore_byte_level(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Give a byte-level tokenizer what the .gguf file says of it and transformers has not taken."""
    # Only here: that format's package is read for nothing else.
    from gptq.files.gguf_file import read_header

    values = read_header(path, arrays=True).metadata
    if values.get("tokenizer.ggml.model") != "gpt2":
        return
    _restore_added_tokens(tokenizer, values)
    splits = _splittings()
    backend = tokenizer.backend_tokenizer
    # transformers 5.17 makes LLaMA's from parts of sentencepiece's: the decoder drops a leading
    # space.
    if backend.model.byte_fallback:
        backend.model.byte_fallback = False
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    name = str(values.get("tokenizer.ggml.pre", "default"))
    if name in ("default", *_LIKE_GPT2, *splits):
        return
    # 5.17 goes by the architecture: text of Qwen's is split by their own rule.
    if name == "qwen2" and not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    known_as = _KNOWN_AS.get(name)
    if known_as in splits:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import set_split_regex

        set_split_regex(tokenizer, {"pre_tokenizer_type": known_as})
        return
    warnings.warn(
        f"{path}: how its tokenizer splits text before merging ('{name}') is not known to "
        f"transformers {transformers.__version__}: some texts become other tokens than in "
        "llama.cpp",
        stacklevel=2,
    )


def _restore_added_tokens(tokenizer: PreTrainedTokenizerFast, values: Mapping[str, Any]) -> None:
    """Make the added tokens of a byte-level tokenizer those of the .gguf file.

    transformers takes text with other signs than those that stand for bytes, as "    " or
    "<｜User｜>", for no added token, and has "<|endoftext|>" of GPT-2 beyond the file's last.
    """
    tokens = list(values.get("tokenizer.ggml.tokens") or ())
    kinds = values.get("tokenizer.ggml.token_type") or ()
    own = {
        number: {**_ADDED, "id": number, "content": text, "special": kind == _CONTROL}
        for number, (text, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in (_CONTROL, _USER_DEFINED)
    }
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    known = {it["id"]: it for it in state["added_tokens"]}
    added = {**own, **{number: it for number, it in known.items() if number < len(tokens)}}
    if added == known:
        return
    vocabulary = {text: it for text, it in state["model"]["vocab"].items() if it not in added}
    vocabulary |= {it["content"]: number for number, it in added.items()}
    for number in set(range(len(tokens))) - set(vocabulary.values()):
        vocabulary[tokens[number]] = number
    state["model"]["vocab"] = vocabulary
    state["added_tokens"] = [added[number] for number in sorted(added)]
    # No added token can be taken away from a tokenizer that is there.
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _splittings() -> Collection[str]:
    """The names of splittings that transformers knows: none before 5.18."""
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return {}
    return GGUF_PRE_TOKENIZER_SPLITS


def _folder_tokenizer(folder: Path, config: PretrainedConfig) -> PreTrainedTokenizerBase:
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    if config.model_type == "llama":
        tokens: dict[str, Any] = {
            name: token for name, token in _LLAMA_TOKENS.items() if settings.get(name) == ""
        }
        if not (folder / "tokenizer.json").is_file() and (folder / "tokenizer.model").is_file():
            # AutoTokenizer takes another class when tokenizer_config.json is absent or has the old
            # name LLaMATokenizer, and loses the first word's leading space and the first token.
            first = settings.get("add_bos_token", True)
            return LlamaTokenizer.from_pretrained(folder, add_bos_token=first, **tokens)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **tokens)
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
