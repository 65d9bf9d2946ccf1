"""The form between reading and writing, and the table of formats that start from it."""

import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import PACKAGES, bloom_config, llama_config, make_model
from safetensors.torch import load_file

import gptq
from gptq import QuantConfig
from gptq.blockwise import empty_model
from gptq.blockwise.source import open_model
from gptq.checkpoints import assembly, canonical, formats
from gptq.checkpoints.embeddings import pack_embeddings
from gptq.checkpoints.names import FOLDER_FORMATS
from gptq.checkpoints.reading import attach, open_checkpoint
from gptq.checkpoints.settings import from_config
from gptq.checkpoints.writing import FOLDER
from gptq.errors import UserError
from gptq.files.lazy import LazyTensors

CONFIG = QuantConfig(method="rtn", scale_search="minmax", group_size=32, embedding_bits=16)
MODELS = {"llama": llama_config(), "bloom": bloom_config()}


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    """A model's folder and its checkpoint in format gptq."""
    folder = tmp_path_factory.mktemp(request.param)
    model = make_model(folder / "model", MODELS[request.param])
    gptq.quantize(model, None, CONFIG, save_safetensors=folder / "m.safetensors")
    return model, folder / "m.safetensors"


def bare(source):
    return empty_model.build(source.config, source.spec, torch.device("cpu"))


def from_file(model, file):
    source = open_model(model, weights=False)
    module = bare(source)
    return assembly.from_checkpoint(source, module, attach(module, source.spec, file))


def from_run(model, file):
    """As if the file's packed layers were a journal's."""
    source, (tensors, _) = open_model(model), open_checkpoint(file)
    layers = {name.rpartition(".")[0] for name in tensors if name.endswith(".qweight")}
    packed = tensors.renamed(lambda name: name if name.rpartition(".")[0] in layers else None)
    return assembly.from_blocks(source, bare(source), packed, from_config(CONFIG, {}))


def test_a_run_and_its_file_are_the_same_model(made):
    one, two = from_run(*made), from_file(*made)
    assert one.layers == two.layers
    assert list(one.tensors) == list(two.tensors)
    for name in one.tensors:
        assert torch.equal(one.tensors[name], two.tensors[name]), name
        for model in (one, two):
            assert model.tensors.shape(name) == model.tensors[name].shape
            assert model.tensors.dtype(name) == model.tensors[name].dtype
    assert one.tied == two.tied
    assert canonical.measure(two).settings.sym is one.settings.sym is False


def test_zero_points_are_as_they_are(made):
    stored, model = load_file(made[1]), from_file(*made)
    for layer in model.layers:
        zeros = model.tensors[f"{layer.name}.qzeros"]
        # No field of a v1 word is 15, so that adding one to each carries nowhere.
        assert torch.equal(zeros, stored[f"{layer.name}.qzeros"] + 0x11111111)


def test_nothing_is_read_until_it_is_asked_for(made):
    source, reads = open_model(made[0], weights=False), []
    module = bare(source)
    checkpoint = attach(module, source.spec, made[1])
    stored = checkpoint.tensors

    def read(name):
        reads.append(name)
        return stored[name]

    counted = LazyTensors(
        {name: stored.entry(name)._replace(read=partial(read, name)) for name in stored}
    )
    object.__setattr__(checkpoint, "tensors", counted)
    model = assembly.from_checkpoint(source, module, checkpoint)
    plain = canonical.unpack(model, model.layers)
    for row in formats.FORMATS.values():
        row.tensors(model)
        row.settings(model)
    assert reads == []
    first = model.layers[0].name
    weight = plain.tensors[f"{first}.weight"]
    assert weight.shape == plain.tensors.shape(f"{first}.weight")
    assert {name.rpartition(".")[0] for name in reads} == {first}


def test_embeddings_are_packed_and_unpacked(made):
    model = from_file(*made)
    packed = pack_embeddings(model, 8)
    assert packed.embedding_bits == 8
    assert pack_embeddings(model, 16) is model
    plain = canonical.unpack(packed, packed.embeddings)
    assert list(plain.tensors) == list(model.tensors)
    assert plain.layers == model.layers
    assert plain.tied == model.tied
    embedding = f"{model.source.spec.embed[0]}.weight"
    before, after = (it.tensors[embedding].float() for it in (model, plain))
    assert 0 < float((before - after).norm() / before.norm()) < 0.01


def test_names_and_the_table_agree():
    assert formats.folder_formats() == FOLDER_FORMATS
    assert all(row.name == name for name, row in formats.FORMATS.items())


def test_names_load_nothing_heavy():
    code = "import sys, gptq.checkpoints.names, gptq.cli.arguments; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGES, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_targets_and_defaults(made, tmp_path):
    model = from_file(*made)
    endings = {"m.pt": ".pt", "m.safetensors": ".safetensors", "m": FOLDER, "v1.5-chat": FOLDER}
    for name, container in endings.items():
        assert formats.container_of(tmp_path / name) == container
    layers = [model.facts(layer) for layer in model.layers]
    assert formats.default_format(layers, ".pt") == "gptq"
    assert formats.default_format(layers, ".safetensors") == "gptq_v2"
    assert formats.default_format(layers, FOLDER) == "compressed-tensors"
    with pytest.raises(
        UserError, match=r"is written to a \.pt or \.safetensors or folder, not to a"
    ):
        formats.write(model, tmp_path / "m", "gptq", container=".gguf")
