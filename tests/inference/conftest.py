"""What several tests of inference watch."""

import pytest

from quant_cuda.cpu import decoder_block


@pytest.fixture
def compiled_steps(monkeypatch):
    """A list that gets an entry for each block and token that compiled code runs."""
    calls = []
    compiled_run = decoder_block.run

    def run(blocks, *args):
        calls.extend(blocks)
        return compiled_run(blocks, *args)

    monkeypatch.setattr(decoder_block, "run", run)
    return calls
