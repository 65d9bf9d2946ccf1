"""The CUDA kernels that decode one token: their source under the host's compiler, and on a GPU."""

import pytest
import torch
from helpers import emulated
from helpers.decoding import ROOM, Shape, make, run_and_compare
from helpers.products import packed

from quant_cuda.block_parts import WEIGHTS
from quant_cuda.cuda import decoder_block, operator

BLOOM = {"is_bloom": True, "key_heads": 4, "has_bias": True}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bits": (8,) * 7, "has_bias": True},
        {"bits": (4, 8, 4, 8, 8, 4, 4), "has_bias": True},
        {"heads": 3, "key_heads": 3, "hidden": 96, "has_head_norms": True},
        {"heads": 7, "key_heads": 1, "hidden": 224, "group_size": 128},
        {"dim": 64, "heads": 2, "key_heads": 1, "inner": 40},
        {"dim": 128, "heads": 5, "key_heads": 1, "hidden": 72},
        {"dim": 256, "heads": 1, "key_heads": 1, "has_head_norms": True},
        BLOOM,
        {**BLOOM, "bits": (8, 4, 4, 4, 4, 8, 4), "hidden": 96, "heads": 3, "key_heads": 3},
        {**BLOOM, "dim": 64, "heads": 5, "key_heads": 5, "inner": 1280, "group_size": 128},
        {**BLOOM, "dim": 128, "heads": 1, "key_heads": 1, "has_bias": False},
    ],
    ids=lambda changes: " ".join(changes) or "usual",
)
def test_shapes(kernels, dtype, changes):
    run_and_compare(kernels, Shape(**changes, dtype=dtype), blocks=2)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 127, 150, ROOM - 1])
@pytest.mark.parametrize("captured", [False, True], ids=["counted here", "position on the device"])
@pytest.mark.parametrize("changes", [{"has_head_norms": True}, BLOOM], ids=["llama", "bloom"])
def test_lengths(kernels, length, captured, changes):
    """Thread blocks without a position, and sets of lanes without one."""
    shape = Shape(**changes)
    run_and_compare(kernels, shape, length=length, captured=captured, processors=9)


def test_a_cache_without_room(host_library):
    """A position on the device is known there alone. On a GPU a trap would end all tests."""
    with pytest.raises(RuntimeError, match="decode failed: a trap"):
        run_and_compare(emulated.emulated(host_library), Shape(), length=ROOM, captured=True)


@pytest.mark.parametrize("rows", [2, 5, 8])
@pytest.mark.parametrize("changes", [{"has_bias": True}, BLOOM], ids=["llama", "bloom"])
def test_sequences(kernels, rows, changes):
    run_and_compare(kernels, Shape(**changes), rows=rows, length=70, blocks=2, processors=40)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("changes", [{"has_head_norms": True}, BLOOM], ids=["llama", "bloom"])
def test_every_order_of_threads(kernels, order, changes):
    kernels.settle(order, 1)
    run_and_compare(kernels, Shape(**changes), rows=2, length=90, processors=30)
    kernels.settle(0, 0)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("order", [0, 3, 4])
@pytest.mark.parametrize("changes", [{"has_head_norms": True}, BLOOM], ids=["llama", "bloom"])
def test_kernels_that_overlap(kernels, changes, order, which):
    """Of each two kernels the first runs when a thread of the second waits for it, or after all."""
    if kernels.device == "cuda" and not kernels.wgmma:
        pytest.skip("a GPU of another compute capability than 9.0")
    if kernels.device == "cpu":
        kernels.library.emulation_put_off(which)
    kernels.settle(order, 1)
    shape = Shape(**changes, inner=1024, group_size=128)
    run_and_compare(kernels, shape, rows=2, length=70, blocks=2, processors=60, overlaps=True)
    kernels.settle(0, 0)


def test_inputs_shared_by_thread_blocks(kernels):
    """The partial sums of the output and down products, which the next norm adds."""
    shape = Shape(hidden=64, heads=16, key_heads=16, inner=4096, has_bias=True)
    record, most = make(shape, kernels.device).block.record_for(60)
    splits = [record.weights[WEIGHTS.index(name)].splits for name in ("attended", "down")]
    assert most == max(splits) > 1
    run_and_compare(kernels, shape, blocks=2, processors=60)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dim": 16, "heads": 8, "key_heads": 8}, "heads of 16"),
        ({"bits": (4, 4, 3, 4, 4, 4, 4)}, "not in tiles"),
        ({"inner": 100, "group_size": 96}, "no multiple of 8"),
    ],
    ids=["head", "bits", "size"],
)
def test_what_is_refused(changes, reason):
    with pytest.raises(ValueError, match=reason):
        make(Shape(**changes), "cpu")


def test_another_order_of_inputs_is_refused():
    weight = operator.prepare(packed(4, 64, 64, 32, g_idx=True)[0])
    assert decoder_block.refuses([weight] * 7, 32) == "a weight whose inputs are in another order"


@pytest.mark.parametrize("change", [{"rows": 9}, {"dim": 40}, {"splits": 0}])
def test_the_launcher_refuses_what_it_cannot_run(kernels, change, monkeypatch):
    made = decoder_block._Token.__init__

    def init(self, **fields):
        made(self, **{**fields, **change})

    monkeypatch.setattr(decoder_block._Token, "__init__", init)
    with pytest.raises(RuntimeError, match="decode failed: invalid argument"):
        run_and_compare(kernels, Shape())
