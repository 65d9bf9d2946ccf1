"""Windows against straightforward reimplementations; text recovered byte by byte."""

import hashlib
import json
import logging
import random
import struct
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gptq import calibration
from gptq.calibration import calibration_windows, evaluation_windows, text_fingerprint
from gptq.errors import UserError

EOS = "</s>"


def byte_tokenizer(eos: str | None = EOS, bos: bool = False, **options) -> PreTrainedTokenizerFast:
    """One token per byte, so that decoding gives the very text that was tokenised."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.add_special_tokens(["<s>"])
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, **options)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def text_of(path: str | Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """All the text that is made of a file."""
    return tokenizer.decode(evaluation_windows(path, tokenizer, seqlen=1).flatten())


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(*records: object) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def random_text(length: int, seed: int = 7) -> str:
    return "".join(random.Random(seed).choices("abcdefgh \n", k=length))


def assert_one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(error.value)


# Windows of a text


@pytest.mark.parametrize("length", [33, 34, 400])
def test_calibration_draws_the_windows_of_gptq_for_llama(tmp_path, tokenizer, length):
    text = random_text(length)
    path = write(tmp_path / "some.utf8", text)
    ids = tokenizer(text).input_ids
    random.seed(11)
    starts = [random.randint(0, len(ids) - 32 - 1) for _ in range(9)]
    expected = torch.tensor([ids[start : start + 32] for start in starts])

    before = random.getstate()
    windows = calibration_windows(str(path), tokenizer, nsamples=9, seqlen=32, seed=11)

    assert windows.dtype == torch.int64
    assert torch.equal(windows, expected)
    assert random.getstate() == before


def test_a_text_of_exactly_one_window(tmp_path, tokenizer):
    text = random_text(32)
    path = write(tmp_path / "one.txt", text)
    ids = torch.tensor([tokenizer(text).input_ids])
    assert torch.equal(calibration_windows(path, tokenizer, 3, 32, seed=0), ids.repeat(3, 1))
    assert torch.equal(evaluation_windows(path, tokenizer, 32), ids)


def test_seeds_differ(tmp_path, tokenizer):
    path = write(tmp_path / "text.txt", random_text(5000))
    first, again, other = (calibration_windows(path, tokenizer, 4, 16, s) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("limit", "count"), [(None, 3), (2, 2), (9, 3)])
def test_evaluation_windows_follow_one_another(tmp_path, tokenizer, limit, count):
    text = random_text(109)
    path = write(tmp_path / "text.txt", text)
    windows = evaluation_windows(path, tokenizer, 32, limit)
    assert windows.dtype == torch.int64
    ids = tokenizer(text).input_ids
    assert windows.tolist() == [ids[i : i + 32] for i in range(0, 32 * count, 32)]


def test_home_and_byte_order_mark(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "text.txt", "\ufeffOne\r\ntwo")
    assert text_of("~/text.txt", tokenizer) == "One\ntwo"


def test_special_tokens_are_the_tokenizers_own(tmp_path):
    tokenizer = byte_tokenizer(bos=True)
    path = write(tmp_path / "text.txt", "abc")
    assert text_of(path, tokenizer) == "<s>abc"


def test_a_long_text_gives_no_warning(tmp_path, caplog):
    tokenizer = byte_tokenizer(model_max_length=8)
    path = write(tmp_path / "text.txt", random_text(100))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        calibration_windows(path, tokenizer, 2, 16, seed=0)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records


# Named sets

HUB = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "text"),
    "ptb": ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet", "sentence"),
    "c4": ("allenai/c4", None, None, "text"),
}
FILES = {
    ("c4", "train"): "en/c4-train.00000-of-01024.json.gz",
    ("c4", "validation"): "en/c4-validation.00000-of-00008.json.gz",
    ("ptb", "train"): "penn_treebank/train/0000.parquet",
    ("ptb", "validation"): "penn_treebank/validation/0000.parquet",
    ("ptb", "test"): "penn_treebank/test/0000.parquet",
}


def hub_texts(split: str) -> list[str]:
    """Documents of 0 to 60 characters, other ones for each split, more than c4-new reads."""
    rng = random.Random(split)
    return [random_text(rng.randint(0, 60), seed=i) for i in range(1300)]


@pytest.fixture
def hub(monkeypatch) -> list[str]:
    """A hub that answers only the exact questions expected; the splits asked for."""
    asked: list[str] = []

    def load_dataset(path, name=None, data_files=None, split=None, revision=None):
        key = next(key for key, (repo, *_) in HUB.items() if repo == path)
        _, config, expected_revision, field = HUB[key]
        file = FILES.get((key, split))
        assert (name, revision) == (config, expected_revision)
        assert data_files == ({split: file} if file else None)
        asked.append(split)
        # Other columns must not get in the way.
        texts = hub_texts(split)
        return datasets.Dataset.from_dict({"url": ["x"] * len(texts), field: texts})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def draw_joined(ids: list[int], nsamples: int, seqlen: int, seed: int) -> list[list[int]]:
    random.seed(seed)
    windows = []
    for _ in range(nsamples):
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return windows


def draw_documents(texts: list[str], tokenizer, nsamples: int, seqlen: int, seed: int):
    random.seed(seed)
    windows = []
    for _ in range(nsamples):
        while True:
            ids = tokenizer(texts[random.randint(0, len(texts) - 1)]).input_ids
            if len(ids) > seqlen:
                break
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return windows


@pytest.mark.parametrize(
    ("name", "separator"), [("wikitext2", "\n\n"), ("ptb", "\n\n"), ("ptb-new", " ")]
)
def test_joined_sets_calibrate_on_their_train_split(hub, tokenizer, name, separator):
    ids = tokenizer(separator.join(hub_texts("train"))).input_ids
    windows = calibration_windows(name, tokenizer, nsamples=6, seqlen=40, seed=3)
    assert windows.tolist() == draw_joined(ids, 6, 40, seed=3)
    assert hub == ["train"]


@pytest.mark.parametrize("name", ["c4", "c4-new"])
def test_c4_calibrates_on_one_document_per_window(hub, tokenizer, name):
    windows = calibration_windows(name, tokenizer, nsamples=20, seqlen=40, seed=3)
    assert windows.tolist() == draw_documents(hub_texts("train"), tokenizer, 20, 40, seed=3)
    assert hub == ["train"]


@pytest.mark.parametrize(
    ("name", "separator", "split"),
    [("wikitext2", "\n\n", "test"), ("ptb", "\n\n", "validation"), ("ptb-new", " ", "test")],
)
def test_joined_sets_evaluate_on_all_of_a_split(hub, tokenizer, name, separator, split):
    ids = tokenizer(separator.join(hub_texts(split))).input_ids
    windows = evaluation_windows(name, tokenizer, seqlen=40)
    assert len(windows) == len(ids) // 40
    assert windows.flatten().tolist() == ids[: len(windows) * 40]
    assert hub == [split]
    assert torch.equal(evaluation_windows(name, tokenizer, 40, limit=5), windows[:5])


def test_c4_evaluates_on_256_random_documents(hub, tokenizer):
    windows = evaluation_windows("c4", tokenizer, seqlen=40)
    assert windows.tolist() == draw_documents(hub_texts("validation"), tokenizer, 256, 40, seed=0)
    assert torch.equal(evaluation_windows("c4", tokenizer, 40, limit=5), windows[:5])
    assert hub == ["validation"] * 2


@pytest.mark.parametrize(("seqlen", "limit"), [(20, None), (2000, None), (20, 7)])
def test_c4_new_evaluates_on_the_first_1100_documents(hub, tokenizer, seqlen, limit):
    ids = tokenizer(" ".join(hub_texts("validation")[:1100])).input_ids
    windows = evaluation_windows("c4-new", tokenizer, seqlen, limit)
    assert len(windows) == (limit or min(256, len(ids) // seqlen))
    assert windows.flatten().tolist() == ids[: len(windows) * seqlen]


def test_c4_new_reads_no_more_than_1100_documents(hub, tokenizer):
    length = len(tokenizer(" ".join(hub_texts("validation")[:1100])).input_ids)
    assert evaluation_windows("c4-new", tokenizer, length).shape == (1, length)
    with pytest.raises(UserError, match=f"c4-new: the text is {length} tokens"):
        evaluation_windows("c4-new", tokenizer, length + 1)


def test_documents_as_long_as_a_window_are_passed_over(monkeypatch, tokenizer):
    texts = ["x" * 8] * 30 + ["abcdefghi"]
    documents = datasets.Dataset.from_dict({"text": texts})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: documents)
    windows = calibration_windows("c4", tokenizer, nsamples=4, seqlen=8, seed=0)
    assert tokenizer.batch_decode(windows) == ["abcdefgh"] * 4


def test_no_document_is_long_enough(monkeypatch, hub, tokenizer):
    monkeypatch.setattr(calibration, "MAX_DRAWS", 50)
    with pytest.raises(UserError, match=r"c4: none of 50 documents .* than 61 tokens.*--seqlen"):
        calibration_windows("c4", tokenizer, 1, 61, seed=0)


@pytest.mark.parametrize(
    "failure", [ConnectionError("no route\nto host"), RuntimeError(""), ValueError("no config")]
)
def test_an_unreachable_hub_names_the_way_out(monkeypatch, tokenizer, failure):
    def load_dataset(*_, **__):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=r"^ptb: cannot get ptb-text.*path of a local text"
    ) as error:
        evaluation_windows("ptb", tokenizer, 8)
    assert_one_line(error)
    assert type(failure).__name__ in str(error.value)


def test_a_name_wins_over_a_file_unless_it_is_a_path(monkeypatch, tmp_path, tokenizer, hub):
    monkeypatch.chdir(tmp_path)
    write(Path("c4"), "local text")
    assert text_of(Path("c4"), tokenizer) == "local text"
    assert text_of("./c4", tokenizer) == "local text"
    assert not hub
    evaluation_windows("c4", tokenizer, 8, limit=1)
    assert hub == ["validation"]


# Records

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "您好！"},
    {"role": "user", "content": "Bye"},
]
CHAT_TEXT = "Be kind.\n\nHuman: 你好\n\nAssistant: 您好！\n\nHuman: Bye"
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
RECORDS = [
    ({"text": "plain", "input": "i", "target": "t"}, "plain"),
    ({"instruction": "Sum: ", "input": "1+1", "output": "2"}, "Human: Sum: 1+1\n\nAssistant: 2"),
    ({"instruction": "Go", "input": None, "output": "ok"}, "Human: Go\n\nAssistant: ok"),
    ({"instruction": "Go", "output": "ok", "id": 4}, "Human: Go\n\nAssistant: ok"),
    ({"input": "问题", "target": "答案"}, "Human: 问题\n\nAssistant: 答案"),
    ({"messages": CHAT, "id": "a"}, CHAT_TEXT),
    ({"conversations": SHAREGPT}, "Human: Hi\n\nAssistant: Ho"),
    ({"conversations": CHAT}, CHAT_TEXT),
]


@pytest.mark.parametrize(("record", "text"), RECORDS)
def test_shapes_of_records(tmp_path, tokenizer, record, text):
    assert text_of(write(tmp_path / "one.jsonl", json_lines(record)), tokenizer) == text


@pytest.mark.parametrize(("eos", "between"), [(EOS, EOS), (None, "\n\n")])
def test_records_are_joined_in_any_file(tmp_path, eos, between):
    tokenizer = byte_tokenizer(eos)
    records = [{"text": "One."}, {"text": " "}, {"text": None}, {"text": "二"}, {"text": "3\n"}]
    expected = f"One.{between}二{between}3\n"
    lines = "\ufeff\r\n" + json_lines(*records).replace("\n", "\r\n") + "  \n"
    assert text_of(write(tmp_path / "a.jsonl", lines), tokenizer) == expected
    assert text_of(write(tmp_path / "a.JSON", lines), tokenizer) == expected
    listed = "\ufeff\n " + json.dumps(records, indent=1)
    assert text_of(write(tmp_path / "b.json", listed), tokenizer) == expected
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "c.parquet")
    assert text_of(tmp_path / "c.parquet", tokenizer) == expected


def test_parquet_records_of_mixed_shapes(tmp_path, tokenizer):
    mixed = [{"text": "a", "messages": None}, {"text": None, "messages": CHAT[1:3]}]
    datasets.Dataset.from_list(mixed).to_parquet(tmp_path / "m.parquet")
    expected = f"a{EOS}Human: 你好\n\nAssistant: 您好！"
    assert text_of(tmp_path / "m.parquet", tokenizer) == expected


def test_records_are_windows_of_one_stream(tmp_path, tokenizer):
    texts = [random_text(50, seed) for seed in range(8)]
    path = write(tmp_path / "t.jsonl", json_lines(*({"text": text} for text in texts)))
    ids = tokenizer(EOS.join(texts)).input_ids
    windows = calibration_windows(path, tokenizer, nsamples=10, seqlen=70, seed=5)
    assert windows.tolist() == draw_joined(ids, 10, 70, seed=5)


def test_chat_goes_through_the_tokenizers_template(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}\n{% endfor %}"
    )
    records = [{"conversations": SHAREGPT}, {"messages": CHAT[1:2]}, {"text": "t"}, {"text": "u"}]
    path = write(tmp_path / "chat.jsonl", json_lines(*records))
    # The template has closed the records itself: no second end-of-text token.
    expected = "[user]Hi</s>\n[assistant]Ho</s>\n[user]你好</s>\nt</s>u"
    assert text_of(path, tokenizer) == expected


def test_a_dated_chat_template_gives_the_same_text_every_day(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%s') %}{% endif %}"
        "{{ date_string }}: {{ messages[0].content }}"
    )
    path = write(tmp_path / "chat.jsonl", json_lines({"messages": CHAT[:1]}))
    assert text_of(path, tokenizer) == "1 Jan 2025: Be kind."


def test_a_chat_template_that_refuses(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path / "chat.jsonl", json_lines({"messages": CHAT}))
    with pytest.raises(UserError, match=r"line 1: .*chat template.*roles must alternate") as error:
        text_of(path, tokenizer)
    assert_one_line(error)


# Large files


def records_of(directory: Path, kind: str, count: int) -> Path:
    """`count` records of 10 characters, each with its number."""
    records = [{"text": f"record{i:04}"} for i in range(count)]
    path = directory / f"many.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(records).to_parquet(path, batch_size=5)
    elif kind == "json":
        write(path, json.dumps(records))
    else:
        write(path, json_lines(*records))
    return path


class Listening:
    """A tokenizer that keeps what it was given to tokenise."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.eos_token, self.chat_template = tokenizer.eos_token, tokenizer.chat_template

    def __call__(self, text: str, **options):
        self.text = text
        return self.tokenizer(text, **options)

    @property
    def numbers(self) -> list[int]:
        return [int(record.removeprefix("record")) for record in self.text.split(EOS)]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_large_file_of_records_is_sampled(monkeypatch, tmp_path, tokenizer, kind):
    monkeypatch.setattr(calibration, "MIN_TEXT", 1000)
    path = records_of(tmp_path, kind, count=2000)
    drawn = []
    for seed in (0, 0, 1):
        listening = Listening(tokenizer)
        calibration_windows(path, listening, nsamples=2, seqlen=20, seed=seed)
        drawn.append(listening.numbers)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == len(drawn[0]) == 100  # 1000 characters of records
    assert min(drawn[0]) < 500
    assert max(drawn[0]) > 1500


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_more_text_is_read_for_more_tokens(monkeypatch, tmp_path, tokenizer, kind):
    monkeypatch.setattr(calibration, "MIN_TEXT", 1000)
    path = records_of(tmp_path, kind, count=2000)
    listening = Listening(tokenizer)
    calibration_windows(path, listening, nsamples=10, seqlen=50, seed=0)
    assert len(listening.numbers) == 400  # 8 characters for each of 500 tokens
    evaluation_windows(path, listening, seqlen=50, limit=10)
    assert listening.numbers == list(range(400))
    evaluation_windows(path, listening, seqlen=50)
    assert listening.numbers == list(range(2000))


