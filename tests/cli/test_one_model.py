"""A command opens the model once and builds the empty model once."""

import pytest

from gptq.blockwise import empty_model
from gptq.blockwise import source as sources
from gptq.cli.run import main


@pytest.mark.parametrize("save", [[], ["--save", "m.pt"]])
def test_quantizing_and_evaluating(llama_dir, text_file, tmp_path, monkeypatch, capsys, save):
    monkeypatch.chdir(tmp_path)
    calls = []
    for module, name in ((empty_model, "build"), (sources, "open_full_weights")):
        function = getattr(module, name)

        def counted(*args, function=function, name=name):
            calls.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, counted)
    argv = [llama_dir, text_file, "--wbits", "4", "--groupsize", "32", "--device", "cpu", *save]
    argv += ["--nsamples", "2", "--seqlen", "32", "--refine", "0", "--eval", "--eval-windows", "2"]
    assert main(None, list(map(str, argv))) == 0
    assert "perplexity words.txt" in capsys.readouterr().out
    assert sorted(calls) == ["build", "open_full_weights"]
