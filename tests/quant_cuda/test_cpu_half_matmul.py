"""Products with weights of 16-bit floats against float64, and the output head that takes them."""

import pytest
import torch
from torch import nn

import gptq
from gptq import QuantConfig
from gptq.nn import HalfHead
from quant_cuda.cpu import half_matmul, library

pytestmark = pytest.mark.skipif(not library.compiled(), reason="the CPU code was not built")
TYPES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("name", library.compiled())
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 33), (100, 18), (576, 700)])
def test_against_float64(name, dtype, shape):
    if name not in library.instruction_sets():
        pytest.skip(f"this processor has no {name}")
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(shape[1], shape[0], generator=generator).to(dtype)
    for rows in (0, 1, 2, 5, 40):
        x = torch.randn(rows, shape[0], generator=generator)
        found = half_matmul.matmul(x, weight, library.compiled().index(name))
        exact = x.double() @ weight.double().T
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", library.instruction_sets())
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_number_is_itself(name, dtype):
    """Of 16 bits: with subnormals, infinities and NaN."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    weight = numbers.view(-1, 1).contiguous()
    found = half_matmul.matmul(torch.ones(1, 1), weight, library.compiled().index(name))
    assert torch.equal(found[0].nan_to_num(7), numbers.float().nan_to_num(7))
    assert torch.equal(found[0].isnan(), numbers.isnan())


def test_strides_and_what_does_not_fit():
    weight = torch.randn(9, 16).half()
    x = torch.randn(16, 3).T
    exact = (x.double() @ weight.double().T).view(3, 9)
    torch.testing.assert_close(half_matmul.matmul(x, weight).double(), exact, rtol=1e-5, atol=1e-5)
    assert half_matmul.matmul(torch.ones(2, 0, 16), weight).shape == (2, 0, 9)
    for bad in ((x.half(), weight), (x, weight.float()), (x[:, :8], weight), (x, weight[:, ::2])):
        with pytest.raises(ValueError, match="no product of"):
            half_matmul.matmul(*bad)


def quantized(model_dir, folder, **settings):
    config = QuantConfig(group_size=32, method="rtn", embedding_bits=16, **settings)
    gptq.quantize(model_dir, None, config, save=folder / "m.pt", device="cpu")
    return gptq.load(model_dir, folder / "m.pt", device="cpu", dtype="float32")[0]


def test_a_head_of_a_quantized_model(llama_dir, tmp_path):
    model = quantized(llama_dir, tmp_path)
    head = model.get_output_embeddings()
    assert type(head) is HalfHead
    assert head.weight.dtype == torch.float16
    assert model.dtype == torch.float32
    tokens = torch.randint(2, 300, (1, 9))
    with torch.no_grad():
        found = model(input_ids=tokens).logits
        wide = nn.Linear(*head.weight.T.shape, bias=False)
        wide.weight = nn.Parameter(head.weight.float())
        model.set_output_embeddings(wide)
        expected = model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_tied_head_stays_the_embeddings(bloom_dir, tmp_path):
    model = quantized(bloom_dir, tmp_path)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.lm_head.weight.dtype == torch.float32


def test_gradients_and_traces_go_through_torch(llama_dir, tmp_path):
    head = quantized(llama_dir, tmp_path).get_output_embeddings()
    x = torch.randn(2, head.in_features, requires_grad=True)
    head(x).sum().backward()
    torch.testing.assert_close(x.grad[0], head.weight.float().sum(0))
    with torch.no_grad():
        traced = torch.compile(head, backend="eager", fullgraph=True)
        torch.testing.assert_close(traced(x), head(x), rtol=1e-4, atol=1e-4)


def test_a_model_that_is_not_quantized_keeps_one_type(llama_dir):
    model, _ = gptq.load(llama_dir, device="cpu", dtype="float32")
    assert type(model.lm_head) is nn.Linear
    assert {p.dtype for p in model.parameters()} == {torch.float32}