def test_a_large_text_is_read_from_its_start(monkeypatch, tmp_path, tokenizer):
    monkeypatch.setattr(calibration, "MIN_TEXT", 1000)
    text = "汉" * 300 + random_text(5000)
    path = write(tmp_path / "large.txt", text)
    listening = Listening(tokenizer)
    calibration_windows(path, listening, nsamples=2, seqlen=20, seed=0)
    assert listening.text == text[:1000]
    evaluation_windows(path, listening, seqlen=20, limit=1)
    assert listening.text == text[:1000]
    evaluation_windows(path, listening, seqlen=20)
    assert listening.text == text


# Bad input

LIST = "neither a file nor a known data set; pass one of c4, wikitext2, ptb, c4-new, ptb-new, or"


@pytest.mark.parametrize("name", ["wikitext", "gone/file.txt", "x" * 5000, "~nobody-here/a"])
def test_unknown_names_and_missing_files(tokenizer, name):
    for windows in (
        lambda: calibration_windows(name, tokenizer, 1, 8, seed=0),
        lambda: evaluation_windows(name, tokenizer, 8),
    ):
        with pytest.raises(UserError) as error:
            windows()
        assert str(error.value).startswith(f"{name}: {LIST} the path of a text")


def test_a_folder(tmp_path, tokenizer):
    with pytest.raises(UserError, match="is a folder; pass one"):
        evaluation_windows(tmp_path, tokenizer, 8)


