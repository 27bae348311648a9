"""Every way in checks: all tensors of dense and pruned models, digests, and files that would never end."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest
import tiny
import torch
from pruned import logits, pruned_llama
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)
from transformers.integrations import deepspeed
from typer.testing import CliRunner

from hf_prune import MagnitudeConfig, PrunedModelForCausalLM
from hf_prune.checkpoint.files import PLAN_NAME, read_json
from hf_prune.checkpoint.save_hook import install_save_hook
from hf_prune.checkpoint.saving import save_pruned, verify_checkpoint
from hf_prune.checkpoint.verifying import _config, not_loaded
from hf_prune.cli.main import app
from hf_prune.errors import CheckpointError
from hf_prune.format.building import build_empty
from hf_prune.format.per_layer import DIGESTS
from hf_prune.loading import load_config, load_model
from hf_prune.reading import LARGEST_FILE, parse_json, read_text

if TYPE_CHECKING:
    from pathlib import Path

UP = "model.layers.1.mlp.up_proj.weight"


def lose(directory: Path, tensor: str) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors[tensor]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def pruned(tmp_path):
    install_save_hook()
    pruned_llama()[0].save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned"


# --- tensors ----------------------------------------------------------------------------------------------------------


def test_a_dense_model_without_a_tensor_is_refused_by_every_command(tmp_path):
    dense = tiny.write_checkpoint(tmp_path / "dense")
    text = tiny.write_text(tmp_path / "text.txt", 600, seed=0)
    lose(dense, UP)
    random = ("--method", "random", "--pruning-ratio", "0.3")
    for arguments in (
        ("eval", dense, "--text", text),
        ("prune", dense, tmp_path / "out", *random),
        ("recover", dense, tmp_path / "out", "--train", text),
        ("sweep", dense, tmp_path / "out", "--text", text, "--methods", "random", "--ratios", "0.3"),
    ):
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 2, (arguments, result.output)
        assert f"{UP} is missing" in result.stderr, (arguments, result.output)
    with pytest.raises(CheckpointError, match=f"{UP} is missing"):
        PrunedModelForCausalLM.from_pretrained(dense, pruning_config=MagnitudeConfig(0.3))
    AutoModelForCausalLM.from_pretrained(dense)  # what others do with dense models is theirs


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, AutoModel.from_pretrained, load_model])
def test_a_pruned_model_without_a_tensor_is_refused(pruned, load):
    lose(pruned, UP)
    with pytest.raises(CheckpointError, match=f"{UP} is missing"):
        load(str(pruned))


def test_a_class_of_its_own_and_an_explicit_config_make_no_difference(pruned):
    config = AutoConfig.from_pretrained(pruned)
    expected = logits(pruned_llama()[0])
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(pruned)), expected)
    model, info = AutoModelForCausalLM.from_pretrained(pruned, config=config, output_loading_info=True)
    assert torch.equal(logits(model), expected)
    assert not info["missing_keys"]
    lose(pruned, UP)
    for load in (LlamaForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=f"{UP} is missing"):
            load(pruned, config=config)


def test_without_the_files_the_tensors_are_checked_all_the_same(pruned):
    """As in a repository on the Hub, whose files come while the model loads."""
    tensors = load_file(pruned / "model.safetensors")
    config = AutoConfig.from_pretrained(pruned)
    LlamaForCausalLM.from_pretrained(None, config=config, state_dict=dict(tensors))
    with pytest.raises(CheckpointError, match=f"{UP} is missing"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict={k: t for k, t in tensors.items() if k != UP})
    with pytest.raises(CheckpointError, match="extra is not part of the model"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors | {"extra": torch.zeros(2)})


def test_another_head_may_be_new(pruned):
    model = AutoModelForSequenceClassification.from_pretrained(pruned, num_labels=3)
    assert model.score.out_features == 3
    assert AutoModel.from_pretrained(pruned).layers[0].mlp.up_proj.out_features == 40


# --- what belongs together --------------------------------------------------------------------------------------------


def test_digests_are_of_the_files_and_not_of_the_model(pruned, tmp_path):
    recorded = json.loads((pruned / "config.json").read_text())[DIGESTS]
    assert set(recorded) == {"config.json", PLAN_NAME, "modeling_hf_prune.py"}
    model = AutoModelForCausalLM.from_pretrained(pruned)
    assert not hasattr(model.config, DIGESTS)
    model.config.pruning_config["method"] = "another"
    model.save_pretrained(tmp_path / "again")
    verify_checkpoint(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())[DIGESTS]
    assert again["config.json"] != recorded["config.json"]
    assert again[PLAN_NAME] == recorded[PLAN_NAME]


@pytest.mark.parametrize("key", ["pruning_config", "per_layer_config"])
def test_changed_sections_are_refused_and_older_checkpoints_load(pruned, key):
    expected = logits(AutoModelForCausalLM.from_pretrained(pruned))
    values = json.loads((pruned / "config.json").read_text())
    if key == "pruning_config":
        values[key]["method"] = "another"
    else:
        values[key]["2"] = {"attention_dropout": 0.5}
    edit_config(pruned, **{key: values[key]})
    with pytest.raises(CheckpointError, match=r"expected .* changed after the model was saved"):
        AutoModelForCausalLM.from_pretrained(pruned)
    del values[DIGESTS]
    (pruned / "config.json").write_text(json.dumps(values))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(pruned)), expected)


def test_the_digest_does_not_depend_on_spelling(pruned):
    values = json.loads((pruned / "config.json").read_text())
    values["pruning_config"] = dict(reversed(values["pruning_config"].items()))
    values["per_layer_config"] = {f"00{layer}": override for layer, override in values["per_layer_config"].items()}
    (pruned / "config.json").write_text(json.dumps(values))
    AutoModelForCausalLM.from_pretrained(pruned)


def test_a_plan_of_another_model_is_refused_and_none_is_fine(pruned):
    text = (pruned / PLAN_NAME).read_text()
    (pruned / PLAN_NAME).write_text(text.replace("dense-llama", "other-llama"))
    for load in (AutoModelForCausalLM.from_pretrained, PrunedModelForCausalLM.from_pretrained, verify_checkpoint):
        with pytest.raises(CheckpointError, match=rf"{PLAN_NAME}.*changed after the model was saved"):
            load(pruned)
    (pruned / PLAN_NAME).unlink()
    AutoModelForCausalLM.from_pretrained(pruned)


def test_a_model_whose_layers_all_skip_their_attention_is_refused(pruned):
    layers = {str(layer): {"skip": ["attention"]} for layer in range(3)}
    edit_config(pruned, per_layer_config=layers, **{DIGESTS: None})
    with pytest.raises(CheckpointError, match="all layers skip their attention"):
        AutoModelForCausalLM.from_pretrained(pruned)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "pruning_plan.json", "model.safetensors"])
def test_pipes_and_devices_are_not_read(pruned, name):
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (pruned / name).unlink()
        make(pruned / name)
        for load in (load_model, load_config, PrunedModelForCausalLM.from_pretrained, verify_checkpoint):
            with pytest.raises(CheckpointError, match=rf"{name} cannot be read: it is not a regular file"):
                load(str(pruned))


def test_links_are_read_and_large_files_are_not(tmp_path):
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "link.json").symlink_to(tmp_path / "blob")
    assert read_json(tmp_path / "link.json") == {"a": 1}
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(OSError, match="larger than 100,000,000 bytes"):
        read_text(tmp_path / "large.json")
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)


def test_a_pruned_directory_saved_by_the_facade_verifies(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_prune.checkpoint.saving._draw_widths", lambda plan, path: False)
    model, plan = pruned_llama()
    save_pruned(model, tmp_path / "out", plan=plan)
    verify_checkpoint(tmp_path / "out")
    assert not hasattr(model.config, DIGESTS)


def test_the_first_line_of_another_refusal_is_quoted():
    said = str(not_loaded("there", "model", OSError("\n \nno such model\nand much more")))
    assert said.startswith("no model could be loaded from 'there': no such model Pass")
    assert "ValueError" in str(not_loaded("there", "config", ValueError("\n")))


def test_a_config_that_we_refuse_is_refused_in_our_words(tmp_path):
    config = {"model_type": "llama", "pruning_config": {"surgery": {"nonsense": 1}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"pruning_config\.surgery: found"):
        _config(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a config that transformers can read"):
        _config(tmp_path)


def test_models_are_whole_where_transformers_would_split_them(pruned, monkeypatch):
    class Zero3:
        def is_zero3(self):
            return True

    run = Zero3()  # what transformers knows of a run under DeepSpeed ZeRO-3
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    deepspeed.set_hf_deepspeed_config(run)
    verify_checkpoint(pruned)
    whole = load_model(str(pruned)).state_dict()
    assert deepspeed.is_deepspeed_zero3_enabled()
    empty = build_empty(load_config(str(pruned))).state_dict()
    assert {name: tensor.shape for name, tensor in empty.items()} == {name: w.shape for name, w in whole.items()}
    deepspeed.unset_hf_deepspeed_config()
    assert all(torch.equal(whole[name], tensor) for name, tensor in load_model(str(pruned)).state_dict().items())
