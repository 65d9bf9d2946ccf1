"""A tokenizer as values for a .gguf file's header.

llama.cpp has two tokenizers that matter here: "llama", which is sentencepiece's BPE with bytes for
what it lacks, and "gpt2", which is byte-level BPE. For "gpt2" a name says how text is split before
merging. llama.cpp's converter recognises a splitting by a hash of the ids that one text becomes;
the text, the hashes and the names are those of its convert_hf_to_gguf.py.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from gptq.blockwise.source import ModelSource
from gptq.data.chat import BELLE_TEMPLATE
from gptq.errors import UserError

Value = bool | int | float | str | list[Any]

_PROBE = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n🚀 (normal) 😶\u200d🌫️ (multiple emojis "
    "concatenated) ✅ 🦙🦙 3 33 333 3333 33333 333333 3333333 33333333 3.3 3..3 3...3 "
    "កាន់តែពិសេសអាច😁 ?我想在apple工作1314151天～ ------======= нещо на Български "
    "''''''```````\"\"\"\"......!!!!!!?????? I've been 'told he's there, 'RE you sure? 'M not sure "
    "I'll make it, 'D you like some tea? We'Ve a'lL"
)
# SHA-256 of the ids as Python prints their list -> the name of the splitting.
_SPLITTINGS = {
    "0ef9807a4087ebef797fc749390439009c3b9eda9ad1a097abbe738f486c01e5": "llama-bpe",
    "855059429035d75a914d1eda9f10a876752e281a054a7a3d421ef0533e5b6249": "smollm",
    "3c30d3ad1d6b64202cd222813e7736c2db6e1bd6d67197090fc1211fbc612ae7": "bloom",
    "bc01ce58980e1db43859146dc51b1758b3b88729b217a74792e9f8d43e479d21": "gpt3-finnish",
    "c7ea5862a53e4272c035c8238367063e2b270d51faa48c0f09e9d5b54746c360": "poro-chat",
    "7fc505bd3104ca1083b150b17d088b59534ede9bde81f0dd2090967d7fe52cee": "viking",
    "049ecf7629871e3041641907f3de7c733e4dbfdc736f57d882ba0b0845599754": "deepseek-llm",
    "347715f544604f9118bb75ed199f68779f423cabb20db6de6f31b908d04d7821": "deepseek-coder",
    "9d032fcbd5501f4a38150912590928bfb36091efb5df11b8e2124b0390e3fb1e": "falcon3",
    "c136ed14d01c2745d4f60a9596ae66800e2b61fa45643e72436041855ad4089d": "smaug-bpe",
    "63b97e4253352e6f357cc59ea5b583e3a680eaeaf2632188c2b952de2588485e": "tekken",
    "d4540891389ea895b53b399da6ac824becc30f2fba0e9ddbb98f92e55ca0e97c": "qwen2",
    "e636dc30a262dcc0d8c323492e32ae2b70728f4df7dfe9737d9f920a282b8aea": "qwen2",
    "3ce83efda5659b07b1ad37ca97ca5797ea4285d9b9ab0dc679e4a720c9da7454": "gpt-2",
    "35d91631860c815f952d711435f48d356ebac988362536bed955d43bfa436e34": "starcoder",
    "6221ad2852e85ce96f791f476e0b390cf9b474c9e3d1362f53a24a06dc8220ff": "refact",
    "32d85c31273f8019248f2559fed492d929ea28b17e51d81d3bb36fff23ca72b3": "stablelm2",
    "b6dc8df998e1cfbdc4eac8243701a65afe638679230920b50d6f17d81c098166": "olmo",
    "a8594e3edff7c29c003940395316294b2c623e09894deebbc65f33f1515df79e": "dbrx",
    "ccc2ef013c104be7bae2965776d611e1d7a8a2a9c547dd93a682c9a9fc80352e": "gpt-4o",
    "b6e8e1518dc4305be2fe39c313ed643381c4da5db34a98f6a04c093f8afbe99b": "chatglm-bpe",
    "81d72c7348a9f0ebe86f23298d37debe0a5e71149e29bd283904c02262b27516": "chatglm-bpe",
    "a1336059768a55c99a734006ffb02203cd450fed003e9a71886c88acf24fdbc2": "glm4",
    "2085e1638f6c377a0aa4ead21b27bb4cb941bf800df86ed391011769c1758dfb": "exaone4",
    "bba3b3366b646dbdded5dbc42d59598b849371afc42f7beafa914afaa5b70aa6": "hunyuan-dense",
    "d5f1dd6f980fec569fb218a81a7658ac45fc56b38c5a0adeb1c232fbe04ef5ec": "seed-coder",
}
# What sentencepiece writes a space as.
_SPACE = "\u2581"
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
# Of tokens that no merge produces, and that text does not become.
_NO_SCORE = -1000.0
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def tokenizer_keys(source: ModelSource, count: int) -> dict[str, Value]:
    """The values by their whole keys. count: rows of the embedding.

    Those of a model that is a .gguf file itself are copied. Raises UserError for a tokenizer that
    llama.cpp cannot be told.
    """
    if source.gguf is not None:
        return _copied(source.folder / source.gguf)
    tokenizer = source.tokenizer()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(source, "has no tokenizer.json")
    described = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _unknown(source, f"is of type {model['type']}")
    tokens, types = _tokens(tokenizer, count)
    keys: dict[str, Value] = {"tokens": tokens, "token_type": types}
    if model.get("byte_fallback"):
        keys |= _sentencepiece(source.folder, tokenizer, tokens, model["merges"])
    else:
        pre = _splitting(tokenizer, described)
        if pre is None:
            raise _unknown(source, "splits text in a way that it has no name for")
        merges = [it if isinstance(it, str) else " ".join(it) for it in model["merges"]]
        keys |= {"model": "gpt2", "pre": pre, "merges": merges}
    keys |= _special(source, tokenizer, count)
    template = _chat_template(source, tokenizer)
    own = {} if template is None else {"tokenizer.chat_template": template}
    return {**{f"tokenizer.ggml.{key}": value for key, value in keys.items()}, **own}


def _unknown(source: ModelSource, what: str) -> UserError:
    return UserError(
        f"{source.folder}: its tokenizer {what}, so that llama.cpp could not read text as the "
        "model does; format gguf cannot hold it, use another --format"
    )


def _copied(path: Path) -> dict[str, Value]:
    """What a .gguf file says of its tokenizer."""
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if key.startswith("tokenizer.")}


def _tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[list[str], list[int]]:
    """The tokens by their ids, one for each row of the embedding, and of which type they are."""
    added = tokenizer.added_tokens_decoder
    known = {number: token for token, number in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for number in range(count):
        token, kind = known.get(number), TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{number}]", TokenType.UNUSED
        elif number == tokenizer.unk_token_id:
            kind = TokenType.UNKNOWN
        elif number in added:
            kind = TokenType.CONTROL if added[number].special else TokenType.USER_DEFINED
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _sentencepiece(
    folder: Path, tokenizer: PreTrainedTokenizerBase, tokens: list[str], merges: list[Any]
) -> dict[str, Value]:
    """The values of model "llama" besides the tokens."""
    file = folder / "tokenizer.model"
    if file.is_file():
        pieces = gguf.vocab.SentencePieceVocab(folder).sentencepiece_tokens()
        scores = {text.decode(): score for text, score, _ in pieces}
    else:
        # What sentencepiece merges first has the highest score, so that ranks serve as well.
        scores = {}
        for rank, merge in enumerate(merges):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            scores.setdefault(left + right, -float(rank))
        scores |= {token: 0.0 for token in tokens if _BYTE.fullmatch(token)}
    added = tokenizer.added_tokens_decoder
    types = [
        int(TokenType.BYTE) if _BYTE.fullmatch(token) and number not in added else kind
        for number, (token, kind) in enumerate(
            zip(tokens, _tokens(tokenizer, len(tokens))[1], strict=True)
        )
    ]
    return {
        "model": "llama",
        "pre": "default",
        # llama.cpp looks for these before it replaces spaces.
        "tokens": [
            token.replace(_SPACE, " ") if kind == TokenType.USER_DEFINED else token
            for token, kind in zip(tokens, types, strict=True)
        ],
        "scores": [scores.get(token, _NO_SCORE) for token in tokens],
        "token_type": types,
        "add_space_prefix": tokenizer.tokenize("a")[0].startswith(_SPACE),
    }


def _splitting(tokenizer: PreTrainedTokenizerBase, described: Mapping[str, Any]) -> str | None:
    """llama.cpp's name of how text is split before merging; None if it has none."""
    ids = tokenizer.encode(_PROBE)
    name = _SPLITTINGS.get(hashlib.sha256(str(ids).encode()).hexdigest())
    if name is not None:
        return name
    # Of other vocabularies: two splittings whose definitions can be compared.
    steps = described.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    plain = steps[-1].get("use_regex", True) and not steps[-1].get("add_prefix_space")
    if described.get("normalizer") is not None or kinds[-1] != "ByteLevel" or not plain:
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    return None


def _special(
    source: ModelSource, tokenizer: PreTrainedTokenizerBase, count: int
) -> dict[str, Value]:
    """The ids of special tokens, and whether text gets the first and the last of them."""
    keys: dict[str, Value] = {}
    for kind, name in _SPECIAL.items():
        number = getattr(tokenizer, f"{kind}_token_id", None)
        if number is None:
            number = getattr(source.config, f"{kind}_token_id", None)
        if type(number) is int and 0 <= number < count:
            keys[f"{name}_token_id"] = number
    ids = tokenizer("a")["input_ids"]
    keys["add_bos_token"] = ids[0] == keys.get("bos_token_id")
    keys["add_eos_token"] = ids[-1] == keys.get("eos_token_id")
    return keys


def _chat_template(source: ModelSource, tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None and source.name.upper().startswith("BELLE-"):
        return BELLE_TEMPLATE
    return template
