"""Plain checkpoints: stock classes compute the same; padding is the inverse of slicing; no wider than need be."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch
from models import FAMILIES, logits, make_plan, random_kept, shared_structure, tiny_model, token_ids

import hf_prune
from hf_prune.errors import CheckpointError, ConfigError, StructureError
from hf_prune.exporting import plain
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan
from hf_prune.surgery.slicing import pad_tensor, slice_tensor

# What goes from the first family axes that there are: of each layer something else, or the same of all.
_MIXED = {
    "layers.0.attention": (1,),
    "layers.1.attention": (0, 2),
    "layers.0.mlp": tuple(range(1, 36, 2)),
    "layers.1.mlp": tuple(range(30)),
}


def saved(tmp_path, family, kept, **values):
    """A pruned float32 checkpoint and its model."""
    model = tiny_model(family, dtype=torch.float32)
    for name, value in values.items():
        setattr(model.config, name, value)
    structure = infer_structure(model)
    pruned = apply_plan(model, structure, make_plan(structure, kept))
    pruned.save_pretrained(tmp_path / "pruned")
    return tmp_path / "pruned", pruned


def exported(path, output):
    from transformers import AutoModelForCausalLM

    written = hf_prune.export(path, output, format="plain")
    return written, AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)


def difference(one, other):
    for model in (one, other):
        if model.config.model_type == "mixtral":  # the grouped product wants rows of whole 16 bytes
            model.set_experts_implementation("eager")
    return (logits(one) - logits(other)).abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_is_the_inverse_of_slicing(family):
    structure = shared_structure(family)
    plan = make_plan(structure, random_kept(structure, random.Random(family)))
    for name, tensor in tiny_model(family).state_dict().items():
        sliced = slice_tensor(name, tensor, structure, plan)
        padded = pad_tensor(name, sliced, structure, plan)
        assert padded.shape == tensor.shape
        assert torch.equal(slice_tensor(name, padded, structure, plan), sliced)
        assert padded.count_nonzero() == sliced.count_nonzero()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "bloom"])
def test_every_family_computes_the_same(family, tmp_path):
    structure = shared_structure(family)
    kept = random_kept(structure, random.Random(3))
    path, pruned = saved(tmp_path, family, kept)
    written, model = exported(path, tmp_path / "plain")
    assert difference(pruned, model) < 1e-4
    assert type(model) is type(pruned)
    assert written.num_exported == model.num_parameters() >= pruned.num_parameters() == written.num_parameters
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not {"per_layer_config", "pruning_config", "pruning_digests", "auto_map"} & config.keys()


def test_stock_transformers_alone_loads_it_and_says_the_same(tmp_path):
    path, pruned = saved(tmp_path, "llama", {**_MIXED, "layers.attention": (0, 1), "layers.mlp": (0, 1)})
    written = hf_prune.export(path, tmp_path / "plain", format="plain")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A\n"
        f"m = A.from_pretrained({str(written.path)!r}); torch.save(m(torch.load(sys.argv[1])).logits, sys.argv[2])\n"
        "assert 'hf_prune' not in sys.modules"
    )
    torch.save(token_ids(), tmp_path / "ids.pt")
    command = [sys.executable, "-c", code, str(tmp_path / "ids.pt"), str(tmp_path / "logits.pt")]
    subprocess.run(command, check=True, capture_output=True)
    assert (torch.load(tmp_path / "logits.pt") - logits(pruned)).abs().max() < 1e-5
    assert "the attention of layers 2, which was removed, is written as zeros" in written.notes


def test_layers_become_as_wide_as_the_widest_and_no_wider(tmp_path):
    kept = {**_MIXED, "layers.2.attention": (0, 1), "layers.2.mlp": tuple(range(9))}
    path, pruned = saved(tmp_path, "mistral", {k: v for k, v in kept.items() if ".2." not in k})
    _, model = exported(path, tmp_path / "plain")
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (4, 2, 30)
    assert model.model.layers[0].self_attn.k_proj.weight[10:].count_nonzero() == 0
    assert difference(pruned, model) < 1e-5


def test_a_llama_with_a_head_count_that_its_class_refuses_is_a_mistral(tmp_path):
    kept = {f"layers.{layer}.attention": (0, 2) for layer in range(3)}
    path, _ = saved(tmp_path, "llama", kept)
    assert exported(path, tmp_path / "four")[0].architecture == "LlamaForCausalLM"  # 4 heads divide 48
    model = tiny_model("llama", dtype=torch.float32)
    structure = infer_structure(model)
    five = apply_plan(model, structure, make_plan(structure, {"hidden": tuple(range(1, 47))}))  # 46 / 6
    five.save_pretrained(tmp_path / "hidden")
    written, model = exported(tmp_path / "hidden", tmp_path / "plain")
    assert (written.architecture, model.config.hidden_size, model.config.head_dim) == ("MistralForCausalLM", 46, 10)
    assert written.num_exported == written.num_parameters
    assert model.config.sliding_window is None
    assert difference(five, model) < 1e-5
    assert any("llama config refuses" in note for note in written.notes)


def test_a_llama_with_biases_has_no_other_class(tmp_path):
    from served import tiny_served_model

    model = tiny_served_model("llama", "different", attention_bias=True)
    model.save_pretrained(tmp_path / "pruned")
    written, plain_model = exported(tmp_path / "pruned", tmp_path / "plain")
    assert written.architecture == "LlamaForCausalLM"
    assert difference(model, plain_model) < 1e-4


def test_heads_that_no_attribute_counts_stay_as_many_as_the_base_has(tmp_path):
    kept = {f"layers.{layer}.{axis}": (0, 1, 3) for layer in range(3) for axis in ("attention", "mlp")}
    path, pruned = saved(tmp_path, "gpt2", kept)
    written, model = exported(path, tmp_path / "plain")
    assert (model.config.n_head, model.config.n_inner) == (5, 3)
    assert difference(pruned, model) < 1e-5
    assert written.notes == ("units of zeros were added to attention in layers narrower than the widest",)


def test_a_large_model_is_written_in_parts_and_reads_one_weight_at_a_time(tmp_path, monkeypatch):
    path, pruned = saved(tmp_path, "llama", _MIXED)
    monkeypatch.setattr(plain, "DISK_SHARD", 40_000)
    _, model = exported(path, tmp_path / "plain")
    assert len(list((tmp_path / "plain").glob("model-*.safetensors"))) > 3
    assert difference(pruned, model) < 1e-5


def test_a_dense_checkpoint_stays_bit_for_bit(tmp_path):
    model = tiny_model("qwen3", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    hf_prune.export(tmp_path / "dense", tmp_path / "plain", format="plain")
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_what_zeros_would_change_is_refused_and_nothing_is_written(tmp_path):
    path, _ = saved(tmp_path / "bloom", "bloom", {"layers.0.attention": (0, 1)})
    with pytest.raises(StructureError, match="position biases"):
        hf_prune.export(path, tmp_path / "out", format="plain")
    path, _ = saved(tmp_path / "gpt2", "gpt2", {"hidden": tuple(range(32))})
    with pytest.raises(StructureError, match=r"found 32 units, expected 40.*norm"):
        hf_prune.export(path, tmp_path / "out", format="plain")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["plain", "gguf"])
def test_quantised_checkpoints_are_refused(format, tmp_path):
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "dense")
    path = tmp_path / "dense" / "config.json"
    quantised = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": quantised}))
    with pytest.raises(StructureError, match="quantised"):
        hf_prune.export(tmp_path / "dense", tmp_path / "out", format=format)


def test_bad_arguments_are_refused_before_anything_is_read(tmp_path):
    (tmp_path / "there").write_text("mine")
    with pytest.raises(CheckpointError, match="is a file, expected a directory"):
        hf_prune.export("no-model", tmp_path / "there", format="plain")
    with pytest.raises(ConfigError, match="format: found 'coreml'"):
        hf_prune.export("no-model", tmp_path / "new", format="coreml")
    with pytest.raises(ConfigError, match="round_to"):
        hf_prune.export("no-model", tmp_path / "new", format="plain", round_to=32)
    assert (tmp_path / "there").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]