BAD_FILES = [
    ("a.txt", b"", "has no text"),
    ("a.txt", b" \n \n", "has no text"),
    ("a.jsonl", b"", "has no text"),
    ("a.json", b"[]", "has no text"),
    ("a.jsonl", b'{"text": ""}\n', "has no text"),
    ("a.txt", "汉字".encode("gb18030"), "is not UTF-8"),
    ("a.jsonl", '{"text": "汉字"}'.encode("utf-16"), "is not UTF-8"),
    ("a.jsonl", b'{"text": "a"}\n\n{"text": "b"\n', "line 3: is not JSON"),
    ("a.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2: is not JSON"),
    ("a.json", b'{\n"text": "a"}', "line 1: is not JSON"),
    ("a.jsonl", b'{"text": "a"}\n"b"\n', "line 2: is of type str, not an object"),
    ("a.json", b'[{"text": "a"}, 3]', "record 2: is of type int, not an object"),
    ("a.jsonl", b'{"text": 5, "id": "a"}', r"text \(int\), id \(str\), but needs text"),
    ("a.jsonl", b'{"prompt": "a", "answer": "b"}', r"prompt \(str\), answer.*instruction/input"),
    ("a.jsonl", b"{}", "has the fields none, but needs"),
    ("a.jsonl", b'{"messages": "hi"}', r"messages \(str\), but needs .*list of role/content"),
    ("a.jsonl", b'{"messages": ["hi"]}', "line 1: a message is not an object"),
    ("a.jsonl", b'{"messages": [{"role": "user", "content": 3}]}', "content, both strings"),
    ("a.jsonl", b'{"messages": [{"role": "user"}]}', "content, both strings"),
    ("a.jsonl", b'{"messages": [{"role": "tool", "content": "3"}]}', "unknown role tool"),
    ("a.parquet", b"PAR1 and no more", "is not an intact Parquet file"),
    ("a.parquet", b"", "is not an intact Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_bad_files(tmp_path, tokenizer, name, content, message):
    path = write(tmp_path / name, content)
    for windows in (
        lambda: calibration_windows(path, tokenizer, 1, 1, seed=0),
        lambda: evaluation_windows(path, tokenizer, 1),
    ):
        with pytest.raises(UserError, match=message) as error:
            windows()
        assert_one_line(error)
        assert str(path) in str(error.value)


def test_a_bad_parquet_record_is_named(tmp_path, tokenizer):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"question": ["a"]}).to_parquet(path)
    with pytest.raises(UserError, match=r"row 1 of row group 1: has the fields question \(str\)"):
        evaluation_windows(path, tokenizer, 1)


