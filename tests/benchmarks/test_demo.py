"""What the demo's table says of each row."""

from rich.console import Console

from benchmarks import demo
from benchmarks.common.measures import machine, version


def test_a_row_is_labelled_by_what_was_run(llama_dir, text_file):
    row = demo.measure(llama_dir, None, text_file, write=False)
    # No GPU: the model of 16 bits is computed in float32, and takes that memory.
    assert row.dtype == "float32"
    assert row.bits_per_weight == 32
    console = Console(width=200)
    with console.capture() as capture:
        console.print(demo.table({"full": row}))
    text = capture.get()
    assert "full, in float32" in text
    assert "16 bit" not in text
    assert version() in text
    assert machine() in text
    assert f"{row.file_bytes / 1e6:.0f}" in text


def test_the_full_models_bytes_are_those_of_its_weights(llama_dir, text_file):
    import gptq

    model, _ = gptq.load(llama_dir)
    row = demo.measure(llama_dir, None, text_file, write=False)
    assert row.file_bytes == sum(it.numel() * it.element_size() for it in model.parameters())
