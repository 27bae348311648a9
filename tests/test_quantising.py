"""Quantised checkpoints load as they were saved, and are counted and measured as what they are."""

from __future__ import annotations

import json
from importlib.util import find_spec

import models
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hf_prune.allocation import allocate
from hf_prune.checkpoint.saving import load_plan, save_pruned
from hf_prune.cli.main import app
from hf_prune.config import PruningConfig
from hf_prune.errors import CheckpointError, ConfigError, StructureError
from hf_prune.evaluation.speed import num_bytes
from hf_prune.exporting.quantising import quantise
from hf_prune.memory import count_memory, memory_of
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

pytest.importorskip("torchao")
needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def write_dense(path):
    """A llama in bfloat16 whose widths are multiples of 64, with the tiny tokenizer."""
    tiny.write_checkpoint(path)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Different widths per layer, all multiples of 64, and one attention removed; where it lies, plan, structure."""
    folder = tmp_path_factory.mktemp("quantising")
    dense = AutoModelForCausalLM.from_pretrained(write_dense(folder / "dense"), dtype=torch.bfloat16)
    structure = infer_structure(dense, cache=True)
    axes = ("mlp", "attention", "layer_attention")
    config = PruningConfig(0.4, axes=axes, allocation="global", targets=("int4",))
    generator = torch.Generator().manual_seed(3)
    worth = {"layers.0.mlp": 0.01, "layers.0.attention": 50.0, "layers.2.attention": 50.0}
    scores = {
        name: torch.rand(axis.num_units, generator=generator) * worth.get(name, 1.0)
        for name, axis in structure.axes.items()
    }
    scores["layers.attention"] = torch.tensor([9.0, -9.0, 9.0])
    plan = allocate(scores, structure, config, base_model_name_or_path=str(folder / "dense"))
    assert plan.removed_branches == {(1, "attention")}
    assert len({plan.widths[axis.name] for axis in structure.axes_of("mlp")}) > 1
    save_pruned(apply_plan(dense, structure, plan), folder / "pruned")
    tiny.write_text(folder / "text.txt", 600, seed=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "pruned" / name).write_text((folder / "dense" / name).read_text())
    return folder, plan, structure


def logits(model):
    with torch.no_grad():
        return model.eval()(models.token_ids(2, 20) % 64).logits.float()


@pytest.mark.parametrize(
    ("scheme", "most"), [("int8", 0.1), ("fp8", 0.2), ("int4", 0.6), pytest.param("nf4", 0.6, marks=needs_bitsandbytes)]
)
def test_a_quantised_checkpoint_loads_as_it_was_saved(pruned, tmp_path, scheme, most):
    folder, plan, _ = pruned
    (row,) = quantise(folder / "pruned", tmp_path / "small", scheme)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map="cpu")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map="cpu")
    exact = AutoModelForCausalLM.from_pretrained(folder / "pruned")
    assert row["num_bytes"] == num_bytes(loaded) < num_bytes(exact)
    assert row["num_parameters"] == exact.num_parameters()
    found, expected = logits(loaded), logits(exact)
    assert torch.equal(found, logits(again))
    assert 0 < (found - expected).abs().max() < most * expected.abs().max()
    assert loaded.config.pruning_config == exact.config.pruning_config
    assert load_plan(tmp_path / "small") == plan


def test_predicted_bytes_at_eight_bits_are_torchaos(pruned, tmp_path):
    folder, plan, structure = pruned
    quantise(folder / "pruned", tmp_path / "small", "fp8")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map="cpu")
    asked = PruningConfig(0.4, bits=8)
    predicted = count_memory(structure, asked, plan.widths, plan.removed_layers, plan.removed_branches).weights
    buffers = sum(buffer.nbytes for buffer in loaded.buffers())
    assert num_bytes(loaded) - buffers == predicted < memory_of(plan, structure).weights


@needs_bitsandbytes
def test_predicted_bytes_at_four_bits_are_more_than_bitsandbytes(pruned, tmp_path):
    """A scale of 32 bits for 64 weights there, two of 16 for 32 weights here."""
    folder, plan, structure = pruned
    quantise(folder / "pruned", tmp_path / "small", "nf4")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map="cpu")
    asked = PruningConfig(0.4, bits=4)
    predicted = count_memory(structure, asked, plan.widths, plan.removed_layers, plan.removed_branches).weights
    assert 0.9 * predicted < num_bytes(loaded) < predicted


def run(*arguments):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout


def test_all_four_models_are_compared(pruned, tmp_path):
    folder = pruned[0]
    text = ["--text", folder / "text.txt", "--window", 32]
    code, output = run("quantise", folder / "pruned", tmp_path / "small", "--scheme", "int8", *text, "--json")
    assert code == 0, output
    rows = {row["model"]: row for row in json.loads(output)["rows"]}
    assert list(rows) == ["dense", "dense, int8", "pruned", "pruned, int8"]
    sizes = [rows[name]["num_bytes"] for name in ("dense", "pruned", "dense, int8", "pruned, int8")]
    assert sizes[0] > sizes[1] > sizes[3]
    assert sizes[0] > sizes[2] > sizes[3]
    code, output = run("eval", tmp_path / "small", *text, "--json")
    assert code == 0, output
    found = json.loads(output)
    assert found["num_bytes"] == sizes[3]
    assert found["perplexity"] == pytest.approx(rows["pruned, int8"]["perplexity"], rel=1e-6)
    for quantised, exact in (("dense, int8", "dense"), ("pruned, int8", "pruned")):
        assert rows[quantised]["perplexity"] == pytest.approx(rows[exact]["perplexity"], rel=0.02)


def test_what_cannot_be_quantised_is_refused_before_anything_is_written(pruned, tmp_path):
    folder = pruned[0]
    output = tmp_path / "small"
    with pytest.raises(ConfigError, match="scheme: found 'int3', expected one of"):
        quantise(folder / "pruned", output, "int3")
    with pytest.raises(CheckpointError, match="not a pruned checkpoint"):
        quantise(folder / "dense", output, "int8")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense")
    structure = infer_structure(model)
    plan = models.make_plan(structure, {"layers.0.mlp": tuple(range(100))})
    save_pruned(apply_plan(model, structure, plan), tmp_path / "odd")
    with pytest.raises(ConfigError, match=r"layers.0.mlp.down_proj has 100 input and 64 output .* --for int4"):
        quantise(tmp_path / "odd", output, "int4")
    gpt2 = models.tiny_model("gpt2", dtype=torch.float32)
    structure = infer_structure(gpt2)
    save_pruned(apply_plan(gpt2, structure, models.make_plan(structure, {"layers.0.mlp": (0, 1)})), tmp_path / "gpt2")
    with pytest.raises(StructureError, match="no linear layer that torchao could quantise"):
        quantise(tmp_path / "gpt2", output, "int8")
    quantise(folder / "pruned", output, "int8")
    with pytest.raises(CheckpointError, match="quantised already"):
        quantise(output, tmp_path / "again", "int8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpt2", "odd", "small"]
