"""The examples of recovery run on a tiny model, from their command line to a checkpoint that loads."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import tiny
import typer
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = ("lora_recovery", "gradual_pruning", "distillation")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examples")
    tiny.write_checkpoint(folder / "my-model")
    tiny.write_text(folder / "train.txt", 2000, seed=1)
    tiny.write_text(folder / "evaluation.txt", 200, seed=2)
    return folder


def run(name, *arguments):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


@pytest.mark.parametrize("name", NAMES)
def test_example(name, material, tmp_path):
    output = tmp_path / "small"
    texts = ["--train", material / "train.txt"]
    texts += [] if name == "gradual_pruning" else ["--evaluation", material / "evaluation.txt"]
    sizes = ["--steps", 4, "--seq-len", 16, "--num-samples", 4]
    printed = run(name, material / "my-model", output, *texts, *sizes)
    before, after = map(int, re.search(r"parameters ([\d,]+) → ([\d,]+)", printed.replace(",", "")).groups())
    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() == after < before
    assert (output / "pruning_plan.json").is_file()
    if name != "gradual_pruning":
        assert "perplexity" in (output / "README.md").read_text()


def test_a_mixture_loses_experts(material, tmp_path):
    tiny.write_checkpoint(tmp_path / "my-mixture")
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(vocab_size=64, num_hidden_layers=2, num_local_experts=8, bos_token_id=0, **sizes)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "my-mixture")
    texts = ["--calibration", material / "train.txt", "--evaluation", material / "evaluation.txt"]
    run("prune_experts", tmp_path / "my-mixture", tmp_path / "small", *texts, "--seq-len", 16, "--num-samples", 4)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert small.config.num_local_experts == 6
    assert {layer.mlp.gate.weight.shape[0] for layer in small.model.layers} == {6}


def test_examples_are_one_page():
    for name in (*NAMES, "prune_experts"):
        assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 80, name