def test_a_text_shorter_than_a_window(tmp_path, tokenizer):
    path = write(tmp_path / "short.txt", "x" * 31)
    message = "short.txt: the text is 31 tokens, one window is 32; pass a smaller --seqlen"
    with pytest.raises(UserError, match=message):
        calibration_windows(path, tokenizer, 1, 32, seed=0)
    with pytest.raises(UserError, match=message):
        evaluation_windows(path, tokenizer, 32)


@pytest.mark.parametrize(
    ("nsamples", "seqlen", "message"),
    [(0, 8, "nsamples must be at least 1, not 0"), (1, -1, "seqlen must be at least 1, not -1")],
)
def test_calibration_sizes(tmp_path, tokenizer, nsamples, seqlen, message):
    path = write(tmp_path / "text.txt", "text")
    with pytest.raises(UserError, match=message):
        calibration_windows(path, tokenizer, nsamples, seqlen, seed=0)


@pytest.mark.parametrize(("seqlen", "limit"), [(0, None), (8, 0)])
def test_evaluation_sizes(tmp_path, tokenizer, seqlen, limit):
    path = write(tmp_path / "text.txt", "text")
    with pytest.raises(UserError, match=r"(seqlen|limit) must be at least 1, not 0"):
        evaluation_windows(path, tokenizer, seqlen, limit)


# Fingerprint


def test_fingerprint_is_of_shape_and_tokens():
    windows = torch.tensor([[1, 2, 3], [4, 5, 260]])
    content = b"(2, 3)" + struct.pack("<6q", 1, 2, 3, 4, 5, 260)
    assert text_fingerprint(windows) == hashlib.sha256(content).hexdigest()[:16]
    assert text_fingerprint(windows.to(torch.int32)) == text_fingerprint(windows)
    assert text_fingerprint(windows.T.contiguous().T) == text_fingerprint(windows)
    others = [windows.view(3, 2), windows[:1], windows.flip(0), windows + 1]
    assert len({text_fingerprint(other) for other in [windows, *others]}) == 5
