"""Mixtures: windows come from their texts in the shares asked, chats by the template, `self` from the model."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import TOKENIZER, byte_tokenizer
from tiny import write_checkpoint, write_text

from hf_prune import WandaConfig, calibration, data, prune
from hf_prune.calibration import calibration_batches, parts_of, training_windows
from hf_prune.errors import CalibrationError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def texts(tmp_path):
    """Three files, each of one letter only."""
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 4000)
    return {name: str(tmp_path / f"{name}.txt") for name in "abc"}


def letters(sources, num_samples=10, **options):
    settings_ = {"seq_len": 16, "batch_size": 4, "seed": 0} | options
    batches = calibration_batches(TOKENIZER, sources, num_samples=num_samples, **settings_)
    rows = [TOKENIZER.decode(row) for batch in batches for row in batch["input_ids"]]
    assert all(len(set(row)) == 1 for row in rows)
    return "".join(row[0] for row in rows)


def test_shares_hold_at_every_point(texts):
    found = letters([f"{texts['a']}:0.5", f"{texts['b']}:0.3", f"{texts['c']}:0.2"], 100)
    for done in range(1, 101):
        for letter, share in zip("abc", (0.5, 0.3, 0.2), strict=True):
            assert abs(found[:done].count(letter) - share * done) < 1.01
    assert letters([f"{texts['a']}:0.5", f"{texts['b']}:0.3", f"{texts['c']}:0.2"], 30) == found[:30]
    assert letters({texts["a"]: 1, texts["b"]: 3}, 40).count("b") == 30
    assert letters([texts["a"], texts["b"]], 10).count("a") == 5


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), st.integers(1, 60))
def test_turns(weights, number):
    shares = [weight / sum(weights) for weight in weights]
    turns = calibration._turns(shares, number)
    assert len(turns) == number
    for part, share in enumerate(shares):
        assert abs(turns.count(part) - share * number) < len(shares)


def test_a_mixture_of_one_is_the_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i} of the text\n" for i in range(200)))
    options = {"num_samples": 10, "seq_len": 32, "batch_size": 4, "seed": 3}
    single = calibration_batches(TOKENIZER, path, **options)
    for other in ([str(path)], {str(path): 0.2}, f"{path}:7"):
        again = calibration_batches(TOKENIZER, other, **options)
        assert all(torch.equal(x["input_ids"], y["input_ids"]) for x, y in zip(single, again, strict=True))


def test_weights_that_do_not_sum_are_normalised_and_said(texts, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_prune"):
        parts = parts_of([f"{texts['a']}:3", f"{texts['b']}:1"])
        assert not caplog.text  # asked several times in a run, said once
        letters([f"{texts['a']}:3", f"{texts['b']}:1"])
    assert [part.share for part in parts] == [0.75, 0.25]
    assert caplog.text.count("sum to 4; they are taken as") == 1
    caplog.clear()
    letters([f"{texts['a']}:0.75", f"{texts['b']}:0.25"])
    letters([texts["a"], texts["b"], texts["c"]])
    letters(f"{texts['a']}:3")
    assert not caplog.text


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "expected one or more different ones"),
        (["{a}", "{a}:0.3"], "expected one or more different ones"),
        (["{a}:0", "{b}:1"], "expected numbers above 0"),
        (["{a}:0.5", "{b}"], r"no weight for \['.*b.txt'\]"),
        (["{a}", "nothing.txt"], "no file at .*nothing.txt"),
        (["{a}:0.7", "nothing.jsonl:0.3"], "no file at .*nothing.jsonl"),
        (["self:nothing.jsonl"], "nothing.jsonl cannot be read as prompts"),
    ],
)
def test_bad_mixtures_are_refused_before_anything_is_loaded(texts, sources, message):
    with pytest.raises(CalibrationError, match=message):
        parts_of([source.format(**texts) for source in sources])


@pytest.mark.parametrize("weight", ["0.5", True, torch.ones(2, 8, dtype=torch.int64), float("nan")])
def test_weights_are_numbers(texts, weight):
    """A batch of token ids that is not in a list looks like weights by source."""
    with pytest.raises(CalibrationError, match="expected numbers above 0"):
        parts_of({texts["a"]: weight})


def test_a_part_that_is_too_short_is_named(texts, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    with pytest.raises(CalibrationError, match=r"short.txt has 5 tokens, but 5 windows of 16 need 80"):
        letters([texts["a"], str(tmp_path / "short.txt")])
    with pytest.raises(CalibrationError, match=r"a.txt: its share 0.01 of 10 windows is none"):
        letters([f"{texts['a']}:0.01", f"{texts['b']}:0.99"])


@pytest.fixture
def long_text(tmp_path, monkeypatch):
    """A file of 40 pieces, its text, and a list to which each piece comes that is tokenised."""
    text, seen = "".join(f"{i:09}\n" for i in range(2000)), []
    (tmp_path / "long.txt").write_text(text)
    monkeypatch.setattr(data, "_PIECE_CHARS", 500)
    monkeypatch.setattr(
        calibration, "token_stream", lambda tok, *piece: seen.append(piece) or data.token_stream(tok, *piece)
    )
    return tmp_path / "long.txt", text, seen


def test_long_texts_are_tokenised_in_part(long_text):
    path, text, seen = long_text
    options = {"num_samples": 10, "seq_len": 20, "batch_size": 4}
    drawn = {}
    for seed in (0, 1):
        batches = calibration_batches(TOKENIZER, path, seed=seed, **options)
        drawn[seed] = [TOKENIZER.decode(row) for batch in batches for row in batch["input_ids"]]
        assert all(row in text for row in drawn[seed])
        assert len(set(drawn[seed])) == 10
    assert drawn[0] != drawn[1]
    assert len(seen) == 4  # of 40: those that hold four times the windows


def test_of_a_long_text_to_train_on_as_much_is_tokenised_as_is_needed(long_text, monkeypatch):
    path, text, seen = long_text
    drawn = [TOKENIZER.decode(row) for row in training_windows(TOKENIZER, path, 20, number=10, seed=3)]
    assert len(seen) == 2  # of 40
    assert len(set(drawn)) == 10
    assert all(row in text for row in drawn)
    for number in (None, 10):  # all of it, in its order: where nothing says how much, and of a text that is not long
        monkeypatch.setattr(calibration, "_LAZY_PIECES", 16 if number is None else 40)
        windows = training_windows(TOKENIZER, path, 20, number=number)
        assert "".join(TOKENIZER.decode(row) for row in windows) == text


def test_chats_are_written_by_the_template(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]},
        {"prompt": "two?", "completion": "2"},
        {"text": "plain"},
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = byte_tokenizer()
    assert data.load_text(path, tokenizer=tokenizer) == (
        "user: hello\nassistant: good day\n\nuser: two?\nassistant: 2\n\nplain"
    )
    tokenizer.chat_template = TEMPLATE
    wanted = "<user>hello</><assistant>good day</>\n\n<user>two?</><assistant>2</>\n\nplain"
    assert data.load_text(path, tokenizer=tokenizer) == wanted
    batches = calibration_batches(tokenizer, path, num_samples=1, seq_len=len(wanted), batch_size=1, seed=0)
    assert tokenizer.decode(batches[0]["input_ids"][0]) == wanted
    path.write_text(json.dumps({"messages": [{"from": "x"}]}) + "\n")
    with pytest.raises(CalibrationError, match="a chat cannot be written as text"):
        data.load_text(path, tokenizer=None)


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</>"
    "{% endgeneration %}{% else %}{{ m.content }}</>{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHATS = [
    {"messages": [{"role": role, "content": text} for role, text in turns]}
    for turns in (
        [("system", "short"), ("user", "hé?"), ("assistant", "ja"), ("user", "two?"), ("assistant", "2")],
        [("assistant", "first"), ("user", "no answer")],
    )
]


def chat_file(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("template", [MARKED, PLAIN])
def test_only_what_the_assistant_says_has_labels(tmp_path, monkeypatch, template):
    monkeypatch.setattr(data, "_PIECE_CHARS", 11)  # answers go on in the next piece
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    path = chat_file(tmp_path / "chat.jsonl", *CHATS, {"prompt": "x", "completion": "y"}, {"text": "plain"})
    text = data.load_text(path, tokenizer=tokenizer)
    size = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    options = {"num_samples": 1, "seq_len": size, "batch_size": 1, "seed": 0, "assistant_only_loss": True}
    (batch,) = calibration_batches(tokenizer, path, **options)
    counts = batch["labels"] != -100
    assert torch.equal(batch["labels"][counts], batch["input_ids"][counts])
    assert torch.equal(batch["input_ids"][0], data.token_stream(tokenizer, text))
    first = (
        "<assistant>" if template == PLAIN else ""
    )  # who says it is a part of the answer, where nothing asks for one
    assert tokenizer.decode(batch["labels"][counts]) == f"ja</>2</>{first}first</>y</>plain"
    (windows,) = training_windows(tokenizer, path, size, assistant_only_loss=True)
    assert all(torch.equal(value, batch[name][0]) for name, value in data.labelled(windows).items())
    if template == MARKED:
        found = tokenizer.apply_chat_template(
            CHATS[0]["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
        )
        assert counts[0, : len(found["input_ids"])].tolist() == [bool(one) for one in found["assistant_masks"]]


def test_windows_without_an_answer_are_left_out(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN
    rows = [{"prompt": "u" * 300, "completion": "a" * 100}] * 3
    options = {"seq_len": 16, "batch_size": 4, "seed": 0, "assistant_only_loss": True}
    path = chat_file(tmp_path / "chat.jsonl", *rows)
    batches = calibration_batches(tokenizer, path, num_samples=18, **options)
    assert all((batch["labels"][:, 1:] != -100).any(1).all() for batch in batches)
    with pytest.raises(CalibrationError, match=r"chat.jsonl has 1,\d\d\d tokens, 309 of them answers, but 60 windows"):
        calibration_batches(tokenizer, path, num_samples=60, **options)


def test_answers_that_cannot_be_told_are_refused(tmp_path, texts):
    tokenizer = byte_tokenizer()
    options = {"num_samples": 1, "seq_len": 4, "batch_size": 1, "seed": 0, "assistant_only_loss": True}
    path = chat_file(tmp_path / "chat.jsonl", *CHATS)
    with pytest.raises(CalibrationError, match="without a chat template"):
        calibration_batches(tokenizer, path, **options)
    tokenizer.chat_template = TEMPLATE  # asks for an answer otherwise than it writes one
    with pytest.raises(CalibrationError, match="does not mark answers"):
        calibration_batches(tokenizer, path, **options)
    with pytest.raises(CalibrationError, match="found no chat"):
        calibration_batches(tokenizer, texts["a"], **options)
    path = chat_file(tmp_path / "chat.jsonl", {"messages": [{"from": "x"}]})
    tokenizer.chat_template = PLAIN
    with pytest.raises(CalibrationError, match="a chat cannot be written as text"):
        calibration_batches(tokenizer, path, **options)


def test_without_a_text_the_bundled_mixture_is_used(tmp_path, caplog):
    """Every kind of text is in it, and windows that were not calibrated with are left to measure on."""
    write_checkpoint(tmp_path / "dense", num_layers=2)
    config = WandaConfig(0.3, num_samples=6, seq_len=16)
    found = prune(tmp_path / "dense", config)
    assert "calibrating with the bundled mixture" in caplog.text
    assert found.plan == prune(tmp_path / "dense", config, calibration="general").plan
    assert found.perplexity_before is not None
    kinds = [json.loads(line)["kind"] for line in (calibration.TEXTS / "general.jsonl").read_text().splitlines()]
    assert min(kinds.count(kind) for kind in set(kinds)) > 9
    assert len(calibration.prompts_of("self")) == len(set(calibration.prompts_of("self"))) == 200


def test_a_mixture_with_what_the_model_says(tmp_path):
    write_checkpoint(tmp_path / "dense", num_layers=2)
    write_text(tmp_path / "text.txt", 4000, seed=1)
    mixture = [f"{tmp_path / 'text.txt'}:0.75", "self:0.25"]
    config = WandaConfig(0.3, num_samples=8, seq_len=16)
    found = prune(tmp_path / "dense", config, calibration=mixture, layers_on="memory")
    assert found.plan == prune(tmp_path / "dense", config, calibration=mixture).plan
    assert found.plan != prune(tmp_path / "dense", config, calibration=str(tmp_path / "text.txt")).plan
    with pytest.raises(CalibrationError, match="takes a model in memory"):
        prune(tmp_path / "dense", config, calibration=mixture, layers_on="disk")


def own_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **shape, eos_token_id=5, bos_token_id=0))


def test_the_model_answers_prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    prompts = ["first prompt", "a second one, longer", "third"]
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    model, options = own_model().train(), {"num_samples": 12, "seq_len": 24, "batch_size": 2}
    torch.manual_seed(7)
    state = torch.get_rng_state()

    def drawn(seed):
        return torch.cat(
            [x["input_ids"] for x in calibration_batches(TOKENIZER, f"self:{path}", seed=seed, model=model, **options)]
        )

    found = drawn(0)
    assert torch.equal(found, drawn(0))
    assert not torch.equal(found, drawn(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    text = TOKENIZER.decode(found.flatten())
    assert all(prompt in text for prompt in prompts)
    assert len(set(text)) > 60  # the rest is drawn, here nearly at random
    with pytest.raises(CalibrationError, match="takes a model in memory"):
        calibration_batches(TOKENIZER, f"self:{path}", seed=0, **options)


def test_an_answer_ends_at_the_end_token(monkeypatch):
    """With greedy logits that always give the end token an answer is that token, and a row holds no padding."""
    model = own_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[5] = 1e4 * model.model.norm.weight
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.embed_tokens.weight.fill_(1.0)
    found = list(calibration.answers(model, TOKENIZER, ["ab", "abcdef"], 8))
    assert [(len(prompt), answer.tolist(), ended) for prompt, answer, ended in found] == [
        (2, [5], True),
        (6, [5], True),
    ]
    assert TOKENIZER.decode(found[1][0]) == "abcdef"


def test_datasets_and_streams_are_texts_too(tmp_path):
    """Objects of `datasets` give the windows of a file with the same records, alone and in mixtures, chats as well."""
    import datasets

    records = [{"text": f"{i} " + "word and other " * 9} for i in range(60)]
    answer = {"role": "assistant", "content": "w " * 30}
    chats = [{"messages": [{"role": "user", "content": f"say {i}"}, answer]} for i in range(30)]
    options = {"num_samples": 4, "seq_len": 16, "batch_size": 4, "seed": 0}
    for rows in (records, chats):
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        (expected,) = calibration_batches(TOKENIZER, path, **options)
        whole = datasets.Dataset.from_list(rows)
        for source in (whole, whole.to_iterable_dataset(), [whole]):
            (found,) = calibration_batches(TOKENIZER, source, **options)
            assert torch.equal(found["input_ids"], expected["input_ids"])
    mixed = {datasets.Dataset.from_list(records): 1.0, datasets.Dataset.from_list(chats).to_iterable_dataset(): 3.0}
    (found,) = calibration_batches(TOKENIZER, mixed, **options)
    assert found["input_ids"].shape == (4, 16)
    assert calibration.is_text(mixed)
    tokens = datasets.Dataset.from_list([{"input_ids": [1, 2, 3]}])
    assert not calibration.is_text(tokens)  # rows for a Trainer
    with pytest.raises(CalibrationError, match="no column 'text'"):
        calibration_batches(TOKENIZER, datasets.Dataset.from_list([{"body": "x"}]), **options)
