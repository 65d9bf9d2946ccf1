"""What `--save-dir` writes, held key by key against what other readers ask for."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

import gptq
from gptq import QuantConfig
from gptq.checkpoints import writing
from gptq.checkpoints.compatibility import READERS, Written, facts, lines, loads, run_line
from gptq.cli.run import main
from gptq.data.chat import chat_prompt
from gptq.models import LLAMA

SETTINGS = {
    "sym": {"sym": True, "group_size": 32},
    "asym": {"group_size": 32},
    "act": {"sym": True, "group_size": 32, "order": "act"},
    "eight": {"bits": 8, "sym": True, "group_size": -1},
    "short": {"group_size": 64},
}


@pytest.fixture(scope="module")
def written(llama_dir, bloom_dir, text_file, tmp_path_factory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("export")
    for name, settings in SETTINGS.items():
        gptq.quantize(
            llama_dir,
            text_file,
            QuantConfig(**settings),
            save_dir=where / name,
            format=None if settings.get("sym") else "gptq_v2",
            nsamples=4,
            seqlen=32,
        )
    config = QuantConfig(sym=True, group_size=32)
    folder = where / "bloom"
    gptq.quantize(bloom_dir, text_file, config, save_dir=folder, nsamples=4, seqlen=32)
    return {name: where / name for name in (*SETTINGS, "bloom")}


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


ALL = [*SETTINGS, "bloom"]


@pytest.mark.parametrize("name", ALL)
def test_both_configuration_files_say_the_same(name, written):
    said = read(written[name], "quantize_config.json")
    assert read(written[name], "config.json")["quantization_config"] == said
    with safe_open(written[name] / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["quantize_config"]) == said


@pytest.mark.parametrize("name", ALL)
def test_the_keys_that_readers_look_for(name, written):
    """Names and types; AutoGPTQ takes a missing desc_act for true and a missing group_size for -1,
    GPTQModel and vLLM read checkpoint_format before format."""
    said = read(written[name], "quantize_config.json")
    types = {
        **dict.fromkeys(("quant_method", "checkpoint_format", "format", "pack_dtype"), str),
        **dict.fromkeys(("desc_act", "sym", "lm_head", "true_sequential", "static_groups"), bool),
        "bits": int,
        "group_size": int,
        "damp_percent": float,
        "meta": dict,
    }
    assert {key: type(said[key]) for key in types} == types
    assert set(said) == set(types)
    assert said["quant_method"] == "gptq"
    assert said["pack_dtype"] == "int32"
    assert said["lm_head"] is False
    assert said["format"] == said["checkpoint_format"] == ("gptq" if said["sym"] else "gptq_v2")
    assert said["desc_act"] is (name == "act")
    assert 0 < said["damp_percent"] < 1  # transformers refuses others.
    # Readers take other quantizers' names for promises about the format.
    assert said["meta"]["quantizer"] == [f"belle-gptq:{gptq.__version__}"]


@pytest.mark.parametrize("name", ALL)
def test_the_tensors_that_readers_look_for(name, written):
    state = load_file(written[name] / "model.safetensors")
    said = read(written[name], "quantize_config.json")
    bits, size = said["bits"], said["group_size"]
    layers = [key.removesuffix(".qweight") for key in state if key.endswith(".qweight")]
    assert len(layers) == (8 if name == "bloom" else 14)
    for layer in layers:
        parts = {kind: state.get(f"{layer}.{kind}") for kind in ("qweight", "qzeros", "scales")}
        g_idx, bias = state[f"{layer}.g_idx"], state.get(f"{layer}.bias")
        inputs, outputs = len(g_idx), parts["scales"].shape[1]
        groups = 1 if size == -1 else -(-inputs // size)
        assert parts["qweight"].shape == (inputs * bits // 32, outputs)
        assert parts["qzeros"].shape == (groups, outputs * bits // 32)
        assert parts["scales"].shape == (groups, outputs)
        assert [part.dtype for part in parts.values()] == [torch.int32, torch.int32, torch.float16]
        assert g_idx.dtype == torch.int32
        assert f"{layer}.weight" not in state
        # exllamav2 and vLLM read a bias only where the model has one.
        assert (bias is not None) == (name == "bloom")
        assert bias is None or bias.dtype == torch.float16
        if name != "act":
            assert torch.equal(g_idx, torch.arange(inputs, dtype=torch.int32) // max(size, 1)) or (
                size == -1 and not g_idx.any()
            )
    # What the model ties is stored once, and nothing that is computed is stored.
    assert ("lm_head.weight" in state) == (name != "bloom")
    assert not any("inv_freq" in key for key in state)


@pytest.mark.parametrize("name", ["sym", "act"])
def test_layers_that_vllm_fuses_agree(name, written):
    """q, k, v and gate, up become one layer there, with one g_idx."""
    state = load_file(written[name] / "model.safetensors")
    for block in range(2):
        for group in LLAMA.groups:
            found = [state[f"model.layers.{block}.{linear}.g_idx"] for linear in group.layers]
            assert all(torch.equal(found[0], other) for other in found)


def test_config_json_is_the_models_own(written, llama_dir):
    """transformers would rewrite keys that other readers need."""
    config = read(written["sym"], "config.json")
    del config["quantization_config"]
    original = read(llama_dir, "config.json")
    assert config == original
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (written["sym"] / name).read_bytes() == (llama_dir / name).read_bytes()


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
def test_format(layout, sym, llama_dir, text_file, tmp_path, capsys):
    words = [str(llama_dir), str(text_file), "--wbits", "4", "--groupsize", "32"]
    words += ["--nsamples", "4", "--seqlen", "32", "--format", layout, "--plain"]
    words += ["--sym"] if sym else []
    assert (
        main(LLAMA, [*words, "--save-dir", str(tmp_path / "m"), "--save", str(tmp_path / "m.pt")])
        == 0
    )
    assert f"format {layout}: loads in this package" in capsys.readouterr().out
    assert read(tmp_path / "m", "quantize_config.json")["checkpoint_format"] == layout
    folder = load_file(tmp_path / "m" / "model.safetensors")
    # The .pt is v1 whatever the folder is.
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    for name in (key for key in state if key.endswith(".qzeros")):
        less = 0x11111111 if layout == "gptq_v2" else 0
        # No field of a v1 word is 15, so that adding one to each carries nowhere.
        assert torch.equal(folder[name] - less, state[name])
    probe = torch.randint(2, 300, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        one, two = (
            gptq.load(*where)[0](probe).logits
            for where in ((tmp_path / "m",), (llama_dir, tmp_path / "m.pt"))
        )
    assert torch.equal(one, two)


def test_format_needs_a_folder(llama_dir, text_file, capsys):
    words = [str(llama_dir), str(text_file), "--wbits", "4", "--format", "gptq", "--save"]
    assert main(LLAMA, words) == 2
    assert "--format needs --save-dir" in capsys.readouterr().err


def test_shards_above_five_gigabytes():
    assert writing.SHARD_BYTES == 5 * 10**9


# Who reads it --------------------------------------------------------------------------------

EVEN = frozenset({(4096, 4096), (11008, 4096)})
SHORT = frozenset({(576, 576), (1536, 576)})


def able(**changes) -> set[str]:
    plain = {"bits": 4, "group_size": 128, "sym": True, "format": "gptq", "sizes": EVEN}
    folder = Written(**plain | changes)
    return {name for name, reader in READERS.items() if loads(reader, folder)}


def test_who_reads_what():
    """As docs/format.md has it."""
    everyone = {"vLLM", "SGLang", "GPTQModel", "exllamav2"}
    assert able() == everyone
    assert able(bits=8) == everyone - {"exllamav2"}
    assert able(bits=3) == {"GPTQModel"}
    assert able(sym=False, format="gptq_v2") == {"GPTQModel", "exllamav2"}
    assert able(sym=False) == {"exllamav2"}
    assert able(format="gptq_v2") == everyone - {"SGLang"}
    assert able(group_size=256) == {"GPTQModel", "exllamav2"}
    assert able(group_size=48, sizes=frozenset({(96, 96)})) == {"exllamav2"}
    assert able(sizes=SHORT) == {"GPTQModel"}
    assert able(sizes=SHORT, group_size=64) == everyone
    assert able(model_type="bloom") == {"GPTQModel"}
    assert able(embeddings=True) == set()
    with_package = "transformers with compressed-tensors"
    compressed = partial(able, sym=False, format="compressed-tensors")
    assert compressed() == {"vLLM", "SGLang", with_package}
    assert compressed(bits=3) == {"vLLM", with_package}
    assert compressed(embeddings=True) == set()
    assert compressed(model_type="bloom") == {with_package}
    assert able(format="awq", sym=False) == {"vLLM", "SGLang", "GPTQModel"}
    assert able(format="mlx", embeddings=True) == {"mlx-lm"}


def test_the_flags_that_would_widen_it():
    asym = Written(4, 128, False, "gptq_v2", EVEN)
    assert lines(asym) == [
        "format gptq_v2: loads in this package, transformers with gptq.hf.register(), GPTQModel, "
        "exllamav2",
        "for vLLM, SGLang, transformers with compressed-tensors: quantize with --format "
        "compressed-tensors",
        "for mlx-lm: quantize with --format mlx",
    ]
    short = Written(3, 128, True, "gptq", SHORT)
    assert lines(short)[1:] == [
        "for vLLM, transformers with compressed-tensors: quantize with --format "
        "compressed-tensors --groupsize 64",
        "for SGLang, exllamav2: quantize with --wbits 4 --groupsize 64",
        "for mlx-lm: quantize with --format mlx --groupsize 64",
    ]
    # What the default folder of such a run is, because compressed-tensors cannot hold it.
    scattered = Written(4, 128, False, "gptq_v2", EVEN, desc_act=True)
    assert (
        "for vLLM, SGLang, transformers with compressed-tensors: quantize with --format "
        "compressed-tensors --order gar"
    ) in lines(scattered)
    assert run_line(asym, Path("out")) == "run it with: gptq out --chat"
    served = Written(4, 128, False, "compressed-tensors", EVEN)
    assert run_line(served, Path("a folder")) == "run it with: vllm serve 'a folder'"


@pytest.mark.parametrize("name", ALL)
def test_facts(name, written):
    found = facts(written[name])
    said = read(written[name], "quantize_config.json")
    assert (found.bits, found.group_size, found.sym) == (
        said["bits"],
        said["group_size"],
        said["sym"],
    )
    expected = {(64, 64), (64, 32), (64, 96), (96, 64)}
    if name == "bloom":
        expected = {(64, 192), (64, 64), (64, 256), (256, 64)}
    assert found.sizes == expected
    assert found.short_groups == (name == "short")


def test_a_head_that_is_tied(text_file, tmp_path):
    for config in (llama_config(tie_word_embeddings=True), bloom_config()):
        source = make_model(tmp_path / config.model_type, config)
        target = tmp_path / f"{config.model_type}-4bit"
        gptq.quantize(
            source, None, QuantConfig(method="rtn", scale_search="minmax"), save_dir=target
        )
        assert "lm_head.weight" not in load_file(target / "model.safetensors")
        model, _ = gptq.load(target)
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_belle_models_get_their_own_chat_template(tmp_path):
    """BELLE's tokenizers have none; what is written down is what --chat writes."""
    source = make_model(tmp_path / "BELLE-LLAMA-7B-2M", llama_config())
    target = tmp_path / "packed"
    gptq.quantize(source, None, QuantConfig(method="rtn", scale_search="minmax"), save_dir=target)
    with_it, without = (AutoTokenizer.from_pretrained(folder) for folder in (target, source))
    assert without.chat_template is None
    messages = [{"role": "user", "content": "one?"}]
    for _ in range(3):
        expected = chat_prompt(without, messages)
        written = with_it.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert written == expected
        messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "two?"}]


@pytest.mark.parametrize("names", [("default", "tool_use"), ("rag", "tool_use")])
def test_named_chat_templates_are_kept(names, tmp_path):
    """transformers 5 writes those in a folder of their own."""
    folder = make_model(tmp_path / "model", llama_config())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {name: name + "{{ messages }}" for name in names}
    tokenizer.save_pretrained(folder)
    config = QuantConfig(bits=8, group_size=32, method="rtn", scale_search="minmax")
    gptq.quantize(folder, None, config, save_dir=tmp_path / "m")
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == tokenizer.chat_template
