"""`hf-prune sweep`: one table and one picture; it goes on where it was interrupted; bad input changes nothing."""

from __future__ import annotations

import json
import sys

import pytest
import tiny
import torch
from test_allocation import latency_table
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from hf_prune import RandomConfig, apply_plan, infer_structure, measure_latency, perplexity, prune
from hf_prune.cli.main import app
from hf_prune.cli.sweep import sweep
from hf_prune.errors import CheckpointError, ConfigError, HFPruneError
from hf_prune.plan import PruningPlan
from hf_prune.scores import METHODS

SWEEP = "hf_prune.cli.sweep"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    tiny.write_checkpoint(folder / "dense")
    tiny.write_text(folder / "text.txt", 400, seed=0)
    tiny.write_text(folder / "calibration.txt", 600, seed=1)
    return folder


@pytest.fixture
def common(material, monkeypatch):
    """Arguments of every sweep, without a clock; the scorings that it does are counted."""
    counts = {"score": [], "perplexity": []}
    module = sys.modules[SWEEP]
    score, measure = module.score, module.window_losses

    def counted_score(model, structure, config, **others):
        counts["score"].append((config.method, config.pruning_ratio))
        return score(model, structure, config, **others)

    def counted_perplexity(*arguments, **others):
        counts["perplexity"].append(1)
        return measure(*arguments, **others)

    monkeypatch.setattr(module, "score", counted_score)
    monkeypatch.setattr(module, "window_losses", counted_perplexity)
    monkeypatch.setattr(module, "_speed", lambda _: {"prefill_ms": 2.0, "decode_ms": 1.0, "latency_ms": 3.0})
    arguments = {
        "methods": ["magnitude", "wanda"],
        "ratios": [0.2, 0.4],
        "text": str(material / "text.txt"),
        "calibration": str(material / "calibration.txt"),
        "settings": {"num_samples": 4, "seq_len": 16},
        "window": 32,
    }
    model = AutoModelForCausalLM.from_pretrained(material / "dense")
    return model, AutoTokenizer.from_pretrained(material / "dense"), arguments, counts


