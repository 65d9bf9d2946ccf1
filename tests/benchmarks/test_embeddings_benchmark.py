"""What packing the embedding and the head costs, on a small model."""

import re

from conftest import llama_config, make_model

from benchmarks import embeddings


def test_every_way_of_packing_is_judged(text_file, tmp_path, monkeypatch, capsys):
    folder = make_model(tmp_path / "m", llama_config(tie_word_embeddings=True))
    monkeypatch.setattr(embeddings, "text_path", lambda name: text_file)
    monkeypatch.setattr(embeddings, "SEQLEN", 32)
    assert embeddings.main([str(folder), "--windows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"(\w+): gap ([+-]\d\.\d{5}) with (\d) bits, (.*)", it) for it in lines]
    rows = [it.group(1, 3, 4) for it in found if it]
    ways = [(bits, how) for bits in "84" for how in ("rounded", "head solved")]
    assert rows == [(text, *way) for text in ("wiki", "c4") for way in ways]
    gaps = {it.group(1, 3, 4): float(it.group(2)) for it in found if it}
    assert gaps["wiki", "4", "rounded"] != gaps["wiki", "4", "head solved"]
    assert abs(gaps["wiki", "8", "rounded"]) < abs(gaps["wiki", "4", "rounded"])
