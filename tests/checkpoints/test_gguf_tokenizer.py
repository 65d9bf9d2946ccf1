"""Tokenizers as llama.cpp is told of them."""

import hashlib
import json
import shutil

import pytest
import sentencepiece
from conftest import WORDS, llama_config, make_model
from gguf import TokenType
from helpers.gguf_models import GEMMA_PIECES, READS_ALL, make_tiny, sentencepiece_model, write_dense
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf import gguf_tokenizer_mapping

from gptq.blockwise.source import open_model
from gptq.blockwise.tokenizer import restore_byte_level
from gptq.checkpoints import gguf_tokenizer
from gptq.checkpoints.gguf_tokenizer import tokenizer_keys
from gptq.data.chat import BELLE_TEMPLATE
from gptq.errors import UserError


@pytest.fixture(scope="module")
def bytes_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("bytes") / "model", llama_config())


@pytest.fixture(scope="module")
def sentencepiece_dir(tmp_path_factory):
    return sentencepiece_model(tmp_path_factory.mktemp("pieces"))


def keys_of(folder, count=320):
    keys = tokenizer_keys(open_model(folder), count)
    return {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}


def test_byte_level(bytes_dir):
    keys = keys_of(bytes_dir)
    described = json.loads((bytes_dir / "tokenizer.json").read_text())
    assert (keys["model"], keys["pre"]) == ("gpt2", "gpt-2")
    assert keys["merges"] == [" ".join(pair) for pair in described["model"]["merges"]]
    for token, number in described["model"]["vocab"].items():
        assert keys["tokens"][number] == token
    assert keys["tokens"][300:] == [f"[PAD{number}]" for number in range(300, 320)]
    control, normal, unused = TokenType.CONTROL, TokenType.NORMAL, TokenType.UNUSED
    assert keys["token_type"] == [control] * 2 + [normal] * 298 + [unused] * 20
    assert (keys["bos_token_id"], keys["eos_token_id"]) == (0, 1)
    assert keys["add_bos_token"] is False
    assert "unknown_token_id" not in keys
    assert "tokenizer.chat_template" not in keys


def test_tokens_without_a_row_are_left_out(bytes_dir):
    assert len(keys_of(bytes_dir, 290)["tokens"]) == 290


def test_sentencepiece(sentencepiece_dir):
    keys = keys_of(sentencepiece_dir)
    pieces = sentencepiece.SentencePieceProcessor(str(sentencepiece_dir / "tokenizer.model"))
    assert (keys["model"], keys["pre"]) == ("llama", "default")
    count = pieces.vocab_size()
    assert keys["tokens"][:count] == [pieces.IdToPiece(i) for i in range(count)]
    assert keys["scores"][:count] == [pieces.GetScore(i) for i in range(count)]
    assert keys["token_type"][:3] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
    assert keys["token_type"][3:259] == [TokenType.BYTE] * 256
    assert keys["token_type"][259:count] == [TokenType.NORMAL] * (count - 259)
    assert keys["token_type"][count:] == [TokenType.UNUSED] * (320 - count)
    special = ("bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token")
    assert [keys[key] for key in special] == [1, 2, 0, True]
    assert keys["add_eos_token"] is False
    assert keys["add_space_prefix"] is True


def test_scores_without_tokenizer_model_rank_the_same(sentencepiece_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sentencepiece_dir, folder)
    open_model(folder).tokenizer().save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    before, after = keys_of(sentencepiece_dir), keys_of(folder)
    for key in ("model", "tokens", "token_type", "bos_token_id", "add_bos_token"):
        assert after[key] == before[key], key
    merged = [i for i, score in enumerate(before["scores"]) if score < 0]
    orders = [
        sorted((i for i in merged if len(keys["tokens"][i]) > 1), key=lambda i: -keys["scores"][i])
        for keys in (before, after)
    ]
    joined = [i for i in orders[0] if after["scores"][i] > -1000]
    assert len(joined) > 30
    assert [i for i in orders[1] if i in joined] == joined


