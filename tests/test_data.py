"""From text to windows: the stream is kept, draws are seeded and without replacement, bad sources are named."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hf_prune import calibration, data
from hf_prune.calibration import calibration_batches
from hf_prune.errors import CalibrationError, ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a BOS that the tokenizer adds unless told not to."""
    vocab = {token: i for i, token in enumerate(["<bos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", model_max_length=16)


TOKENIZER = byte_tokenizer()
TEXT = "".join(f"line {i} of the text\n" for i in range(200))


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def draw(source: Path | str, **changes: int) -> list[dict[str, torch.Tensor]]:
    settings = {"num_samples": 10, "seq_len": 32, "batch_size": 4, "seed": 0} | changes
    return calibration_batches(TOKENIZER, source, **settings)


def samples(source: Path | str, **changes: int) -> list[tuple[int, ...]]:
    return [tuple(row) for batch in draw(source, **changes) for row in batch["input_ids"].tolist()]


@settings(deadline=None, max_examples=30)
@given(text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=300), window=st.integers(1, 40))
def test_windows_are_the_token_stream(text: str, window: int) -> None:
    stream = data.token_stream(TOKENIZER, text)
    assert TOKENIZER.decode(stream) == text  # nothing added, nothing lost
    if len(stream) < window:
        with pytest.raises(CalibrationError, match=f"{len(stream)} tokens, but 1 windows of {window}"):
            data.evaluation_windows(TOKENIZER, text, window)
        return
    windows = data.evaluation_windows(TOKENIZER, text, window)
    assert windows.dtype == torch.int64
    assert windows.shape == (len(stream) // window, window)
    assert torch.equal(windows.flatten(), stream[: windows.numel()])


def test_long_texts_give_no_warning(text_file: Path) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    try:
        tokenizer = byte_tokenizer()  # a new one: it warns only once
        data.evaluation_windows(tokenizer, TEXT, 64)
        calibration_batches(tokenizer, text_file, num_samples=1, seq_len=64, batch_size=1, seed=0)
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def test_batches_have_the_asked_shapes(text_file: Path) -> None:
    batches = draw(text_file)
    assert [batch["input_ids"].shape for batch in batches] == [(4, 32), (4, 32), (2, 32)]
    for batch in batches:
        assert batch["input_ids"].dtype == torch.int64
        assert torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"]))


def test_all_samples_are_all_windows_once(text_file: Path) -> None:
    windows = [tuple(row) for row in data.evaluation_windows(TOKENIZER, TEXT, 32).tolist()]
    drawn = samples(text_file, num_samples=len(windows))
    assert sorted(drawn) == sorted(windows)
    assert drawn != windows  # in random order
    assert len(set(windows)) == len(windows)  # or the test could not see a repetition


def test_seed_decides_and_more_samples_keep_the_earlier(text_file: Path) -> None:
    assert samples(text_file, seed=1) == samples(text_file, seed=1)
    assert samples(text_file, seed=1) != samples(text_file, seed=2)
    assert samples(text_file, num_samples=20)[:10] == samples(text_file, num_samples=10)
    assert samples(text_file, batch_size=3) == samples(text_file, batch_size=10)


def test_the_global_generator_is_neither_read_nor_moved(text_file: Path) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = samples(text_file)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert samples(text_file) == first


def test_pieces_are_the_text_and_end_at_line_ends(monkeypatch: pytest.MonkeyPatch, text_file: Path) -> None:
    whole = samples(text_file)
    monkeypatch.setattr(data, "_PIECE_CHARS", 50)
    monkeypatch.setattr(calibration, "_LAZY_PIECES", 1000)
    text = TEXT + "x" * 120 + "\n" + TEXT
    pieces = list(data.pieces(text))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 50
    assert all(piece.endswith("\n") for piece in list(data.pieces(TEXT)))
    assert samples(text_file) == whole  # bytes: pieces cannot change them


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_records_are_joined_by_blank_lines(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": "first", "other": "x"}, {"text": "", "other": "y"}, {"text": "second\nline", "other": "z"}]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert data.load_text(path) == "first\n\nsecond\nline"
    assert data.load_text(str(path), column="other") == "x\n\ny\n\nz"
    assert data.load_text(path, max_chars=10) == "first\n\nsec"
    with pytest.raises(CalibrationError, match=r"no column 'body' among \['other', 'text'\]"):
        data.load_text(path, column="body")


def test_text_files_are_read_as_they_are(text_file: Path) -> None:
    assert data.load_text(text_file) == TEXT
    assert data.load_text(str(text_file), max_chars=30) == TEXT[:30]


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/set", ("owner/set", None, "train")),
        ("set:raw", ("set", "raw", "train")),
        ("set:raw:test[:10%]", ("set", "raw", "test[:10%]")),
        ("set::validation", ("set", None, "validation")),
    ],
)
def test_names_of_datasets(monkeypatch: pytest.MonkeyPatch, source: str, asked: tuple[str, str | None, str]) -> None:
    calls = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        calls.append((path, name, split, streaming))
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    assert data.load_text(source) == "one\n\ntwo"
    assert data.load_text(source, max_chars=6) == "one\n\nt"
    assert calls == [(*asked, False), (*asked, True)]


def test_a_missing_dataset_says_what_was_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'no/such' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(CalibrationError, match=r"'no/such' is neither a file \(looked for .*no/such\) nor a dataset"):
        data.load_text("no/such")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n", "holds no text"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read as UTF-8"),
        ("a.csv", b"text\nhello\n", "expected a .txt, .jsonl, .json or .parquet file"),
        ("a.json", b"", "cannot be read .*the file is empty|holds no text"),  # the latter: datasets 4.0
        ("a.jsonl", b'{"text": "x"', "cannot be read"),
        ("a.jsonl", b'{"text": 3}\n', "holds int, expected text"),
        ("a.parquet", b"no parquet", "cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        data.load_text(tmp_path / name)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no file at .*nothing\.txt"):
        data.load_text(tmp_path / "nothing.txt")


def test_short_text_says_what_was_found_and_needed(text_file: Path) -> None:
    found = len(TEXT.encode())
    with pytest.raises(CalibrationError, match=f"{found:,} tokens, but 1000 windows of 32 need 32,000"):
        draw(text_file, num_samples=1000)


@pytest.mark.parametrize(
    ("name", "value"), [("num_samples", 0), ("seq_len", 0), ("batch_size", -1), ("seed", -1), ("seq_len", True)]
)
def test_numbers_out_of_range(text_file: Path, name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=name):
        draw(text_file, **{name: value})
