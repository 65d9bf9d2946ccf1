"""The loop for one sequence by a captured step, against transformers' own loop.

Where there is no GPU, a step that is captured there runs anew each time.
"""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.streamers import BaseStreamer

from gptq.inference import cuda_graph, decoding
from gptq.inference.cuda_graph import CapturedStep

PROMPT = torch.tensor([[3, 50, 7, 19, 120]])


def again(forward, device, mode):
    """As cuda_graph.capture, for any device."""
    for _ in range(cuda_graph.WARM_UP_STEPS):
        forward()
    with mode:
        result = forward()

    def replay():
        result.copy_(forward())

    return replay, result


@pytest.fixture
def model(model_dir, monkeypatch):
    monkeypatch.setattr(cuda_graph, "capture", again)
    monkeypatch.setattr(decoding, "_kind", lambda _: CapturedStep)
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


class Streamed(BaseStreamer):
    """The tokens that a streamer got, the prompt first; None at the end."""

    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append(None)


def both(model, **settings):
    """Ids and what a streamer got by both loops."""
    results = []
    for is_ours in (False, True):
        torch.manual_seed(5)
        streamer = Streamed()
        own = (
            {"custom_generate": partial(decoding.decode, CapturedStep, streamer)} if is_ours else {}
        )
        ids = model.generate(
            PROMPT,
            attention_mask=torch.ones_like(PROMPT),
            streamer=streamer,
            pad_token_id=0,
            **settings,
            **own,
        )
        results.append((ids.tolist(), streamer.got))
    return results


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 0.9, "top_p": 0.9},
    ],
)
@pytest.mark.parametrize("room", [512, 4])
def test_tokens_are_those_of_generate(settings, room, model, monkeypatch):
    # With little room the cache is doubled on the way.
    monkeypatch.setattr(CapturedStep, "room", lambda _: room)
    theirs, ours = both(model, max_new_tokens=40, eos_token_id=None, **settings)
    assert len(theirs[0][0]) == 45
    assert ours == theirs


def test_the_caches_are_as_large_as_needed(model, monkeypatch):
    sizes = []
    capture = CapturedStep.__init__

    def watched(self, model, length):
        sizes.append(length)
        capture(self, model, length)

    monkeypatch.setattr(CapturedStep, "__init__", watched)
    monkeypatch.setattr(CapturedStep, "room", lambda seen: max(6, seen))
    both(model, max_new_tokens=40, eos_token_id=None, do_sample=False)
    assert sizes == [11, 22, 44]
    sizes.clear()
    both(model, max_new_tokens=decoding.FEWEST - 1, eos_token_id=None, do_sample=False)
    assert sizes == []


def test_it_ends_where_generate_does(model):
    ids = model.generate(PROMPT, max_new_tokens=30, do_sample=False, eos_token_id=None)
    end = int(ids[0, 20])
    theirs, ours = both(model, max_new_tokens=30, do_sample=False, eos_token_id=end)
    assert len(theirs[0][0]) < 35
    assert ours == theirs


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_other_caches_that_a_model_asks_for(cache, model):
    model.generation_config = GenerationConfig(cache_implementation=cache, disable_compile=True)
    theirs, ours = both(model, max_new_tokens=20, do_sample=False, eos_token_id=None)
    assert ours == theirs


@pytest.mark.parametrize(
    "settings", [{"use_cache": False}, {"prefill_chunk_size": 3}, {"output_attentions": True}]
)
def test_other_settings_of_a_caller(settings, model):
    theirs, ours = both(model, max_new_tokens=20, do_sample=False, eos_token_id=None, **settings)
    assert ours == theirs


def test_models_that_cannot_be_captured(model, monkeypatch):
    assert decoding.arguments(model) != {}
    monkeypatch.undo()
    assert decoding.arguments(model) == {}
