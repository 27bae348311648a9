"""Models whose code comes with their checkpoint: it runs only if asked for, and loads with and without hf_prune."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_tokenizer, token_ids, write_text
from typer.testing import CliRunner

from hf_prune import PrunedModelForCausalLM, RandomConfig, prune
from hf_prune.cli.main import app
from hf_prune.errors import CheckpointError

FILES = Path(__file__).parent / "own_code"
MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
OURS = {**MAP, "AutoModelForCausalLM": "modeling_hf_prune.OwnForCausalLM"}

# Loads without hf_prune, saves and loads again: prints whether the logits are those of the file.
ALONE = """
import sys, torch
sys.modules["hf_prune"] = None
from transformers import AutoModelForCausalLM
load = lambda path: AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
ids, expected = torch.load(sys.argv[1] + "/logits.pt")
model = load(sys.argv[1] + "/pruned")
model.save_pretrained(sys.argv[1] + "/again")
print([torch.equal(m(ids).logits, expected) for m in (model, load(sys.argv[1] + "/again"))])
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Directory of the dense model with its files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    bare, directory = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("own") / "dense"
    shutil.copytree(FILES, bare, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    (bare / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": MAP}))
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(bare, trust_remote_code=True)
    AutoModelForCausalLM.from_config(config, trust_remote_code=True).save_pretrained(directory)
    return directory


def load(directory, **options):
    return PrunedModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()


def test_layers_that_differ_load_with_and_without_hf_prune(dense, tmp_path):
    arguments = ["prune", dense, tmp_path / "pruned", "--method", "random", "--pruning-ratio", "0.3"]
    arguments += ["--allocation", "global", "--trust-remote-code"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "pruned").iterdir()}
    assert {"configuration_own.py", "modeling_own.py", "layers_own.py", "modeling_hf_prune.py"} <= names
    assert json.loads((tmp_path / "pruned/config.json").read_text())["auto_map"] == OURS

    model, ids = load(tmp_path / "pruned"), token_ids()
    assert len({layer.ffn.up.out_features for layer in model.layers}) > 1
    with torch.no_grad():
        logits = model(ids).logits
    torch.save((ids, logits), tmp_path / "logits.pt")
    found = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path)], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert found.stdout.strip() == "[True, True]", found.stderr[-2000:]


def test_layers_alike_need_only_their_own_files(dense, tmp_path):
    pruned = load(dense, pruning_config=RandomConfig(0.3))
    PrunedModelForCausalLM.save_pretrained(pruned, tmp_path / "pruned")
    assert not (tmp_path / "pruned/modeling_hf_prune.py").exists()
    assert json.loads((tmp_path / "pruned/config.json").read_text())["auto_map"] == MAP
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "pruned")(token_ids()).logits, pruned(token_ids()).logits)


def test_code_runs_only_if_asked_for_and_nobody_is_asked(dense, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    with pytest.raises(CheckpointError, match="trust_remote_code=True"):
        prune(dense, RandomConfig(0.3))
    result = CliRunner().invoke(app, ["inspect", str(dense)])
    assert result.exit_code == 2
    assert "--trust-remote-code" in " ".join(result.output.split())


@pytest.fixture(scope="module")
def pruned(dense, tmp_path_factory):
    """Directory of a pruned model whose layers differ, with a tokenizer and a text."""
    directory = tmp_path_factory.mktemp("commands")
    shutil.copytree(dense, directory / "dense")
    tiny_tokenizer(write_text(directory / "text.txt", 600)).save_pretrained(directory / "dense")
    arguments = [
        directory / "dense",
        directory / "pruned",
        "--method",
        "random",
        "--pruning-ratio",
        "0.3",
        "--allocation",
        "global",
    ]
    result = CliRunner().invoke(app, ["prune", *map(str, arguments), "--trust-remote-code"])
    assert result.exit_code == 0, result.output
    return directory / "pruned"


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("recover", ["--train", "text.txt", "--steps", "1", "--seq-len", "8", "--preset", "distill", "--use-cpu"]),
        ("export", ["--format", "plain"]),
        ("quantise", ["--text", "text.txt", "--window", "8"]),
    ],
)
def test_every_command_that_writes_a_model_takes_the_flag(pruned, tmp_path, monkeypatch, command, options):
    """Without it one line names it; with it, the result loads and its code travels along."""
    monkeypatch.setattr("hf_prune.exporting.quantising.find_spec", bool)  # without torchao: the model as it is
    monkeypatch.setattr("hf_prune.exporting.quantising._quantization_config", lambda _: None)
    options = [str(pruned.parent / word) if word == "text.txt" else word for word in options]
    output = tmp_path / "output"
    result = CliRunner().invoke(app, [command, str(pruned), str(output), *options])
    assert result.exit_code == 2
    assert "--trust-remote-code" in " ".join(result.output.split())
    assert not output.exists()
    result = CliRunner().invoke(app, [command, str(pruned), str(output), *options, "--trust-remote-code"])
    assert result.exit_code == 0, result.output
    assert {"configuration_own.py", "modeling_own.py", "layers_own.py"} <= {path.name for path in output.iterdir()}
    logits = [load(path)(token_ids()).logits for path in (pruned, output)]
    assert torch.allclose(*logits, rtol=0, atol=1e-6 if command == "export" else 0.5)
