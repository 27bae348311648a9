"""Several texts against a dense model, intervals, what a model writes: laws with numbers; bad input before loading."""

from __future__ import annotations

import json
import math

import pytest
import scipy.stats
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_prune import MagnitudeConfig, prune
from hf_prune import evaluation as ev
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.cli.main import app
from hf_prune.errors import CalibrationError, ConfigError
from hf_prune.evaluation.estimates import mean_of, share_of
from hf_prune.evaluation.generation import loops


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality")
    tiny.write_checkpoint(folder / "dense")
    for seed, name in enumerate(("a", "b")):
        tiny.write_text(folder / f"{name}.txt", 400 + 100 * seed, seed=seed)
    dense, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "dense"),
        AutoTokenizer.from_pretrained(folder / "dense"),
    )
    result = prune(dense, MagnitudeConfig(0.4))
    save_pruned(result.model, folder / "pruned", tokenizer=tokenizer)
    return folder, dense.eval(), result.model.eval(), tokenizer


# --- estimates --------------------------------------------------------------------------------------------------------


def test_intervals_of_means_are_those_of_the_normal_law_and_hold_the_truth():
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(400, generator=generator, dtype=torch.float64)
    found = mean_of([sample])
    expected = 1.96 * float(sample.std()) / 20
    assert found.value == pytest.approx(float(sample.mean()))
    assert found.high - found.low == pytest.approx(2 * expected, rel=0.05)
    # two samples of the same spread: the mean of means has a spread smaller by the root of 2
    pair = mean_of([sample, sample.flip(0)])
    assert pair.high - pair.low == pytest.approx(2 * expected / math.sqrt(2), rel=0.07)
    hits = sum((own := mean_of([torch.randn(40, generator=generator)], seed=i)).low < 0 < own.high for i in range(40))
    assert hits >= 33
    assert mean_of([torch.ones(7)]) == ev.Estimate(1.0)  # too few for an interval


@pytest.mark.parametrize(("number", "of"), [(0, 40), (7, 40), (40, 40)])
def test_intervals_of_shares_are_wilsons(number, of):
    found = share_of(number, of)
    expected = scipy.stats.binomtest(number, of).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


# --- several texts ----------------------------------------------------------------------------------------------------


def test_ratios_are_paired_and_their_mean_is_geometric(material):
    folder, dense, pruned, tokenizer = material
    texts = [str(folder / "a.txt"), str(folder / "b.txt")]
    found = ev.evaluate(pruned, tokenizer, texts, dense=dense, window=16, progress=False)
    alone = {}
    for name, model in (("dense", dense), ("pruned", pruned)):
        contents = [(folder / f"{text}.txt").read_text() for text in "ab"]
        alone[name] = [ev.perplexity(model, tokenizer, t, window=16, progress=False).perplexity for t in contents]
    for row, theirs, own in zip(found.texts, alone["dense"], alone["pruned"], strict=True):
        assert (row.dense_perplexity, row.perplexity.value) == pytest.approx((theirs, own), rel=1e-6)
        assert row.ratio.value == pytest.approx(own / theirs, rel=1e-6)
        assert row.ratio.low < row.ratio.value < row.ratio.high
        # pairs: the windows' own difficulty is not in the interval of the ratio
        assert row.ratio.high / row.ratio.low < row.perplexity.high / row.perplexity.low
    assert found.ratio.value == pytest.approx(math.prod(row.ratio.value for row in found.texts) ** 0.5)
    same = ev.evaluate(dense, tokenizer, texts, dense=dense, window=16, progress=False)
    assert (same.ratio.value, same.ratio.low, same.ratio.high) == (1.0, 1.0, 1.0)


