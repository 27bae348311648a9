"""Zero-shot accuracy equals log-likelihoods summed by hand; bad question files are refused."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from test_evaluation import byte_tokenizer, tiny_llama

from hf_prune.errors import CalibrationError, ConfigError
from hf_prune.evaluation import zero_shot
from hf_prune.evaluation.estimates import share_of

TOKENIZER = byte_tokenizer()
TOKENIZER.eos_token = "!"
CHOICES = ["a dog", "the lazy fox", "all", "jumps over it"]
QUESTIONS = [{"context": f"Number {i} is", "choices": CHOICES, "answer": i % 4} for i in range(12)]
PARTIAL = [
    {"context": "", "choices": ["x", "y"], "prefixes": [f"{i} cats", "A dog"], "continuation": "ran.", "answer": i % 2}
    for i in range(8)
]


def write(path, questions):
    path.write_text("\n".join(json.dumps(question) for question in questions), encoding="utf-8")
    return path


def log_likelihood(model, context, continuation):
    """Sum over the continuation's bytes (one token each)."""
    ids = torch.tensor([TOKENIZER(context + continuation)["input_ids"]])
    start = len(TOKENIZER(context)["input_ids"])
    log_probs = model(ids).logits[0, :-1].log_softmax(-1)
    return float(log_probs.gather(1, ids[0, 1:, None])[start - 1 :].sum())


def test_accuracy_is_that_of_summed_log_likelihoods(tmp_path):
    model = tiny_llama().eval()
    write(tmp_path / "choices.jsonl", QUESTIONS)
    write(tmp_path / "partial.jsonl", PARTIAL)
    found = {report.task: report for report in zero_shot(model, TOKENIZER, [tmp_path])}
    right, right_norm = 0, 0
    with torch.no_grad():
        for question in QUESTIONS:
            sums = [log_likelihood(model, question["context"], " " + choice) for choice in CHOICES]
            norms = [value / len(choice) for value, choice in zip(sums, CHOICES, strict=True)]
            right += sums.index(max(sums)) == question["answer"]
            right_norm += norms.index(max(norms)) == question["answer"]
        partial = 0
        for question in PARTIAL:
            sums = [log_likelihood(model, prefix, " ran.") for prefix in question["prefixes"]]
            partial += sums.index(max(sums)) == question["answer"]
    assert found["choices"].accuracy.value == right / 12
    assert found["choices"].accuracy_norm == right_norm / 12
    assert found["partial"].accuracy.value == partial / 8
    assert found["partial"].accuracy_norm is None
    assert [found[name].num_questions for name in ("choices", "partial")] == [12, 8]
    assert found["choices"].accuracy == share_of(right, 12)


def test_a_single_choice_is_right_if_greedy_decoding_gives_it(tmp_path):
    model = tiny_llama().eval()
    context = "The quick brown"
    ids = torch.tensor([TOKENIZER(context + " ")["input_ids"]])
    best = TOKENIZER.decode(model(ids).logits[0, -1].argsort(descending=True)[:200])
    letter = next(character for character in best if character.isascii() and character.isalnum())
    expected = TOKENIZER.decode(model(ids).logits[0, -1].argmax()) == letter
    questions = [{"context": context, "choices": [" " + letter], "answer": 0}]
    (report,) = zero_shot(model, TOKENIZER, [write(tmp_path / "words.jsonl", questions)])
    space_is_greedy = TOKENIZER.decode(model(ids[:, :-1]).logits[0, -1].argmax()) == " "
    assert report.accuracy.value == float(expected and space_is_greedy)


def test_limit_takes_the_first_questions(tmp_path):
    path = write(tmp_path / "choices.jsonl", QUESTIONS)
    (report,) = zero_shot(tiny_llama().eval(), TOKENIZER, [path], limit=5)
    assert report.num_questions == 5


@pytest.mark.parametrize(
    "line", ["not json", "[]", '{"context": "x", "choices": "y", "answer": 0}', '{"context": "", "choices": ["a"]}', ""]
)
def test_bad_files_are_refused(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"bad\.jsonl"):
        zero_shot(tiny_llama(), TOKENIZER, [path])


def test_nothing_to_do_and_a_missing_library_are_errors(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="no zero-shot task"):
        zero_shot(tiny_llama(), TOKENIZER, [tmp_path])
    with pytest.raises(CalibrationError, match=r"missing\.jsonl"):
        zero_shot(tiny_llama(), TOKENIZER, [tmp_path / "missing.jsonl"])
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match="pip install"):
        zero_shot(tiny_llama(), TOKENIZER, [tmp_path])