def test_spaces_of_gemma_are_tokens(tmp_path):
    """llama.cpp looks for tokens of this type before it replaces spaces."""
    keys = keys_of(sentencepiece_model(tmp_path, "gemma2", **GEMMA_PIECES))
    assert keys["add_space_prefix"] is False
    assert keys["tokens"][3:6] == ["<start>", "  ", "   "]
    assert keys["token_type"][3:6] == [TokenType.USER_DEFINED] * 3
    assert any("▁" in token for token in keys["tokens"])


# How text is split -----------------------------------------------------------------------------


def with_splitting(folder, target, change):
    """The model with another tokenizer.json."""
    shutil.copytree(folder, target)
    tokenizer = Tokenizer.from_file(str(target / "tokenizer.json"))
    change(tokenizer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(target)
    return target


def digits(tokenizer):
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )


def unknown(tokenizer):
    split = pre_tokenizers.Split(Regex("a+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False)])


def normalized(tokenizer):
    tokenizer.normalizer = normalizers.Lowercase()


def pieces(tokenizer):
    tokenizer.model = models.Unigram([("a", 0.0), ("b", -1.0)], unk_id=0)


def test_a_splitting_is_recognised_by_its_definition(bytes_dir, tmp_path):
    assert keys_of(with_splitting(bytes_dir, tmp_path / "m", digits))["pre"] == "smollm"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (unknown, "splits text in a way that it has no name for"),
        (normalized, "splits text in a way"),
        (pieces, "is of type Unigram"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have(change, words, bytes_dir, tmp_path):
    with pytest.raises(UserError, match=words) as caught:
        keys_of(with_splitting(bytes_dir, tmp_path / "m", change))
    assert "\n" not in str(caught.value)


def test_a_splitting_is_recognised_by_the_ids_of_a_text(monkeypatch, bytes_dir):
    ids = open_model(bytes_dir).tokenizer().encode(gguf_tokenizer._PROBE)
    text = "[" + ", ".join(str(number) for number in ids) + "]"
    known = {hashlib.sha256(text.encode()).hexdigest(): "llama-bpe"}
    monkeypatch.setattr(gguf_tokenizer, "_SPLITTINGS", known)
    assert keys_of(bytes_dir)["pre"] == "llama-bpe"


def test_added_tokens_are_those_of_the_file(bytes_dir, tmp_path):
    """transformers takes none with a space, or beyond ASCII, and adds GPT-2's to the file's."""
    folder = tmp_path / "model"
    shutil.copytree(bytes_dir, folder)
    original = open_model(folder).tokenizer()
    plain = ("    ", "  ", "cat sat", "<think>")
    original.add_tokens([AddedToken(text, normalized=False) for text in plain])
    original.add_special_tokens({"additional_special_tokens": ["<｜User｜>"]})
    original.save_pretrained(folder)
    write_dense(folder, tmp_path / "m.gguf", "gpt-2")
    tokenizer = open_model(tmp_path / "m.gguf").tokenizer()
    assert len(tokenizer) == 320
    for text in (
        *("the cat sat on", "if x:\n    return  1", "a <think> b", "<｜User｜>the dog"),
        "the <|endoftext|> dog",
    ):
        ids = original.encode(text)
        assert tokenizer.encode(text) == ids
        for skip in (False, True):
            assert tokenizer.decode(ids, skip) == original.decode(ids, skip)
    tokenizer.save_pretrained(tmp_path / "again")
    reloaded = PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    assert reloaded.encode("the cat sat on") == original.encode("the cat sat on")


@pytest.mark.parametrize("name", ["gpt-2", "stablelm2", "glm4", "hunyuan-dense"])
def test_a_splitting_is_restored(name, bytes_dir, tmp_path, monkeypatch):
    """Of these, GPT-2's alone keeps the digits of a number together with the space before them."""
    if name in ("stablelm2", "glm4") and not READS_ALL:
        pytest.skip("this version of transformers knows no splittings")
    write_dense(bytes_dir, tmp_path / "m.gguf", name)
    source = open_model(tmp_path / "m.gguf")
    if name == "hunyuan-dense":
        with pytest.warns(UserWarning, match="'hunyuan-dense'.* is not known to transformers"):
            tokenizer = source.tokenizer()
    else:
        tokenizer = source.tokenizer()
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 12345\n\n don'T")
    pieces = [piece for piece, _ in split]
    numbers = {"stablelm2": ["Ġ", *"12345"], "glm4": ["Ġ", "123", "45"]}.get(name, ["Ġ12345"])
    assert pieces[1 : 1 + len(numbers)] == numbers
    assert ("'T" in pieces) == (len(numbers) > 1)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_text_of_qwen_is_split_by_its_own_rule(arch, tmp_path, recwarn):
    """By every version of transformers: 5.17 goes by the architecture."""
    write_dense(make_tiny(tmp_path / "model", arch), tmp_path / "m.gguf", "qwen2")
    tokenizer = open_model(tmp_path / "m.gguf").tokenizer()
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 123 don'T")
    assert [piece for piece, _ in split] == ["in", "Ġ", *"123", "Ġdon", "'T"]
    assert not [it for it in recwarn if "splits text before merging" in str(it.message)]


@pytest.mark.parametrize("name", ["smollm", "glm4", "llama-bpe"])
def test_a_transformers_without_a_table_of_splittings(
    name, bytes_dir, tmp_path, monkeypatch, recwarn
):
    """Such as 5.17: text is split as GPT-2 does, and a line says what that may do to it."""
    write_dense(bytes_dir, tmp_path / "m.gguf", name)
    monkeypatch.delattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", raising=False)
    tokenizer = open_model(bytes_dir).tokenizer()
    backend = tokenizer.backend_tokenizer
    # What 5.17 gives byte-level tokenizers of LLaMA's files.
    backend.model.byte_fallback = True
    backend.normalizer = normalizers.Sequence([])
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    text = " the cat\n\nsat, wörld"
    assert tokenizer.decode(tokenizer.encode(text)) != text
    restore_byte_level(tokenizer, tmp_path / "m.gguf")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    assert not described["model"]["byte_fallback"]
    assert described["normalizer"] is None
    said = [str(it.message) for it in recwarn if "splits text before merging" in str(it.message)]
    assert len(said) == (name != "smollm")


@pytest.mark.parametrize(
    ("old", "mend"), [(True, "install transformers 5.18"), (False, "copy its")]
)
def test_a_tokenizer_that_transformers_does_not_read(old, mend, bytes_dir, tmp_path, monkeypatch):
    """5.17 refuses architectures that it does not know; a newer one, damaged files alone."""
    write_dense(bytes_dir, tmp_path / "m.gguf")
    splits = {} if old else {"qwen2": ""}
    monkeypatch.setattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", splits, raising=False)

    def refuse(*args: object, **kwargs: object) -> None:
        raise ValueError("GGUF model with architecture smollm3 is not supported yet.")

    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", refuse)
    with pytest.raises(UserError, match=f"smollm3 is not supported yet.*: {mend}"):
        open_model(tmp_path / "m.gguf").tokenizer()


# Other parts -----------------------------------------------------------------------------------


def test_chat_templates(bytes_dir, tmp_path):
    folder = tmp_path / "BELLE-tiny"
    shutil.copytree(bytes_dir, folder)
    assert keys_of(folder)["tokenizer.chat_template"] == BELLE_TEMPLATE
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert keys_of(folder)["tokenizer.chat_template"] == "{{ messages }}"


def test_added_tokens(tmp_path):
    """Of a byte-level tokenizer: special ones and those that text may hold."""
    folder = make_model(tmp_path / "model", llama_config())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=260, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([WORDS], trainer)
    tokenizer.add_tokens(["<fact>"])
    tokenizer.add_special_tokens(["<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.save_pretrained(folder)
    keys = keys_of(folder)
    types = {
        token: keys["token_type"][keys["tokens"].index(token)] for token in ("<fact>", "<|end|>")
    }
    assert types == {"<fact>": TokenType.USER_DEFINED, "<|end|>": TokenType.CONTROL}
    assert keys["eos_token_id"] == fast.eos_token_id
