import io
import json
import shutil
from pathlib import Path

import gguf
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from test_gguf_model import tiny_bloom, tiny_llama, write_gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from gptq.blockwise import empty_model
from gptq.blockwise import source as source_module
from gptq.blockwise.source import open_model
from gptq.errors import UserError
from gptq.models import BLOOM, LLAMA

TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "hello world how are you",
    "今天天气怎么样",
] * 20


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def bloom():
    return tiny_bloom()


def save(model, folder: Path, kind: str) -> Path:
    """`kind` is one of safetensors, safetensors-parts, bin, bin-parts."""
    model.config.save_pretrained(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    names = list(state)
    parts = [names[:5], names[5:9], names[9:]] if kind.endswith("parts") else [names]
    stem, ending = ("model", "safetensors") if "safe" in kind else ("pytorch_model", "bin")
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"{stem}.{ending}"
        if len(parts) > 1:
            file = f"{stem}-{number:05d}-of-{len(parts):05d}.{ending}"
        write_part(folder / file, {name: state[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    if len(parts) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder


def write_part(path: Path, state: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)


def assert_holds(source, model):
    expected = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert set(source.tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(source.tensors[name], tensor), name


KINDS = ["safetensors", "safetensors-parts", "bin", "bin-parts"]


@pytest.mark.parametrize("kind", KINDS)
def test_folders(tmp_path, llama, bloom, kind):
    for model, spec in ((llama, LLAMA), (bloom, BLOOM)):
        folder = save(model, tmp_path / f"My-{spec.model_type}", kind)
        for given in (folder, str(folder), str(folder) + "/"):
            source = open_model(given)
            assert source.name == f"My-{spec.model_type}"
            assert source.folder == folder
            assert source.spec is spec
            assert source.gguf is None
            assert type(source.config) is type(model.config)
            assert source.config.hidden_size == 64
        assert_holds(source, model)


def test_the_current_folder_has_its_own_name(tmp_path, llama, monkeypatch):
    monkeypatch.chdir(save(llama, tmp_path / "here", "safetensors"))
    assert open_model(".").name == "here"


@pytest.mark.parametrize("kind", ["safetensors-parts", "bin-parts"])
def test_parts_without_an_index(tmp_path, llama, kind):
    save(llama, tmp_path, kind)
    next(tmp_path.glob("*.index.json")).unlink()
    save_file({"base.lora": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    torch.save({"args": torch.ones(1)}, tmp_path / "training_args.bin")
    if kind == "bin-parts":
        (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert_holds(open_model(tmp_path), llama)
    part = sorted(tmp_path.glob("*-00002-of-*"))[0]
    part.unlink()
    refused(tmp_path, part.name, "missing")


def test_safetensors_come_before_bin(tmp_path, llama):
    save(llama, tmp_path, "safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert_holds(open_model(tmp_path), llama)


def test_an_untouched_quantized_folder_opens(tmp_path, llama):
    save(llama, tmp_path, "safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    name = "model.layers.0.self_attn.q_proj.qweight"
    save_file({name: torch.ones(8, 64, dtype=torch.int32)}, tmp_path / "model.safetensors")
    source = open_model(tmp_path)
    assert source.config.quantization_config == settings
    assert source.tensors[name].dtype == torch.int32


PACKED_NAME = "model.layers.0.self_attn.q_proj.qweight"


@pytest.mark.parametrize("name", ["model.safetensors", "out.safetensors"])
@pytest.mark.parametrize("kind", ["bin", "bin-parts"])
def test_packed_weights_beside_the_model(tmp_path, llama, kind, name):
    """A quantized model's file among those of the full model is not the model."""
    save(llama, tmp_path, kind)
    save_file({PACKED_NAME: torch.ones(8, 64, dtype=torch.int32)}, tmp_path / name)
    assert_holds(open_model(tmp_path), llama)


def test_packed_weights_among_unnamed_ones(tmp_path, llama):
    save(llama, tmp_path, "safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    save_file({PACKED_NAME: torch.ones(8, 64, dtype=torch.int32)}, tmp_path / "out.safetensors")
    assert_holds(open_model(tmp_path), llama)


def test_settings_beside_a_full_model(tmp_path, llama):
    """A stray quantize_config.json does not make full weights quantized."""
    save(llama, tmp_path, "safetensors")
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    source = open_model(tmp_path)
    assert not source.quantized
    assert_holds(source, llama)


# Old names ---------------------------------------------------------------------------------------


def test_earliest_llama_folders(tmp_path, llama):
    save(llama, tmp_path, "bin")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "architectures": ["LLaMAForCausalLM"],
        "max_sequence_length": 128,
        "pad_token_id": -1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {
        name.replace("model.", "model.decoder.", 1): tensor
        for name, tensor in llama.state_dict().items()
    }
    for index in range(2):
        state[f"model.decoder.layers.{index}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    torch.save(state, tmp_path / "pytorch_model.bin")
    source = open_model(tmp_path)
    assert_holds(source, llama)
    assert source.config.architectures == ["LLaMAForCausalLM"]
    again = LlamaForCausalLM(source.config)
    again.load_state_dict(dict(source.tensors), strict=True)
    tokens = torch.arange(20)[None]
    assert torch.equal(again(tokens).logits, llama(tokens).logits)


def test_bloom_files_of_the_base_model(tmp_path, bloom):
    save(bloom, tmp_path, "safetensors")
    state = load_file(tmp_path / "model.safetensors")
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    assert {"word_embeddings.weight", "word_embeddings_layernorm.bias", "ln_f.bias"} <= set(state)
    save_file(state, tmp_path / "model.safetensors")
    assert_holds(open_model(tmp_path), bloom)


# .gguf -------------------------------------------------------------------------------------------


def test_gguf_file_and_its_tokenizer(tmp_path, llama):
    bytes_tokens = list(byte_tokenizer().get_vocab(with_added_tokens=False).items())
    tokens = [token for token, _ in sorted(bytes_tokens, key=lambda item: item[1])]
    path = write_gguf(tmp_path / "Tiny.Q4_1.gguf", llama)
    source = open_model(path)
    assert source.name == "Tiny.Q4_1"
    assert source.folder == tmp_path
    assert source.gguf == "Tiny.Q4_1.gguf"
    assert source.spec is LLAMA
    assert_holds(source, llama)
    with pytest.raises(UserError, match=r"tokenizer in .*Tiny\.Q4_1\.gguf cannot be read"):
        source.tokenizer()  # the file has tokens, but not what kind they are

    merges = [" ".join(pair) for pair in json.loads(byte_tokenizer().to_str())["model"]["merges"]]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    for name, number in (("block_count", 1), ("embedding_length", 8), ("feed_forward_length", 8)):
        writer.add_uint32(f"llama.{name}", number)
    writer.add_head_count(1)
    writer.add_context_length(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_tensor("token_embd.weight", torch.zeros(len(tokens), 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = open_model(tmp_path / "t.gguf").tokenizer()
    assert (
        tokenizer("hello the fox 天气")["input_ids"]
        == byte_tokenizer().encode("hello the fox 天气").ids
    )
    assert tokenizer.bos_token_id == 0


def test_a_folder_with_only_a_gguf_and_other_files(tmp_path, llama):
    write_gguf(tmp_path / "m.gguf", llama)
    refused(tmp_path, f"pass {tmp_path / 'm.gguf'}", "config.json")
    (tmp_path / "m.safetensors").write_bytes(b"12345678{}")
    refused(tmp_path / "m.safetensors", "pass the folder")
    (tmp_path / "m.gguf").rename(tmp_path / "renamed.bin")
    assert open_model(tmp_path / "renamed.bin").gguf == "renamed.bin"


# Tokenizers --------------------------------------------------------------------------------------


def byte_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=sorted(alphabet))
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def sentences():
    """A SentencePiece model of the kind LLaMA has."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=buffer,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    return buffer.getvalue()


OLD = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LLaMATokenizer"}
TOKENIZER_CONFIGS = {
    "old": OLD,
    "old-named-tokens": {**OLD, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "today": {"tokenizer_class": "LlamaTokenizer"},
    "none": None,
}


@pytest.mark.parametrize("case", TOKENIZER_CONFIGS)
def test_sentencepiece_tokenizers(tmp_path, llama, sentences, case):
    save(llama, tmp_path, "safetensors")
    (tmp_path / "tokenizer.model").write_bytes(sentences)
    if TOKENIZER_CONFIGS[case] is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIGS[case]))
    tokenizer = open_model(tmp_path).tokenizer()
    oracle = sentencepiece.SentencePieceProcessor(model_proto=sentences)
    for text in ("hello the fox 天气", "two  spaces   three", "unseen: ÄÖ€"):
        assert tokenizer(text)["input_ids"] == [1, *oracle.encode(text)]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.decode([1, *oracle.encode("the fox")], skip_special_tokens=True) == "the fox"


def test_sentencepiece_without_the_first_token(tmp_path, llama, sentences):
    save(llama, tmp_path, "safetensors")
    (tmp_path / "tokenizer.model").write_bytes(sentences)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=sentences)
    tokenizer = open_model(tmp_path).tokenizer()
    assert tokenizer("the fox")["input_ids"] == oracle.encode("the fox")


def test_old_names_beside_a_tokenizer_json(tmp_path, llama, sentences):
    save(llama, tmp_path, "safetensors")
    (tmp_path / "tokenizer.model").write_bytes(sentences)
    open_model(tmp_path).tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(OLD))
    oracle = sentencepiece.SentencePieceProcessor(model_proto=sentences)
    tokenizer = open_model(tmp_path).tokenizer()
    assert tokenizer("the fox")["input_ids"] == [1, *oracle.encode("the fox")]
    assert tokenizer.bos_token_id == 1


def test_bloom_tokenizer(tmp_path, bloom):
    save(bloom, tmp_path, "safetensors")
    PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "BloomTokenizerFast"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = open_model(tmp_path).tokenizer()
    text = "hello the fox 天气"
    assert tokenizer(text)["input_ids"] == byte_tokenizer().encode(text).ids
    assert tokenizer(text) == AutoTokenizer.from_pretrained(tmp_path)(text)


def test_missing_and_damaged_tokenizers(tmp_path, llama):
    save(llama, tmp_path, "safetensors")
    source = open_model(tmp_path)
    for name, content in (
        (None, None),
        ("tokenizer.json", "{"),
        ("tokenizer.model", "not a model"),
        ("tokenizer_config.json", "[1"),
    ):
        if name is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as caught:
            source.tokenizer()
        message = str(caught.value)
        assert str(tmp_path) in message
        assert "\n" not in message
        if name is None:
            assert "tokenizer.json, tokenizer.model" in message
        elif name == "tokenizer.json":
            (tmp_path / name).unlink()


# Bad models --------------------------------------------------------------------------------------


def refused(model, *words):
    with pytest.raises(UserError) as caught:
        open_model(model)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_configurations(tmp_path, llama):
    save(llama, tmp_path, "safetensors")
    config = tmp_path / "config.json"
    good = json.loads(config.read_text())
    config.unlink()
    refused(tmp_path, str(tmp_path), "no config.json")
    # Before a mebibyte of it could become twenty in memory.
    long = '{"model_type": "llama", "x": "' + "x" * (1 << 24) + '"}'
    numbers = ('{"rms_norm_eps": NaN}', '{"x": [-Infinity]}', '{"x": 1e999}', "1" * 5000)
    for text in ('{"model_type": "llama"', "[]", "\x00\xff", "[" * 100_000, long, *numbers):
        config.write_text(text)
        refused(tmp_path, "config.json", "JSON")
    config.write_text(json.dumps({**good, "model_type": "gpt2"}))
    refused(tmp_path, "it is a 'gpt2' model; llama, bloom, mistral,")
    for model_type in (None, ["llama"]):
        config.write_text(json.dumps({**good, "model_type": model_type}))
        refused(tmp_path, "olmo3, exaone4, gemma, gemma2, gemma3_text are supported")
    for wrong in ({"hidden_size": "wide"}, {"num_attention_heads": 0}):
        config.write_text(json.dumps({**good, **wrong}))
        refused(tmp_path, "config.json", f"says {next(iter(wrong))} is")


@pytest.mark.parametrize(
    "name", ["num_labels", "head_dim", "num_hidden_layers", "vocab_size", "num_key_value_heads"]
)
def test_numbers_that_would_fill_the_memory(tmp_path, llama, name):
    """transformers makes names of labels and tables of positions of any number of them."""
    save(llama, tmp_path, "safetensors")
    good = json.loads((tmp_path / "config.json").read_text())
    for number in (2_000_000_000, -1, 1.5, [1]):
        (tmp_path / "config.json").write_text(json.dumps({**good, name: number}))
        refused(tmp_path, "config.json", f"says {name} is {number}")


def test_a_setting_nested_deeply(tmp_path, llama):
    save(llama, tmp_path, "safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    for depth in (100, 300, 600, 900):
        text = json.dumps(config)[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}"
        (tmp_path / "config.json").write_text(text)
        try:
            source = open_model(tmp_path)
            empty_model.build(source.config, source.spec, torch.device("cpu"))
        except UserError as error:
            assert depth > 100
            assert "config" in str(error)  # noqa: PT017


def test_code_in_a_folder_is_not_run(tmp_path, llama):
    save(llama, tmp_path, "safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "custom.Custom"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "custom.py").write_text("raise SystemExit('code was run')")
    assert_holds(open_model(tmp_path), llama)


def test_no_weights(tmp_path, llama):
    save(llama, tmp_path, "safetensors")
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "no weights", str(tmp_path), "model.safetensors", "pytorch_model.bin")
    (tmp_path / "consolidated.00.pth").write_bytes(b"x")
    refused(tmp_path, "no weights", "Meta's")


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_cut_short_is_found_at_once(tmp_path, llama, kind):
    save(llama, tmp_path, kind)
    part = sorted(tmp_path.glob("*model*.safetensors" if "safe" in kind else "*.bin"))[-1]
    whole = part.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        part.write_bytes(whole[:length])
        refused(tmp_path, part.name)


@pytest.mark.parametrize("kind", ["safetensors-parts", "bin-parts"])
def test_an_index_that_does_not_hold(tmp_path, llama, kind):
    save(llama, tmp_path, kind)
    index = next(tmp_path.glob("*.index.json"))
    part = sorted(tmp_path.glob("*-00002-of-*"))[0]
    whole = part.read_bytes()
    write_part(part, {"other": torch.ones(1)})
    refused(tmp_path, part.name, index.name, "tensor '")
    part.unlink()
    refused(tmp_path, part.name, "missing")
    part.write_bytes(whole)
    for text in ("{", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        refused(tmp_path, index.name)


@pytest.mark.parametrize("kind", ["safetensors-parts", "bin-parts"])
def test_an_index_that_names_other_files(tmp_path, llama, kind):
    """Only weight files in the index's folder and below are read; links lead anywhere."""
    folder = save(llama, tmp_path / "m", kind)
    index = next(folder.glob("*.index.json"))
    part = sorted(folder.glob("*-00002-of-*"))[0]
    content = json.loads(index.read_text())
    elsewhere = part.rename(tmp_path / part.name)

    def rename(name: str) -> None:
        renamed = {t: name if f == part.name else f for t, f in content["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": renamed}))

    (folder / "notes.txt").write_text("mine")
    bad = [f"../{part.name}", f"sub/../../{part.name}", str(elsewhere), "/proc/self/mem", "..", ""]
    bad += ["config.json", "notes.txt", "/etc/passwd", "zero\0.txt"]
    for name in bad:
        rename(name)
        refused(folder, index.name, f"names '{name}'", "file of its folder")
    for name in ("absent" + part.suffix, "x" * 300 + part.suffix, "\0" + part.suffix):
        rename(name)
        refused(folder, name, "missing")
    (folder / "sub").mkdir()
    for name in ("link" + part.suffix, f"sub/{part.name}"):
        (folder / name).symlink_to(elsewhere)
        rename(name)
        assert_holds(open_model(folder), llama)


def test_code_in_weights(tmp_path, llama):
    save(llama, tmp_path, "bin")
    torch.save({"w": torch.ones(1), "f": shutil.rmtree}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin", "holds code", "rmtree")


def test_paths_that_do_not_exist(tmp_path, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("asked the hub for a path")

    monkeypatch.setattr(source_module, "snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for model in (
        "./llama",
        "../llama",
        "/nowhere/llama",
        "~/nowhere-at-all",
        "models/llama",
        "a/b/c",
        "name/",
        "llama.gguf",
        "C:\\llama",
        Path("llama"),
    ):
        refused(model, str(model), "does not exist")


# The hub -----------------------------------------------------------------------------------------


class Hub:
    """Stands where the client does: copies what a repository has of the patterns asked for."""

    def __init__(self, repository: Path, cache: Path):
        self.repository = repository
        self.cache = cache
        self.names: list[str] = []

    def __call__(self, repo_id: str, *, allow_patterns: list[str]) -> str:
        self.names.append(repo_id)
        self.cache.mkdir(exist_ok=True)
        for pattern in allow_patterns:
            for file in self.repository.glob(pattern):
                shutil.copy(file, self.cache)
        return str(self.cache)

    @property
    def fetched(self) -> set[str]:
        return {file.name for file in self.cache.iterdir()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setattr(source_module, "snapshot_download", hub)
    monkeypatch.chdir(tmp_path)
    return hub


@pytest.mark.parametrize("kind", KINDS)
def test_hub_fetches_one_kind_of_weights(hub, llama, kind):
    save(llama, hub.repository, kind)
    if "safe" in kind:
        (hub.repository / "pytorch_model.bin").write_bytes(b"the same once more")
    for other in ("tokenizer.json", "tokenizer.model", "README.md", "consolidated.00.pth"):
        (hub.repository / other).write_text("{}")
    source = open_model("someone/Llama-1")
    assert set(hub.names) == {"someone/Llama-1"}
    assert source.name == "Llama-1"
    assert source.folder == hub.cache
    assert_holds(source, llama)
    assert {"config.json", "tokenizer.json", "tokenizer.model"} <= hub.fetched
    assert not {"README.md", "consolidated.00.pth"} & hub.fetched
    assert ("pytorch_model.bin" in hub.fetched) == (kind == "bin")


def test_bare_belle_names(hub, bloom):
    save(bloom, hub.repository, "bin")
    source = open_model("BELLE-7B-2M")
    assert set(hub.names) == {"BelleGroup/BELLE-7B-2M"}
    assert source.name == "BELLE-7B-2M"
    assert_holds(source, bloom)


def test_another_kind_of_model_is_refused_before_its_weights_are_fetched(hub, llama):
    save(llama, hub.repository, "safetensors")
    config = json.loads((hub.repository / "config.json").read_text())
    (hub.repository / "config.json").write_text(json.dumps({**config, "model_type": "gpt2"}))
    refused("gpt2", "'gpt2' model")
    assert hub.fetched == {"config.json", "generation_config.json"} & hub.fetched


@pytest.mark.parametrize("error", [OSError, ValueError, RuntimeError])
def test_hub_failures(monkeypatch, tmp_path, error):
    def offline(*args, **kwargs):
        raise error("no route to host\nmore lines")

    monkeypatch.setattr(source_module, "snapshot_download", offline)
    monkeypatch.chdir(tmp_path)
    message = refused("BELLE-7B-2M", "BelleGroup/BELLE-7B-2M", "no route to host", "local folder")
    assert "more lines" not in message
