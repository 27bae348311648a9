"""The command line: it prints what happened, its settings are the config fields, bad input is one line, code 2."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys

import pytest
import tiny
import torch
from typer.testing import CliRunner

import hf_prune
from hf_prune.cli import inspection, printing
from hf_prune.cli.demo import run_demo
from hf_prune.cli.flags import config_flags, read_config
from hf_prune.cli.main import LogFile, app
from hf_prune.config import CONFIGS, MagnitudeConfig, PruningConfig
from hf_prune.errors import CheckpointError, ConfigError
from hf_prune.plan import PruningPlan

FAMILIES = {"attention": (2, 1536), "mlp": (48, 96)}  # units, parameters per unit of the tiny llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny.write_checkpoint(tmp_path_factory.mktemp("cli") / "dense"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt", 600, seed=0))


def run(*arguments, columns=200):
    """Run `hf-prune` in this process; a wide terminal, so that no cell is folded."""
    return CliRunner(env={"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)}).invoke(
        app, [str(argument) for argument in arguments]
    )


def config_only(path, **values):
    from transformers import LlamaConfig

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    LlamaConfig(**sizes | {"num_attention_heads": 4, "num_key_value_heads": 2} | values).save_pretrained(path)
    return str(path)


# --- prune ------------------------------------------------------------------------------------------------------------


def test_prune_writes_what_it_prints(model, text, tmp_path):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "pruned"
    calibration = ("--calibration", text, "--num-samples", 4, "--seq-len", 16)
    result = run("prune", model, output, "--method", "wanda", "--pruning-ratio", 0.3, *calibration, "--layers", 1)
    assert result.exit_code == 0, result.output
    plan = PruningPlan.load(output / "pruning_plan.json")
    assert (plan.config.method, plan.config.layers, plan.config.num_samples) == ("wanda", (1,), 4)
    assert "30.00 % of decoder (wanda, uniform)" in result.stdout
    for meaning, achieved in plan.achieved.items():
        assert f"{100 * achieved:.2f} % of {meaning}" in result.stdout
    pruned = AutoModelForCausalLM.from_pretrained(output)
    assert f"→ {pruned.num_parameters():,}" in result.stdout
    for layer in range(2):
        assert pruned.model.layers[layer].mlp.down_proj.in_features == plan.widths[f"layers.{layer}.mlp"]
        assert f"{plan.widths[f'layers.{layer}.mlp']} of 48" in result.stdout
    assert "to prune" in result.stdout
    assert "import hf_prune" in result.stdout


def test_uniform_result_is_said_to_be_a_plain_checkpoint(model, tmp_path):
    output = tmp_path / "pruned"
    result = run(
        "prune", model, output, "--method", "magnitude", "--pruning-ratio", 0.25, "--axes", "mlp", "--set", "norm=l1"
    )
    assert result.exit_code == 0, result.output
    assert "plain checkpoint" in result.stdout
    config = json.loads((output / "config.json").read_text())
    assert "per_layer_config" not in config
    assert config["pruning_config"]["settings"]["norm"] == "l1"
    assert (output / "tokenizer.json").is_file()


def test_learned_masks_leave_their_learning_curve(model, text, tmp_path):
    pytest.importorskip("matplotlib")
    output, state = tmp_path / "pruned", tmp_path / "state"
    flags = (
        "--method",
        "policy_gradient",
        "--pruning-ratio",
        0.3,
        "--set",
        "init=magnitude",
        "--set",
        "policy_steps=3",
    )
    flags += ("--calibration", text, "--num-samples", 4, "--seq-len", 8, "--set", f"state_dir={state}")
    for _ in range(2):  # the second time nothing is left to learn: the curve comes from the state
        result = run("prune", model, output, *flags, "--overwrite")
        assert result.exit_code == 0, result.output
        assert (output / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
        assert "](learning_curve.png)" in (output / "README.md").read_text()
        (output / "learning_curve.png").unlink()


def test_dry_run_prints_the_plan_and_writes_nothing(model, tmp_path):
    output = tmp_path / "pruned"
    result = run(
        "prune", model, output, "--method", "random", "--pruning-ratio", 0.3, "--axes", "layer_mlp,mlp", "--dry-run"
    )
    assert result.exit_code == 0, result.output
    assert "achieved" in result.stdout
    assert "dry run" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_flags_override_the_config_file(model, tmp_path):
    path, output = tmp_path / "settings.json", tmp_path / "pruned"
    path.write_text(MagnitudeConfig(0.2, norm="l1", axes=("mlp",), round_to=8, seed=3).to_json())
    flags = (
        "--pruning-ratio",
        0.5,
        "--round-to",
        "none",
        "--layers",
        "1",
        "--protect",
        "layers.0.*",
        "--budget",
        "units",
    )
    result = run("prune", model, output, "--config", path, *flags)
    assert result.exit_code == 0, result.output
    expected = MagnitudeConfig(
        0.5, norm="l1", axes=("mlp",), round_to=None, seed=3, layers=(1,), protect=("layers.0.*",), budget="units"
    )
    plan = PruningPlan.load(output / "pruning_plan.json")
    assert plan.config == expected
    assert plan.widths["layers.0.mlp"] == 48
    assert plan.widths["layers.1.mlp"] == 24


def test_a_preset_is_a_start_that_flags_override(tmp_path, text):
    deep = tiny.write_checkpoint(tmp_path / "deep", num_layers=8)
    arguments = ("prune", deep, tmp_path / "out", "--preset", "paper_block", "--pruning-ratio", 0.25)
    result = run(*arguments, "--calibration", text, "--num-samples", 2, "--seq-len", 16)
    assert result.exit_code == 0, result.output
    config = PruningPlan.load(tmp_path / "out" / "pruning_plan.json").config
    assert (config.criterion, config.layers, config.seed) == ("first_order", (4, 5), 42)
    assert (config.num_samples, config.budget) == (2, "units")
    refused = run("prune", deep, tmp_path / "other", "--preset", "paper_block")
    assert refused.exit_code == 2
    assert "--pruning-ratio" in refused.output


def test_every_field_of_every_method_can_be_given_and_comes_back():
    flags = {parameter.name for parameter in config_flags()} - {"settings"}
    for config_class in CONFIGS.values():
        config = config_class(0.25, round_to=16, layers=(0, 1), targets=("tp=2",), protect=("layers.0.*",))
        texts = {name: _as_text(value) for name, value in config.to_dict().items() if value is not None}
        own = {name: getattr(config, name) if name == "pruning_ratio" else texts[name] for name in flags}
        others = [f"{name}={text}" for name, text in texts.items() if name not in flags]
        numbers = {name: int(own[name]) for name in ("num_samples", "seq_len", "num_steps", "min_units", "seed")}
        given = own | numbers | {"protect": list(config.protect), "settings": others}
        assert read_config(None, given) == config


def _as_text(value):
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["norm"], "--set: found 'norm', expected a setting and its value"),
        (["nrom=l1"], "Did you mean 'norm'?"),
        (["search_samples=many"], "search_samples: found 'many', expected a number"),
        (["seed=1"], "seed is given twice"),
        (["norm=l1", "norm=l2"], "norm is given twice"),
        (["norm=l3"], "norm: found 'l3'"),
    ],
)
def test_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_config(None, {"method": "magnitude", "pruning_ratio": 0.3, "seed": 2, "settings": settings})


def test_help_is_short_and_methods_show_true_defaults():
    shown = run("prune", "--help", columns=80).stdout
    assert len(shown.splitlines()) <= 60
    for method, config_class in CONFIGS.items():
        rows = json.loads(run("methods", method, "--json").stdout)["rows"]
        assert len(rows) == len(dataclasses.fields(config_class)) - 1
        defaults = config_class(0.25)
        for row in rows:
            name = row["setting"].removeprefix("--set ").removesuffix("=").lstrip("-").replace("-", "_")
            value = getattr(defaults, "targets" if name == "for" else name)
            expected = ",".join(value) if isinstance(value, tuple) else str(value)
            assert row["default"] == ("" if name == "pruning_ratio" else expected)
    assert {row["method"] for row in json.loads(run("methods", "--json").stdout)["rows"]} == set(CONFIGS) - {"custom"}
    assert "Did you mean 'wanda'?" in run("methods", "wnada").output


def test_the_module_is_the_command():
    version = subprocess.run([sys.executable, "-m", "hf_prune", "--version"], capture_output=True, text=True)
    assert version.stdout == f"hf-prune {hf_prune.__version__}\n"


def test_prune_prints_json(model, tmp_path):
    result = run("prune", model, tmp_path / "out", "--method", "random", "--pruning-ratio", 0.3, "--json")
    values = json.loads(result.stdout)
    plan = PruningPlan.load(tmp_path / "out" / "pruning_plan.json")
    assert (values["widths"], values["achieved"]) == (plan.widths, plan.achieved)
    assert (values["model"], values["output"]) == (str(model), str(tmp_path / "out"))
    assert values["num_parameters_after"] < values["num_parameters_before"]


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("none", None), ("64", 64)])
def test_round_to(text, value):
    assert read_config(None, {"method": "random", "pruning_ratio": 0.5, "round_to": text}).round_to == value


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_needs_a_config_only(tmp_path):
    result = run("inspect", config_only(tmp_path), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    found = {row["name"]: row for row in report["families"]}
    for name, (num_units, per_unit) in FAMILIES.items():
        assert (found[name]["num_units"], found[name]["parameters_per_unit"]) == (num_units, per_unit)
        assert found[name]["layers"] == [0, 1]
        assert found[name]["exact"]
        assert found[name]["prunable"]
    assert found["mlp"]["attributes"] == "intermediate_size"
    assert "num_key_value_heads" in found["attention"]["attributes"]
    assert not found["hidden"]["exact"]
    assert "norms" in found["hidden"]["reason"]


def test_inspect_counts_what_pruning_one_unit_removes(model):
    from transformers import AutoModelForCausalLM

    from hf_prune import allocate, apply_plan, infer_structure

    dense = AutoModelForCausalLM.from_pretrained(model)
    structure = infer_structure(dense)
    report = inspection.inspect_config(dense.config)
    for row in report.families:
        if row.name not in ("attention", "mlp", "hidden"):
            continue
        name = f"layers.1.{row.name}" if row.layers else row.name
        scores = {name: torch.arange(row.num_units).float()}
        others = tuple(axis for axis in structure.axes if axis != name)
        config = PruningConfig(1 / row.num_units, axes=(row.name,), budget="units", protect=others)
        plan = allocate(scores, structure, config)
        assert plan.widths[name] == row.num_units - 1
        pruned = apply_plan(dense, structure, plan)
        assert dense.num_parameters() - pruned.num_parameters() == row.parameters_per_unit


def test_inspect_groups_deep_models_by_family(tmp_path):
    result = run("inspect", config_only(tmp_path, num_hidden_layers=12))
    assert result.exit_code == 0, result.output
    assert "0-11" in result.stdout
    assert len(result.stdout.splitlines()) < 20


def test_inspect_says_what_is_blocked_and_why(capsys):
    blocked = inspection.FamilyReport("attention", (0, 1), 1, 9, True, False, "it has only one unit", "")
    resized = inspection.FamilyReport("mlp", (0, 1), 4, 9, True, True, "", "")
    printing.print_inspection(inspection.InspectionReport("odd", 2, 10, 5, (blocked, resized), (), {}))
    printed = capsys.readouterr().out
    assert "attention (layers 0-1): not prunable: it has only one unit" in printed
    assert "mlp (layers 0-1): width held by no config attribute" in printed


def test_inspect_names_operations_without_a_rule_and_missing_kinds(capsys):
    report = inspection.InspectionReport("odd", 2, 10, 5, (), ("attention",), {"aten.odd": "model.layers.0"})
    printing.print_inspection(report)
    printed = capsys.readouterr().out
    assert "not found: attention" in printed
    assert "no rule for operation aten.odd (first in model.layers.0)" in printed


def test_inspect_says_how_many_layers_predict_further_tokens(tmp_path):
    result = run("inspect", config_only(tmp_path, num_mtp_layers=2))
    assert "2 layers that predict further tokens (MTP)" in " ".join(result.stdout.split())


def test_verify_proves_masked_equals_sliced(model):
    result = run("inspect", model, "--verify", "--json", "--dtype", "float64")
    assert result.exit_code == 0, result.output
    checks = {check["kind"]: check for check in json.loads(result.stdout)["verification"]}
    assert set(checks) == {"mlp", "attention", "layer", "layer_attention", "layer_mlp"}
    for check in checks.values():
        assert check["equal"]
        assert check["difference"] < 1e-12 < 1e-4 < check["effect"]


def test_verify_fails_where_slicing_is_wrong(model, monkeypatch):
    apply_plan = inspection.apply_plan

    def wrong(dense, structure, plan):
        pruned = apply_plan(dense, structure, plan)
        with torch.no_grad():
            pruned.model.layers[-1].mlp.down_proj.weight.mul_(1.01)
        return pruned

    monkeypatch.setattr(inspection, "apply_plan", wrong)
    result = run("inspect", model, "--verify")
    assert result.exit_code == 1
    assert "NO" in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("prune", "ADAPTER", "OUT", "--method", "wanda", "--pruning-ratio", "0.3", "--calibration", "TEXT"),
        ("inspect", "ADAPTER", "--verify"),
        ("sweep", "ADAPTER", "OUT", "--methods", "random", "--ratios", "0.3", "--text", "TEXT"),
        ("eval", "ADAPTER", "--text", "TEXT"),
        ("recover", "ADAPTER", "OUT", "--train", "TEXT"),
        ("export", "ADAPTER", "OUT", "--format", "plain"),
        ("quantise", "ADAPTER", "OUT"),
    ],
)
def test_an_adapter_is_refused_with_the_call_that_merges_it(words, text, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    paths = {"ADAPTER": str(tmp_path / "adapter"), "OUT": str(tmp_path / "out"), "TEXT": text}
    result = run(*(paths.get(word, word) for word in words))
    assert result.exit_code == 2
    assert "from_pretrained('" + paths["ADAPTER"] + "').merge_and_unload()" in " ".join(result.output.split())


# --- eval and demo ----------------------------------------------------------------------------------------------------


def test_eval_measures_dense_and_pruned(model, text, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_prune import perplexity

    output = tmp_path / "pruned"
    assert (
        run("prune", model, output, "--method", "random", "--pruning-ratio", 0.3, "--allocation", "global").exit_code
        == 0
    )
    found = {}
    for path in (model, output):
        result = run("eval", path, "--text", text, "--window", 32, "--json")
        assert result.exit_code == 0, result.output
        found[str(path)] = json.loads(result.stdout)
    with open(text) as file:
        expected = perplexity(
            AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model), file.read(), window=32
        )
    assert found[model]["perplexity"] == pytest.approx(expected.perplexity)
    assert found[str(output)]["num_parameters"] < found[model]["num_parameters"]
    assert found[model]["num_bytes"] >= 4 * found[model]["num_parameters"]
    assert all(values["prefill_tokens_per_s"] > 0 and values["decode_tokens_per_s"] > 0 for values in found.values())
    assert "perplexity" in run("eval", model, "--text", text, "--window", 32).stdout


def test_json_is_strict():
    assert json.loads(printing.strict_json({"perplexity": float("inf"), "n": 1})) == {"perplexity": None, "n": 1}


def test_demo_compares_saves_reloads_and_draws(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    output = tmp_path / "output"
    run_demo(output, model_dir=tiny.write_demo_model(tmp_path / "model"))
    printed = capsys.readouterr().out
    for word in (
        "random",
        "magnitude",
        "wanda",
        "llm_pruner, repaired",
        "same logits",
        "dense: ",
        "pruned: ",
        "widths.png",
    ):
        assert word in printed
    table = (output / "results.md").read_text()
    assert table.count("\n") == 2 + 1 + 5 * 3
    config = json.loads((output / "pruned" / "config.json").read_text())
    assert config["pruning_config"]["method"] == "llm_pruner"
    assert PruningPlan.load(output / "pruned" / "pruning_plan.json").config.repair == "least_squares"
    assert config["per_layer_config"]  # layers differ
    assert AutoModelForCausalLM.from_pretrained(output / "pruned").num_parameters() > 0
    for name in ("widths.png", "perplexity.png"):
        assert (output / name).stat().st_size > 1000


def test_demo_without_its_model_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="reinstall"):
        run_demo(tmp_path / "output", model_dir=tmp_path)
    assert not (tmp_path / "output").exists()


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--method", "random", "--pruning-ratio", 1.5), "pruning_ratio: found 1.5"),
        (("--method", "random"), "pruning_ratio is missing"),
        (("--pruning-ratio", 0.3), "no method was given"),
        (("--method", "best", "--pruning-ratio", 0.3), "method: found 'best'"),
        (("--method", "random", "--pruning-ratio", 0.3, "--set", "norm=l1"), "unknown keys ['norm']"),
        (("--method", "random", "--pruning-ratio", 0.3, "--axes", "heads"), "axes: found ('heads',)"),
        (("--method", "random", "--pruning-ratio", 0.3, "--layers", "7-3"), "layers: found '7-3'"),
        (("--method", "random", "--pruning-ratio", 0.3, "--layers", "0-9"), "expected 0 to 1"),
        (("--method", "random", "--pruning-ratio", 0.3, "--protect", "layer.0"), "matches none of the axes"),
        (("--method", "random", "--pruning-ratio", 0.3, "--round-to", "8.5"), "round_to: found '8.5'"),
        (("--method", "random", "--pruning-ratio", 0.3, "--dtype", "float12"), "dtype: found 'float12'"),
        (("--method", "random", "--pruning-ratio", 0.3, "--device", "cuda:77"), "device: 'cuda:77'"),
        (("--method", "wanda", "--pruning-ratio", 0.3, "--calibration", "a.txt:0"), "expected numbers above 0"),
        (("--method", "wanda", "--pruning-ratio", 0.3, "--calibration", "gone.txt"), "no file at"),
        (("--method", "random", "--pruning-ratio", 0.99), "out of reach"),
        (("--config", "gone.json"), "--config gone.json is not a readable JSON file"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_writes_nothing(model, tmp_path, arguments, found):
    result = run("prune", model, tmp_path / "pruned", *arguments)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error")]
    assert found in line
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_prune_needs_an_output_or_a_dry_run(model):
    result = run("prune", model, "--method", "random", "--pruning-ratio", 0.3)
    assert result.exit_code == 2
    assert "no output directory" in result.stderr


def test_output_that_holds_other_things_is_left_alone(model, tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("years of work")
    monkeypatch.setattr("hf_prune.cli.pruning.prune", None)  # refused before anything is computed
    result = run("prune", model, tmp_path, "--method", "random", "--pruning-ratio", 0.3)
    assert result.exit_code == 2
    assert "thesis.tex" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "command", [("inspect",), ("eval", "--text", "TEXT"), ("prune", "--dry-run", "--method", "random")]
)
def test_model_that_is_not_there(command, text, tmp_path):
    ratio = ("--pruning-ratio", 0.3) if command[0] == "prune" else ()
    arguments = [text if argument == "TEXT" else argument for argument in command[1:]]
    result = run(command[0], tmp_path / "gone", *arguments, *ratio)
    assert result.exit_code == 2, result.output
    assert "no directory at" in result.stderr


def test_verify_needs_weights_and_precision(model, tmp_path):
    result = run("inspect", config_only(tmp_path), "--verify")
    assert result.exit_code == 2
    assert "no model could be loaded" in result.stderr
    result = run("inspect", model, "--verify", "--dtype", "bfloat16")
    assert result.exit_code == 2
    assert "expected float32 or float64" in result.stderr


def test_our_own_mistakes_keep_their_traceback(model, monkeypatch):
    monkeypatch.setattr(inspection, "inspect_config", lambda config: 1 / 0)
    result = run("inspect", model)
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_config_file_must_hold_an_object(tmp_path):
    path = tmp_path / "list.json"
    path.write_text("[0.3]")
    with pytest.raises(ConfigError, match="holds a JSON list"):
        read_config(path, {})


# --- tables -----------------------------------------------------------------------------------------------------------


def _rows(num_layers, kept):
    num_units = {f"layers.{layer}.mlp": 8 for layer in range(num_layers)}
    indices = {f"layers.{layer}.mlp": tuple(range(n)) for layer, n in kept.items()}
    achieved = dict.fromkeys(("decoder", "model", "units"), 0.1)
    plan = PruningPlan("llama", None, num_units, indices, PruningConfig(0.1), achieved)
    table = printing.widths_table(plan, num_layers)
    return list(zip(*(list(column.cells) for column in table.columns), strict=True))


def test_widths_are_shown_one_by_one_in_runs_or_in_blocks():
    assert _rows(2, {0: 4}) == [("0", "4 of 8"), ("1", "8 of 8")]
    assert _rows(32, {5: 4, 6: 4}) == [("0-4", "8 of 8"), ("5-6", "4 of 8"), ("7-31", "8 of 8")]
    assert _rows(40, {layer: 1 + layer % 7 for layer in range(40)})[:2] == [("0-2", "1–3 of 8"), ("3-5", "4–6 of 8")]


def test_ranges():
    assert printing.ranges([3, 0, 1, 2, 7]) == "0-3,7"
    assert printing.ranges([]) == ""


def test_bars_are_lines_in_a_log_file(monkeypatch):
    from tqdm import tqdm

    clock, log = [0.0], io.StringIO()
    monkeypatch.setattr("hf_prune.cli.main.time.monotonic", lambda: clock[0])
    file = LogFile(log)
    file.write("before\n")
    with tqdm(total=50, file=file, mininterval=0, disable=False, desc="outer") as outer:
        for _ in range(50):
            for _ in tqdm(range(2), file=file, mininterval=0, disable=False, desc="inner", leave=False):
                clock[0] += 1
            outer.update()
    file.write("after\n")
    lines = log.getvalue().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "50/50" in lines[-2]
    assert 3 <= len(lines) - 2 <= 100 / LogFile.EVERY_S + 2
    assert not set("\r\x1b") & set(log.getvalue())
    assert all(lines)
