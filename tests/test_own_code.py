"""Models whose code comes with their checkpoint: it runs only if asked for, and loads with and without hf_prune."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import token_ids
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
