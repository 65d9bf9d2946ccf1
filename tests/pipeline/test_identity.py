"""What tells one run from another: each thing that decides the blocks, and nothing else."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gptq import QuantConfig
from gptq.blockwise.model import BlockwiseModel
from gptq.blockwise.source import open_model
from gptq.errors import UserError
from gptq.pipeline import identity as module
from gptq.pipeline.identity import agreed, digest, fingerprint, identity

CPU = torch.device("cpu")
# Of each setting a value that is not the default.
SETTINGS = {
    "bits": 3,
    "group_size": 64,
    "sym": True,
    "percdamp": 0.2,
    "order": "act",
    "static_groups": True,
    "true_sequential": False,
    "scale_search": "minmax",
    "method": "rtn",
    "refine": 1,
    "sweeps": 2,
    "error_feedback": 0.3,
    "residual_feedback": False,
    "adaptive_damp": False,
}


def opened(folder, dtype=torch.float32) -> BlockwiseModel:
    return BlockwiseModel.from_source(open_model(folder), CPU, dtype)


def differing(one: dict, other: dict) -> set[str]:
    return {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}


def test_the_same_run_is_the_same_wherever_it_lies(llama_dir, tmp_path):
    shutil.copytree(llama_dir, tmp_path / "elsewhere")
    one = identity(opened(llama_dir), QuantConfig(), calibration="x")
    other = identity(opened(tmp_path / "elsewhere"), QuantConfig(), calibration="x")
    assert one == other
    assert json.loads(json.dumps(one)) == one


def test_every_setting_counts_but_what_is_written_later(llama_dir):
    model, default = opened(llama_dir), QuantConfig()
    plain = identity(model, default)
    assert differing(plain, identity(model, QuantConfig(embedding_bits=4))) == set()
    later = {"embedding_bits"}
    assert set(SETTINGS) == set(default.to_dict()) - later
    for name, value in SETTINGS.items():
        changed = identity(model, QuantConfig(**{name: value}))
        assert differing(plain, changed) == {name}


def test_the_type_and_the_code_that_computes_count(llama_dir, monkeypatch):
    plain = identity(opened(llama_dir), QuantConfig(), calibration="x")
    half = identity(opened(llama_dir, torch.bfloat16), QuantConfig(), calibration="x")
    assert differing(plain, half) == {"dtype"}
    other = identity(opened(llama_dir), QuantConfig(), calibration="y")
    assert differing(plain, other) == {"calibration"}
    monkeypatch.setattr(module, "__version__", "0.0")
    monkeypatch.setattr(module.library, "instruction_sets", lambda: ("another",))
    other = identity(opened(llama_dir), QuantConfig(), calibration="x")
    assert differing(plain, other) == {"version", "solver"}
    assert other["solver"] == "another"
    monkeypatch.setattr(module.library, "instruction_sets", tuple)
    assert identity(opened(llama_dir), QuantConfig())["solver"] == "torch"


@pytest.mark.parametrize(("kernels", "solver"), [(True, "cuda"), (False, "torch")])
def test_a_gpus_run_is_another(llama_dir, monkeypatch, kernels, solver):
    monkeypatch.setattr(module.kernels, "available", lambda: kernels)
    model = replace(opened(llama_dir), device=torch.device("cuda", 1))
    found = identity(model, QuantConfig())
    assert (found["device"], found["solver"]) == ("cuda", solver)


@pytest.mark.parametrize(
    ("tensor", "counts"),
    [
        ("model.embed_tokens.weight", True),
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.1.input_layernorm.weight", True),
        ("model.layers.2.mlp.down_proj.weight", True),
        # These are written later than the blocks.
        ("model.norm.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_one_bit_of_a_model(llama_dir, tmp_path, tensor, counts):
    """Blocks in the middle are told apart by their own digest."""
    folder = tmp_path / "m"
    shutil.copytree(llama_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name].clone()
    found = set()
    for _ in range(2):
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        source = open_model(folder)
        block = opened(folder).load_block(1).module
        found.add((fingerprint(source), digest(block)))
        tensors[tensor].view(-1).view(torch.int16)[-1] ^= 1
    assert len(found) == (2 if counts else 1)


def test_a_configuration_that_changes_the_forward_counts(llama_dir, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(llama_dir, folder)
    before = fingerprint(open_model(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert fingerprint(open_model(folder)) != before


def test_a_digest_sees_names_types_shapes_and_every_bit():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 4), nn.Linear(6, 4))
    changed = [copy.deepcopy(block) for _ in range(6)]
    assert digest(changed[0]) == digest(block)
    with torch.no_grad():
        changed[1][1].weight.view(torch.int32)[3, 5] ^= 1
        changed[2][0].bias.copy_(block[0].bias.flip(0))
        changed[3][0].weight, changed[3][1].weight = block[1].weight, block[0].weight
    changed[4][0].weight = nn.Parameter(block[0].weight.detach().view(6, 4))
    for weight in changed[5].parameters():
        weight.data = weight.data.view(torch.int32).view(torch.float32).to(torch.float64)
    named = nn.Sequential()
    for name, layer in zip(("0", "2"), block, strict=True):
        named.add_module(name, layer)
    digests = [digest(it) for it in (block, *changed[1:], named)]
    assert len(set(digests)) == len(digests)


def test_zeros_of_two_types_are_two_digests():
    """Their bytes are the same: float16 and bfloat16, and two shapes."""
    layers = [nn.Linear(6, 4, bias=False, dtype=kind) for kind in (torch.float16, torch.bfloat16)]
    layers.append(nn.Linear(4, 6, bias=False, dtype=torch.float16))
    for layer in layers:
        nn.init.zeros_(layer.weight)
    assert len({digest(layer) for layer in layers}) == 3


def test_processes_agree_on_all_but_the_solver():
    one = {"bits": 4, "solver": "avx512"}
    assert agreed([one, {**one, "solver": "avx2"}, one]) == {"bits": 4, "solver": "avx2+avx512"}
    with pytest.raises(UserError, match="process 1 differs from the first in bits; give all"):
        agreed([one, {**one, "bits": 3, "solver": "avx2"}])
