"""Pruning from file to file gives, bit for bit, what pruning in memory and saving gives."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from models import tiny_model
from safetensors.torch import load_file, save_file
from tiny import write_checkpoint
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_prune import streaming
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.cli import app
from hf_prune.config import LLMPrunerConfig, MagnitudeConfig, PruneNetConfig, PruningConfig, RandomConfig
from hf_prune.errors import BudgetError, CheckpointError, ConfigError, ScoreError
from hf_prune.pipeline import prune
from hf_prune.streaming import Checkpoint, stream_prune

QUICK = {"num_episodes": 2, "num_rollouts": 2}
SHARD = 20_000
CONFIGS = {
    "prunenet": PruneNetConfig(0.3, **QUICK),
    "prunenet_paper": PruneNetConfig(0.3, state="gate", distance="ks", layer_weight="equal", **QUICK),
    "magnitude": MagnitudeConfig(0.3),
    "magnitude_global": MagnitudeConfig(0.3, norm="l1", allocation="global", layers=(0, 2), protect=("*.0.attention",)),
    "random": RandomConfig(0.3),
    "random_depth": RandomConfig(0.3, axes=("layer", "mlp")),
    "random_hidden": RandomConfig(0.2, axes=("hidden",)),
}


def tensors(directory):
    return {name: value for path in directory.glob("*.safetensors") for name, value in load_file(path).items()}


def files(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if "safetensors" not in p.name and p.suffix != ".md"}


def dense(path, family="llama", dtype=torch.float32, max_shard_size="50GB"):
    tiny_model(family, dtype=dtype).save_pretrained(path, max_shard_size=max_shard_size)
    return path


def assert_same(source, tmp_path, config):
    plan, _ = stream_prune(source, tmp_path / "streamed" / "model", config, max_shard_bytes=SHARD)
    result = prune(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), config)
    save_pruned(result.model, tmp_path / "whole" / "model", plan=result.plan)
    assert plan == result.plan
    streamed, whole = tensors(tmp_path / "streamed" / "model"), tensors(tmp_path / "whole" / "model")
    assert streamed.keys() == whole.keys()
    for name, tensor in whole.items():
        assert streamed[name].dtype == tensor.dtype
        assert torch.equal(streamed[name], tensor), name
    assert files(tmp_path / "streamed" / "model") == files(tmp_path / "whole" / "model")


@pytest.mark.parametrize("name", CONFIGS)
def test_same_as_in_memory(name, tmp_path):
    assert_same(dense(tmp_path / "dense"), tmp_path, CONFIGS[name])


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "opt", "bloom", "gemma3_text"])
def test_same_for_other_architectures(family, tmp_path):
    assert_same(dense(tmp_path / "dense", family), tmp_path, CONFIGS["prunenet"])


@pytest.mark.parametrize("name", ["prunenet", "magnitude"])
def test_same_in_bfloat16_from_shards(name, tmp_path):
    source = dense(tmp_path / "dense", dtype=torch.bfloat16, max_shard_size="20KB")
    assert len(list(source.glob("*.safetensors"))) > 1
    assert_same(source, tmp_path, CONFIGS[name])


def test_a_pruned_checkpoint_streams_again(tmp_path):
    source = dense(tmp_path / "dense")
    stream_prune(source, tmp_path / "first", MagnitudeConfig(0.2, allocation="global"))
    assert_same(tmp_path / "first", tmp_path, MagnitudeConfig(0.2))


def test_shards_have_the_asked_size_and_an_index(tmp_path):
    source = dense(tmp_path / "dense")
    stream_prune(source, tmp_path / "out", MagnitudeConfig(0.3), max_shard_bytes=SHARD)
    index = json.loads((tmp_path / "out" / streaming.INDEX_NAME).read_text())
    for path in (tmp_path / "out").glob("*.safetensors"):
        found = load_file(path)
        assert len(found) == 1 or sum(t.nbytes for t in found.values()) <= SHARD
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(found)
    everything = tensors(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in everything.values())
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert index["metadata"]["total_parameters"] == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["prunenet", "magnitude"])
def test_the_model_holds_at_most_one_layer(name, tmp_path, monkeypatch):
    source, models, held = dense(tmp_path / "dense"), [], []
    shell, read = streaming._shell, Checkpoint.read

    def kept_shell(config):
        models.append(shell(config))
        return models[-1]

    def watched(self, name):
        loaded = [n for model in models for n, p in model.named_parameters() if not p.is_meta and ".layers." in n]
        held.append(len({n.split(".")[2] for n in loaded}))
        return read(self, name)

    monkeypatch.setattr(streaming, "_shell", kept_shell)
    monkeypatch.setattr(Checkpoint, "read", watched)
    stream_prune(source, None, CONFIGS[name])
    assert max(held) == 1


def test_the_generation_config_is_taken_over(tmp_path):
    source = dense(tmp_path / "dense")
    path = source / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "do_sample": True, "top_k": 7}))
    assert_same(source, tmp_path, CONFIGS["random"])
    assert json.loads((tmp_path / "streamed" / "model" / "generation_config.json").read_text())["top_k"] == 7


def test_a_tied_tensor_that_is_stored_twice_is_written_once(tmp_path):
    source = dense(tmp_path / "dense", "llama_tied")
    found = load_file(source / "model.safetensors")
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    save_file(found, source / "model.safetensors", metadata={"format": "pt"})
    assert_same(source, tmp_path, CONFIGS["random"])


def test_a_failed_run_leaves_what_was_there(tmp_path, monkeypatch):
    source = dense(tmp_path / "dense")
    stream_prune(source, tmp_path / "out", RandomConfig(0.3))
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    written = []

    def fails(tensors, path, metadata):
        written.append(path)
        raise OSError("No space left on device")

    monkeypatch.setattr(streaming, "save_file", fails)
    with pytest.raises(CheckpointError, match="No space left"):
        stream_prune(source, tmp_path / "out", MagnitudeConfig(0.4))
    assert written
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LLMPrunerConfig(0.3), "llm_pruner"),
        (PruningConfig(0.3), "custom"),
        (MagnitudeConfig(0.3, num_steps=2), "num_steps=2"),
        (MagnitudeConfig(0.3, axes=("hidden",)), "hidden"),
        (MagnitudeConfig(0.3, repair="least_squares"), "repair"),
        (MagnitudeConfig(0.3, allocation="spectral"), "spectral"),
    ],
)
def test_what_needs_the_whole_model_is_refused(config, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        stream_prune(dense(tmp_path / "dense"), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


def test_bad_checkpoints_are_refused(tmp_path):
    config, out = MagnitudeConfig(0.3), tmp_path / "out"
    with pytest.raises(CheckpointError, match="not a directory"):
        stream_prune(tmp_path / "nothing", out, config)
    with pytest.raises(CheckpointError, match="other names"):  # experts are saved one by one
        stream_prune(dense(tmp_path / "mixtral", "mixtral"), out, config)
    source = dense(tmp_path / "dense")
    (tmp_path / "empty").mkdir()
    shutil.copy(source / "config.json", tmp_path / "empty")
    with pytest.raises(CheckpointError, match="no safetensors checkpoint"):
        stream_prune(tmp_path / "empty", out, config)
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(tmp_path / "infinite")
    with pytest.raises(ScoreError, match=r"layers\.1\.mlp"):
        stream_prune(tmp_path / "infinite", out, config)
    with pytest.raises(BudgetError):
        stream_prune(source, out, MagnitudeConfig(0.99, axes=("attention",)))
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="cannot be read"):
        stream_prune(source, out, config)
    assert not out.exists()


def test_command(tmp_path):
    source = write_checkpoint(tmp_path / "dense")
    run = ["prune", str(source), str(tmp_path / "out"), "--method", "prunenet", "--pruning-ratio", "0.3", "--stream"]
    run += ["--num-episodes", "1"]
    dry = CliRunner().invoke(app, [*run, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*run, "--save-policy", str(tmp_path / "policy")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    reused = CliRunner().invoke(app, [*run, "--policy", str(tmp_path / "policy")])
    assert reused.exit_code == 0, reused.output
    refused = CliRunner().invoke(app, [*run, "--calibration", "text.txt"])
    assert refused.exit_code == 2
    assert "--calibration does not go with --stream" in " ".join(refused.output.split())