def test_eval_names_model_and_texts(material, tmp_path):
    folder = material[0]
    texts = [str(folder / "a.txt"), str(folder / "b.txt")]
    questions = tmp_path / "words.jsonl"
    lines = [{"context": f"w{i}", "choices": ["w1 w2", "w3"], "answer": i % 2} for i in range(8)]
    questions.write_text("\n".join(map(json.dumps, lines)))
    command = ["eval", folder / "pruned", "--text", texts[0], "--text", texts[1], "--dense", folder / "dense"]
    command += ["--window", 16, "--task", questions, "--generate", 32]
    run = CliRunner().invoke(app, [*map(str, command), "--json"])
    assert run.exit_code == 0, run.output
    values = json.loads(run.stdout)
    assert (values["model"], values["dense"]) == (str(folder / "pruned"), str(folder / "dense"))
    assert [row["text"] for row in values["texts"]] == texts
    assert values["ratio_low"] < values["ratio"] < values["ratio_high"]
    assert values["tasks"][0]["task"] == "words"
    assert 0 <= values["tasks"][0]["dense_accuracy"] <= 1
    assert values["generation"]["num_prompts"] == 32
    assert 0 <= values["generation"]["agreement"] <= 1
    assert values["generation"]["dense_length"] > 0
    shown = CliRunner().invoke(app, [*map(str, command[:-4]), "--max-windows", "9"])
    assert "ratio" in shown.stdout
    assert " to " in shown.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--text", "{folder}/a.txt", "--text", "{folder}/missing.txt"], "missing.txt"),
        (["--text", "{folder}/a.txt", "--text", "{folder}/short.txt"], "short.txt has 2 tokens"),
        (["--text", "{folder}/empty.txt"], "empty.txt' holds no text"),
        (["--text", "{folder}/a.txt", "--text", "{folder}/a.txt"], "one or more different"),
        (["--text", "{folder}/a.txt:0.5", "--text", "{folder}/b.txt:0.4"], "has a weight"),
        (["--text", "self"], "its own judge"),
        (["--text", "{folder}/a.txt", "--generate", "31"], "expected 32 or more"),
        (["--text", "{folder}/a.txt", "--generate", "40", "--prompts", "{folder}/few.jsonl"], "holds 1 prompts"),
        (["--text", "{folder}/a.txt", "--dense", "base"], "names the model it was pruned from"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(material, monkeypatch, options, said):
    folder = material[0]
    (folder / "short.txt").write_text("w1 w2")
    (folder / "empty.txt").write_text(" \n")
    (folder / "few.jsonl").write_text('{"prompt": "w1"}')
    monkeypatch.setattr("hf_prune.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    command = ["eval", str(folder / "dense"), "--window", "16", *(word.format(folder=folder) for word in options)]
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 2, run.output
    assert said in run.output


# --- generation -------------------------------------------------------------------------------------------------------


def test_a_loop_is_an_end_said_three_times():
    assert loops([5, 6, 7] * 4)
    assert loops([1, 2, 3, *[9] * 12])
    assert loops([0, *range(10), *range(10), *range(10)])
    assert not loops([5, 6, 7] * 3)  # nine tokens
    assert not loops([9] * 12 + [1])
    assert not loops([*range(10), *range(10)])
    assert not loops([])


def test_a_model_agrees_with_itself_and_less_with_a_pruned_one(material):
    _, dense, pruned, tokenizer = material
    prompts = [" ".join(tiny.WORDS[i : i + 5]) for i in range(40)]
    options = {"max_new_tokens": 20, "batch_size": 16}
    itself = ev.check_generation(dense, tokenizer, prompts, dense=dense, **options)
    assert itself.agreement.value == 1.0
    assert itself.dense.loops == itself.loops
    other = ev.check_generation(pruned, tokenizer, prompts, dense=dense, **options)
    assert other.agreement.high < 1.0
    assert other.dense == itself.dense
    # the definition, one token at a time
    lengths, ends = [], 0
    for prompt in prompts[:5]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            while ids.shape[1] < 25 and ids[0, -1] != tokenizer.eos_token_id:
                ids = torch.cat([ids, pruned(ids).logits[:, -1:].argmax(-1)], 1)
        lengths.append(ids.shape[1] - 5)
        ends += int(ids[0, -1] == tokenizer.eos_token_id)
    found = ev.check_generation(pruned, tokenizer, prompts[:5] * 8, **options)
    assert found.length.value == pytest.approx(sum(lengths) / 5)
    assert found.ends.value == pytest.approx(ends / 5)
    with pytest.raises(ConfigError, match="31 prompts"):
        ev.check_generation(dense, tokenizer, prompts[:31])
    with pytest.raises(CalibrationError, match="holds 200"):
        ev.read_prompts(1000)
