"""The packed head, solved for its inputs, against Hugging Face's forward and against rounding."""

import pytest
import torch
from conftest import bloom_config, llama_config, make_model
from transformers import AutoModelForCausalLM

import gptq
from gptq import QuantConfig, api
from gptq.blockwise.activations import batches, embed
from gptq.checkpoints.embeddings import pack_rows
from gptq.config import EMBEDDING_GROUPS
from gptq.data.windows import calibration_windows
from gptq.errors import UserError
from gptq.pipeline.head import head_hessian, head_solver
from quant_cuda import PackedWeight
from quant_cuda.reference import dequantize

RUN = {"nsamples": 8, "seqlen": 32}
KINDS = {
    # A vocabulary that ends within a word of zero points, and a short last group.
    "llama": llama_config(vocab_size=321, hidden_size=192),
    "llama tied": llama_config(tie_word_embeddings=True),
    "bloom": bloom_config(),
    "bloom untied": bloom_config(vocab_size=323, tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    return {kind: make_model(folder / kind, config) for kind, config in KINDS.items()}


@torch.no_grad()
def inputs_of_head(model, windows):
    """What a Hugging Face model gives its head, float64 (tokens, hidden)."""
    seen = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(windows)
    hook.remove()
    return seen[0].flatten(0, 1).double()


def windows_of(folder, text_file):
    return calibration_windows(text_file, api.open_model(folder).tokenizer(), 8, 32, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_statistics_are_those_of_the_heads_inputs(kind, models, text_file):
    windows = windows_of(models[kind], text_file)
    model = api.open_full(models[kind], "cpu", "float32")
    activations = embed(model, batches(windows, model.device))
    for index in range(model.block_count):
        activations.through(model.load_block(index))
    found = head_hessian(model, activations, QuantConfig())
    whole = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32).eval()
    x = inputs_of_head(whole, windows)
    torch.testing.assert_close(found.H.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert found.held_out is not None
    assert head_hessian(model, activations, QuantConfig(adaptive_damp=False)).held_out is None


def test_inputs_that_are_not_finite_are_refused(models, text_file):
    model = api.open_full(models["llama"], "cpu", "float32")
    activations = embed(model, batches(windows_of(models["llama"], text_file), model.device))
    activations.hidden.put(0, (activations.hidden.get(0)[0] * torch.nan,))
    with pytest.raises(UserError, match="lm_head: its inputs hold NaN"):
        head_hessian(model, activations, QuantConfig())


def weights_of(model):
    """The embedding's and the head's weights of a loaded quantized model, float32 (out, in)."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    packed = getattr(head, "packed", embedding.packed)
    return [dequantize(it(), torch.float32).T for it in (embedding.packed, packed)]


def rounded_weight(weight, bits):
    packed = pack_rows("x", weight, bits, sym=False)
    parts = (packed[f"x.{key}"] for key in ("qweight", "qzeros", "scales"))
    sizes = {"in_features": weight.shape[1], "zero_offset": 0}
    stored = PackedWeight(*parts, None, bits, EMBEDDING_GROUPS[bits], **sizes)
    return dequantize(stored, torch.float32).T


@pytest.mark.parametrize("order", ["gar", "act"])
@pytest.mark.parametrize("kind", KINDS)
def test_four_bits_lose_less_than_rounding(kind, order, models, text_file, tmp_path):
    config = QuantConfig(bits=8, group_size=32, order=order, embedding_bits=4)
    gptq.quantize(models[kind], text_file, config, save=tmp_path / "m.pt", **RUN)
    model, _ = gptq.load(models[kind], tmp_path / "m.pt", device="cpu", dtype="float32")
    whole = AutoModelForCausalLM.from_pretrained(models[kind], dtype=torch.float32).eval()
    x = inputs_of_head(whole, windows_of(models[kind], text_file))
    embedding, head = (it.double() for it in weights_of(model))
    full = [it.weight.detach() for it in (whole.get_input_embeddings(), whole.lm_head)]
    rounded = [rounded_weight(it, 4).double() for it in full]
    solved_error, rounding_error = (
        float((x @ (it - full[1].double()).T).square().sum()) for it in (head, rounded[1])
    )
    assert solved_error < 0.75 * rounding_error
    if KINDS[kind].tie_word_embeddings:
        assert torch.equal(embedding, head)
    else:
        # Nothing reads its rows but the tokens themselves.
        torch.testing.assert_close(embedding, rounded[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "settings", [{"embedding_bits": 8}, {"embedding_bits": 4, "method": "rtn"}]
)
def test_what_is_rounded_as_before(settings, models, text_file, tmp_path):
    config = QuantConfig(bits=8, group_size=32, **settings)
    gptq.quantize(models["llama"], text_file, config, save=tmp_path / "m.pt", **RUN)
    model, _ = gptq.load(models["llama"], tmp_path / "m.pt", device="cpu", dtype="float32")
    whole = AutoModelForCausalLM.from_pretrained(models["llama"], dtype=torch.float32)
    expected = rounded_weight(whole.lm_head.weight.detach(), settings["embedding_bits"])
    torch.testing.assert_close(weights_of(model)[1], expected, rtol=1e-6, atol=0)


def test_a_resumed_run_has_the_same_head(models, text_file, tmp_path):
    arguments = (models["llama tied"], text_file, QuantConfig(embedding_bits=4, group_size=32))
    gptq.quantize(*arguments, save=tmp_path / "whole.pt", **RUN)
    calls = []

    def stop(layer, total):
        calls.append(layer)
        if len(calls) == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptq.quantize(*arguments, save=tmp_path / "m.pt", progress=stop, **RUN)
    gptq.quantize(*arguments, save=tmp_path / "m.pt", resume=True, **RUN)
    assert (tmp_path / "m.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


def test_a_solver_keeps_groups_in_order(models):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 192, generator=generator) * torch.arange(192)
    hessian = gptq.solver.hessian.Hessian(x.T @ x / len(x))
    solve = head_solver(hessian, QuantConfig(order="act"), 4)
    solution = solve(torch.randn(40, 192, generator=generator))
    assert torch.equal(solution.g_idx.long(), torch.arange(192) // EMBEDDING_GROUPS[4])
    assert (solution.bits, solution.group_size) == (4, EMBEDDING_GROUPS[4])