def test_rows_are_what_prune_gives(common, material, tmp_path):
    model, tokenizer, arguments, counts = common
    allocations = ["uniform", "global", {"mlp": 1}]
    rows = sweep(model, tokenizer, tmp_path / "out", **arguments, allocations=allocations)
    assert len(rows) == 1 + 2 * 3 * 2
    assert rows[0]["method"] == "dense"
    text = (material / "text.txt").read_text()
    assert rows[0]["perplexity"] == perplexity(model, tokenizer, text, window=32).perplexity
    assert counts["score"] == [("magnitude", 0.2), ("wanda", 0.2)]  # once per method
    assert [row["allocation"] for row in rows[1:7:2]] == ["uniform", "global", '{"mlp": 1}']
    for row in rows[1:]:
        allocation = {"mlp": 1} if row["allocation"].startswith("{") else row["allocation"]
        values = {"method": row["method"], "pruning_ratio": row["pruning_ratio"], "allocation": allocation}
        config = RandomConfig.__mro__[1].from_dict(values | arguments["settings"])
        result = prune(model, config, tokenizer=tokenizer, calibration=arguments["calibration"])
        assert row["perplexity"] == pytest.approx(perplexity(result.model, tokenizer, text, window=32).perplexity)
        assert row["decoder_ratio"] == row["achieved_ratio"] == result.plan.achieved["decoder"]
        assert row["num_parameters"] == sum(p.numel() for p in result.model.parameters())
        assert row["times_dense"] == pytest.approx(row["perplexity"] / rows[0]["perplexity"])
        assert PruningPlan.load(tmp_path / "out" / row["plan"]) == result.plan
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.count("\n") == 2 + 13
    assert "| magnitude | global |" in table
    assert (tmp_path / "out" / "tradeoff.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == rows


def test_an_interrupted_sweep_goes_on_and_ends_the_same(common, tmp_path, monkeypatch):
    model, tokenizer, arguments, counts = common
    whole = sweep(model, tokenizer, tmp_path / "whole", **arguments)
    counts["score"].clear(), counts["perplexity"].clear()
    module = sys.modules[SWEEP]
    measure, left = module.window_losses, [3]

    def interrupted(*values, **others):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return measure(*values, **others)

    monkeypatch.setattr(module, "window_losses", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sweep(model, tokenizer, tmp_path / "out", **arguments)
    written = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert len(written) == 3
    assert counts["score"] == [("magnitude", 0.2), ("wanda", 0.2)]
    monkeypatch.setattr(module, "window_losses", measure)
    rows = sweep(model, tokenizer, tmp_path / "out", **arguments)
    assert [{**row, "prune_s": 0} for row in rows] == [{**row, "prune_s": 0} for row in whole]
    assert rows[:3] == written
    assert len(counts["perplexity"]) == 6  # each row once, and the dense model again to compare with
    assert len(counts["score"]) == 2  # the scores were kept too
    more = sweep(model, tokenizer, tmp_path / "out", **arguments | {"ratios": [0.4, 0.3], "methods": ["magnitude"]})
    assert [row["pruning_ratio"] for row in more] == [0.0, 0.4, 0.3]
    assert len(counts["perplexity"]) == 8
    assert (tmp_path / "out" / "results.md").read_text().count("\n") == 2 + 6  # all rows there are


def test_no_row_is_begun_when_the_time_is_over(common, tmp_path, caplog):
    model, tokenizer, arguments, _ = common
    rows = sweep(model, tokenizer, tmp_path / "out", **arguments, seconds=0)
    assert [row["method"] for row in rows] == ["dense"]
    assert "4 rows were not begun" in caplog.text
    assert len(sweep(model, tokenizer, tmp_path / "out", **arguments)) == 5


def test_scores_that_are_learnt_for_a_ratio_serve_no_other(common, tmp_path, monkeypatch):
    model, tokenizer, arguments, counts = common
    method = METHODS["magnitude"]
    monkeypatch.setitem(METHODS, "magnitude", type(method)(method.scores, needs_calibration=False, uses_ratio=True))
    sweep(model, tokenizer, tmp_path / "out", **arguments | {"methods": ["magnitude"]})
    assert counts["score"] == [("magnitude", 0.2), ("magnitude", 0.4)]
    assert len(list((tmp_path / "out" / "scores").iterdir())) == 2


def test_damaged_scores_are_computed_anew(common, tmp_path):
    model, tokenizer, arguments, counts = common
    first = sweep(model, tokenizer, tmp_path / "out", **arguments | {"methods": ["magnitude"], "ratios": [0.2]})
    path = tmp_path / "out" / "scores" / "magnitude.safetensors"
    path.write_bytes(b"nonsense")
    rows = sweep(model, tokenizer, tmp_path / "out", **arguments | {"methods": ["magnitude"]})
    assert len(counts["score"]) == 2
    assert rows[:2] == first
    assert rows[2]["perplexity"] > 0


def test_a_ratio_out_of_reach_is_noted_and_the_others_are_measured(common, tmp_path):
    model, tokenizer, arguments, _ = common
    settings = {"axes": ("attention",)}
    rows = sweep(
        model,
        tokenizer,
        tmp_path / "out",
        **arguments | {"methods": ["magnitude"], "ratios": [0.9, 0.2], "settings": settings},
    )
    assert rows[1]["perplexity"] is None
    assert "out of reach" in rows[1]["note"]
    assert rows[2]["perplexity"] > 0


def test_a_sweep_with_every_ratio_out_of_reach_has_a_table_and_no_picture(common, tmp_path):
    model, tokenizer, arguments, _ = common
    changes = {"methods": ["magnitude"], "ratios": [0.9], "settings": {"axes": ("attention",)}}
    rows = sweep(model, tokenizer, tmp_path / "out", **arguments | changes)
    assert "out of reach" in rows[1]["note"]
    assert "out of reach" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "tradeoff.png").exists()


def test_search_and_a_budget_of_time(common, tmp_path, monkeypatch):
    model, tokenizer, arguments, _ = common
    table = latency_table(infer_structure(model))  # made up: a clock would sometimes put the ratios out of reach
    measured = []
    monkeypatch.setattr(sys.modules[SWEEP], "measure_latency", lambda *_: measured.append(1) or table)
    settings = arguments["settings"] | {"budget": "latency", "search_evaluations": 4, "search_samples": 2}
    changes = {
        "methods": ["magnitude"],
        "ratios": [0.1, 0.2],
        "settings": settings,
        "allocations": ["search", "uniform"],
    }
    rows = sweep(model, tokenizer, tmp_path / "out", **arguments | changes | {"settings": settings})
    assert len(measured) == 1
    assert all(row.get("note") or abs(row["achieved_ratio"] - row["pruning_ratio"]) < 0.15 for row in rows)
    assert (tmp_path / "out" / "latency.json").exists()


def test_repairs_are_compared(common, tmp_path):
    model, tokenizer, arguments, counts = common
    changes = {"methods": ["magnitude"], "ratios": [0.4]}
    rows = sweep(model, tokenizer, tmp_path / "out", **arguments | changes, repairs=["none", "least_squares"])
    assert [row["repair"] for row in rows] == ["", "none", "least_squares"]
    assert len({row["perplexity"] for row in rows}) == 3
    assert counts["score"] == [("magnitude", 0.4)]
    with pytest.raises(ConfigError, match="repair: found 'glue'"):
        sweep(model, tokenizer, tmp_path / "other", **arguments, repairs=["glue"])


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["magic"]}, "method: found 'magic', expected one of"),
        ({"methods": []}, "methods: found none"),
        ({"ratios": []}, "ratios: found none"),
        ({"ratios": [0.2, 1.5]}, "pruning_ratio: found 1.5"),
        ({"allocations": ["uniform", "best"]}, "allocation: found 'best'"),
        ({"settings": {"allocation": "global"}}, r"settings: found \['allocation'\], which a sweep varies"),
        ({"settings": {"speed": 1}}, r"settings: unknown fields \['speed'\]"),
        ({"settings": {"axes": ("hidden",), "protect": ("x",)}}, "protect: 'x' matches none"),
        ({"text": "none.txt"}, "no file at"),
        ({"calibration": ["none.txt", "general"]}, "no file at"),
        ({"settings": {"num_samples": 9999}}, "windows of 256 need"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(changes, message, common, tmp_path):
    model, tokenizer, arguments, counts = common
    with pytest.raises(HFPruneError, match=message):
        sweep(model, tokenizer, tmp_path / "out", **arguments | changes)
    assert counts == {"score": [], "perplexity": []}
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_directory_of_something_else_is_refused(common, tmp_path):
    model, tokenizer, arguments, _ = common
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("all my work")
    with pytest.raises(ConfigError, match="is not empty and holds no sweep"):
        sweep(model, tokenizer, tmp_path / "other", **arguments)
    one = {"methods": ["magnitude"], "ratios": [0.2]}
    sweep(model, tokenizer, tmp_path / "out", **arguments | one)
    before = (tmp_path / "out" / "results.json").read_text()
    with pytest.raises(ConfigError, match=r"text differ\. Name"):  # no digest
        sweep(model, tokenizer, tmp_path / "out", **arguments | one | {"text": arguments["calibration"]})
    for changes in ({"window": 16}, {"settings": {"num_samples": 5, "seq_len": 16}}):
        with pytest.raises(ConfigError, match=f"is of another sweep: {next(iter(changes))} differ"):
            sweep(model, tokenizer, tmp_path / "out", **arguments | one | changes)
    assert (tmp_path / "out" / "results.json").read_text() == before
    (tmp_path / "out" / "results.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        sweep(model, tokenizer, tmp_path / "out", **arguments)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be used"):
        sweep(model, tokenizer, tmp_path / "file", **arguments)


def test_the_model_is_left_as_it_was(common, tmp_path):
    model, tokenizer, arguments, _ = common
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sweep(model, tokenizer, tmp_path / "out", **arguments | {"ratios": [0.3]})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner(env={"COLUMNS": "220"}).invoke(app, [str(argument) for argument in arguments])


def test_the_command_writes_table_and_picture_and_goes_on(material, tmp_path):
    flags = ["--text", material / "text.txt", "--calibration", material / "calibration.txt", "--window", 32]
    flags += ["--num-samples", 4, "--seq-len", 16, "--set", "norm=l1"]
    command = ["sweep", material / "dense", tmp_path / "out", "--methods", "magnitude, random", *flags]
    result = run(*command, "--ratios", "0.2,0.4", "--allocations", "uniform,global", "--allocations", '{"mlp": 1}')
    assert result.exit_code == 0, result.output
    assert result.stdout.count("magnitude") == 6
    narrow = CliRunner(env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}).invoke(
        app, list(map(str, [*command, "--ratios", "0.2,0.4"]))
    )
    assert max(len(line) for line in narrow.stdout.splitlines() if not line.startswith("written to")) <= 80
    assert "perplexity" in narrow.stdout
    assert "…" not in narrow.stdout
    assert "written to" in result.stdout
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"results.json", "results.md", "report.html", "tradeoff.png", "scores", "plans"}
    page = (tmp_path / "out" / "report.html").read_text()
    assert "hf-prune sweep" in page
    assert "The lighthouse keeper" in page
    again = run(*command, "--ratios", "0.2", "--allocations", "global", "--json")
    assert again.exit_code == 0, again.output
    rows = json.loads(again.stdout)["rows"]
    assert [(row["method"], row["allocation"]) for row in rows] == [
        ("dense", ""),
        ("magnitude", "global"),
        ("random", "global"),
    ]
    assert rows[0]["latency_ms"] == pytest.approx(rows[0]["prefill_ms"] + rows[0]["decode_ms"])
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["circumstances"]["settings"]
    assert settings == {"norm": "l1", "num_samples": 4, "seq_len": 16}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "magic", "--ratios", "0.2"], "method: found 'magic'"),
        (["--methods", "magnitude", "--ratios", "a fifth"], "ratios: found 'a fifth', expected numbers"),
        (["--methods", "magnitude", "--ratios", "0.2", "--allocations", "none.json"], "is not readable JSON"),
        (["--methods", "magnitude", "--ratios", "0.2", "--latency-table", "none.json"], "no latency table"),
    ],
)
def test_bad_input_ends_in_one_line(flags, message, material, tmp_path):
    result = run("sweep", material / "dense", tmp_path / "out", *flags, "--text", material / "text.txt")
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_prune_takes_mappings_and_latency_tables(material, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(material / "dense")
    structure = infer_structure(model)
    measure_latency(model, structure, prompt_len=4, new_tokens=1, repeats=1, progress=False).save(tmp_path / "t.json")
    (tmp_path / "weights.json").write_text('{"mlp": 1}')
    common = ("prune", material / "dense", "--method", "magnitude", "--pruning-ratio", 0.2, "--dry-run")
    shown = run(*common, "--allocation", tmp_path / "weights.json", "--budget", "decoder")
    assert shown.exit_code == 0, shown.output
    assert "(magnitude, mapping)" in shown.stdout
    timed = run(*common, "--budget", "latency", "--latency-table", tmp_path / "t.json")
    assert "of latency" in timed.output or "out of reach" in timed.output  # what the clock said is not ours to test
    assert apply_plan(model, structure, prune(model, RandomConfig(0.2, allocation={"mlp": 1})).plan)
