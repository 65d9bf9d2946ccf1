"""Only .gguf files need the gguf package."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = """
import sys
sys.modules["gguf"] = None
from pathlib import Path
import gptq
from gptq.convert import convert
model, text, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
run = {"nsamples": 8, "seqlen": 32}
config = gptq.QuantConfig(group_size=32, sym=True)
gptq.quantize(model, text, config, save=folder / "m.pt", save_dir=folder / "m", **run)
out = folder / "s.safetensors"
gptq.quantize(model, text, config, average_bits=4.5, save_safetensors=out, **run)
gptq.load(model, folder / "m.pt")
gptq.load(folder / "m")
convert(folder / "m", folder / "ct", format="compressed-tensors")
try:
    gptq.quantize(model, text, config, save=folder / "m.gguf", **run)
except ModuleNotFoundError as error:
    print(error)
"""


def test_other_formats_do_not_need_it(llama_dir, text_file, tmp_path):
    command = [sys.executable, "-c", RUN, *map(str, (llama_dir, text_file, tmp_path))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "import of gguf halted" in done.stdout
