"""A model on disk, one layer in memory at a time, is pruned as the same model in memory: the same bits."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch
from models import token_ids
from tiny import write_checkpoint, write_text
from transformers import AutoModelForCausalLM

from hf_prune import (
    LLMPrunerConfig,
    MagnitudeConfig,
    OBSConfig,
    PolicyGradientConfig,
    PruneNetConfig,
    RandomConfig,
    WandaConfig,
    prune,
)
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.errors import CheckpointError, ConfigError, StructureError
from hf_prune.layers import boundaries
from hf_prune.layers import walk as walk_module
from hf_prune.layers.walk import Walk
from hf_prune.layers.weights import is_on_disk, read_weight, resident
from hf_prune.loading import open_model
from hf_prune.scores import score
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import PrunedLayers

_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SHAPES = {
    "llama": {**_SHAPE, "tie_word_embeddings": True},
    "gemma3_text": {**_SHAPE, "sliding_window": 5},
    "gpt2": {"vocab_size": 96, "n_embd": 40, "n_layer": 3, "n_head": 5, "n_inner": 56, "n_positions": 64},
    "gpt_neox": {k: v for k, v in _SHAPE.items() if k not in ("num_key_value_heads", "head_dim")},
    "mixtral": {**_SHAPE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": {**_SHAPE, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        **{k: v for k, v in _SHAPE.items() if k not in ("num_key_value_heads", "head_dim")},
        "num_key_value_heads": 6,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "bamba": {
        **_SHAPE,
        "attn_layer_indices": [1],
        "mamba_n_heads": 12,
        "mamba_d_head": 8,
        "mamba_d_state": 16,
        "mamba_n_groups": 1,
        "mamba_chunk_size": 16,
    },
}
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3")
LEARN = {"policy_steps": 3, "windows_per_step": 4, "num_masks": 2, "init_samples": 6}
CONFIGS = {
    "random": RandomConfig(0.3),
    "magnitude, whole layers too": MagnitudeConfig(0.3, axes=("mlp", "attention", "layer")),
    "wanda, spectral": WandaConfig(0.3, allocation="spectral"),
    "wanda, hidden": WandaConfig(0.3, axes=("hidden",), budget="model"),
    "fisher, selection, repair": LLMPrunerConfig(0.3, selection="obs", repair="least_squares"),
    "fisher, hidden and branches": LLMPrunerConfig(0.3, axes=("hidden", "layer_mlp"), budget="model"),
    "first order, in steps, repair": LLMPrunerConfig(
        0.3, criterion="first_order", num_steps=2, repair="least_squares", repair_target="asymmetric"
    ),
    "vector, hidden": LLMPrunerConfig(0.3, criterion="vector", axes=("hidden", "mlp"), budget="model"),
    "mixed, end to end": LLMPrunerConfig(0.3, criterion="mixed", repair="end_to_end"),
    "obs": OBSConfig(0.3),
    "prunenet, repair without data": PruneNetConfig(0.3, num_episodes=2, repair="data_free"),
    "policy gradient, units": PolicyGradientConfig(0.3, **LEARN),
    "search with repair": MagnitudeConfig(
        0.3, allocation="search", search_evaluations=6, search_samples=4, repair="least_squares", repair_target="own"
    ),
}
NOT_ON = {
    "policy gradient, units": ("bamba", *EXPERTS),  # rows of a batch cannot carry masks there, in memory neither
    "obs": ("bamba",),  # a convolution consumes an axis
    "prunenet, repair without data": ("gpt_neox",),  # few parameters are in its MLP
    "wanda, hidden": EXPERTS,  # grouped products run on multiples of 8 hidden channels only
    "fisher, hidden and branches": ("bamba", *EXPERTS),
    "vector, hidden": EXPERTS,
    "magnitude, whole layers too": ("bamba", "deepseek_v3"),  # depth is written in their configs
}
ALIKE = ("gemma3_text", "gpt_neox", "qwen3_moe")
"""To a walk they look as llama, gpt2 and mixtral do."""
SLOW = (*ALIKE, "bamba", "deepseek_v3")
OF_ALIKE = ("wanda, spectral", "fisher, selection, repair", "mixed, end to end", "search with repair")


def calibration():
    """The last batch is the first one again: held out, it gains by what is fitted to the others."""
    return [{"input_ids": token_ids(3, 12, seed=seed)} for seed in (0, 1, 0)]


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SHAPES]
)
def checkpoint(request, tmp_path_factory):
    from transformers import CONFIG_MAPPING

    torch.manual_seed(0)
    config = CONFIG_MAPPING[request.param](**SHAPES[request.param])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp(request.param) / "dense"
    model.save_pretrained(path, max_shard_size=60_000)
    return request.param, path, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def same_weights(model, other):
    own, theirs = model.state_dict(), other.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_the_same_bits_as_in_memory(checkpoint, name, tmp_path, monkeypatch):
    family, path, dense = checkpoint
    if family in NOT_ON.get(name, ()):
        pytest.skip("refused in memory too")
    if family in ALIKE and name not in OF_ALIKE:
        pytest.skip("as in the family that it is like")
    config = CONFIGS[name]
    wanted = prune(dense, config, calibration=calibration())
    rewritten, rewrite = [], PrunedLayers.rewrite
    monkeypatch.setattr(PrunedLayers, "rewrite", lambda *args: rewritten.append(1) or rewrite(*args))
    found = prune(path, config, calibration=calibration(), layers_on="disk")
    assert is_on_disk(found.model)
    assert bool(rewritten) == config.repairs_end_to_end
    assert all(torch.equal(found.scores[axis], values) for axis, values in wanted.scores.items())
    assert found.plan.kept_indices == wanted.plan.kept_indices
    ids = token_ids(2, 9, seed=9)
    with torch.no_grad():  # weights that are read from a file lie at other addresses, for which kernels round otherwise
        logits = found.model(input_ids=ids).logits
        torch.testing.assert_close(logits, wanted.model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    save_pruned(found.model, tmp_path / "pruned", plan=found.plan, max_shard_size=40_000)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32), wanted.model)


def test_one_layer_is_resident_at_a_time(checkpoint, monkeypatch):
    _, path, dense = checkpoint
    model, structure = open_model(path, layers_on="disk", dtype="float32"), infer_structure(dense)
    most = []
    run = Walk.run

    def watched(self, *args):
        layers = {self.layer_of(name) for name, p in self.model.named_parameters() if not p.is_meta}
        most.append(len(layers - {None}))
        return run(self, *args)

    monkeypatch.setattr(Walk, "run", watched)
    score(model, structure, LLMPrunerConfig(0.3), calibration())
    assert max(most) == 1


OTHERS = {
    "mamba2": {
        "vocab_size": 96,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_heads": 12,
        "head_dim": 8,
        "state_size": 16,
    }
    | {"n_groups": 1, "chunk_size": 16, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    "zamba": {k: v for k, v in _SHAPE.items() if k != "head_dim"}  # layers 1 and 3 share their attention and MLP
    | {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2, "mamba_d_state": 16}
    | {"attention_hidden_size": 96, "attention_head_dim": 16, "use_mamba_kernels": False, "num_key_value_heads": 6},
}


@pytest.mark.parametrize("family", ["mamba2", pytest.param("zamba", marks=pytest.mark.slow)])
def test_state_spaces_and_shared_layers(family, tmp_path):
    from transformers import CONFIG_MAPPING

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**OTHERS[family])).save_pretrained(tmp_path / "dense")
    for config in (
        WandaConfig(0.3, axes=("mlp",)),
        LLMPrunerConfig(0.3, axes=("mlp",), criterion="first_order", repair="all"),
    ):
        wanted, found = (
            prune(tmp_path / "dense", config, calibration=calibration(), layers_on=where, dtype="float32")
            for where in ("memory", "disk")
        )
        assert is_on_disk(found.model)
        assert all(torch.equal(found.scores[axis], values) for axis, values in wanted.scores.items())
        assert found.plan.kept_indices == wanted.plan.kept_indices
        save_pruned(found.model, tmp_path / config.method)
        assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / config.method), wanted.model)


def test_boundaries_may_be_few_or_on_disk(checkpoint, monkeypatch, caplog):
    _, _, dense = checkpoint
    structure = infer_structure(dense)
    names = [name for name in structure.counted("decoder") if len(structure.layouts[name]) == 2]

    def gradients(**options):
        found = {}
        walk = Walk(dense, structure.layer_paths, calibration(), **options)
        add = lambda name, gradient: found.update({name: found.get(name, 0) + gradient})  # noqa: E731
        walk.backward(lambda part: part.run() or {}, "gradients", wanted=names, consume=add)
        return found

    wanted = gradients()
    assert set(wanted) == set(names)
    for every in (1, 2, 3):
        assert all(torch.equal(wanted[name], values) for name, values in gradients(layered=True, every=every).items())
    monkeypatch.setattr(boundaries, "MEMORY_BYTES", 0)
    assert all(torch.equal(wanted[name], values) for name, values in gradients(layered=True).items())
    each = sum(batch["input_ids"].numel() for batch in calibration()) * dense.get_input_embeddings().weight[0].nbytes
    monkeypatch.setattr(boundaries.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 3 * each}))
    assert all(torch.equal(wanted[name], values) for name, values in gradients(layered=True).items())
    assert "before every 2 layers are kept" in caplog.text
    loss = sum(
        dense(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss * len(batch["input_ids"])
        for batch in calibration()
    )
    loss.backward()
    for name in names:
        if dense.get_parameter(name).grad is not None:
            torch.testing.assert_close(wanted[name], dense.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
    dense.zero_grad(set_to_none=True)


@pytest.mark.parametrize("checkpoint", ["gpt2", "deepseek_v3", "bamba"], indirect=True)
@pytest.mark.parametrize("name", ["fisher, selection, repair", "obs", "search with repair"])
def test_hidden_states_that_are_large_lie_in_files(checkpoint, name, monkeypatch):
    family, path, _ = checkpoint
    if family in NOT_ON.get(name, ()):
        pytest.skip("refused in memory too")
    config = CONFIGS[name]
    wanted = prune(path, config, calibration=calibration(), layers_on="disk", dtype="float32")
    written, write = [], walk_module.on_disk
    monkeypatch.setattr(walk_module, "on_disk", lambda values: written.append(1) or write(values))
    monkeypatch.setattr(boundaries, "MEMORY_BYTES", 0)
    found = prune(path, config, calibration=calibration(), layers_on="disk", dtype="float32")
    assert len(written) > 9
    assert all(torch.equal(found.scores[axis], values) for axis, values in wanted.scores.items())
    assert found.plan.kept_indices == wanted.plan.kept_indices
    for layer in infer_structure(found.model).layer_paths:
        with resident(found.model.get_submodule(layer)), resident(wanted.model.get_submodule(layer)):
            assert same_weights(found.model.get_submodule(layer), wanted.model.get_submodule(layer))


def test_weights_come_and_go(checkpoint):
    _, path, dense = checkpoint
    model, structure = open_model(path, layers_on="disk", dtype="float32"), infer_structure(dense)
    layer = model.get_submodule(structure.layer_paths[1])
    with resident(layer):
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, dense.get_submodule(structure.layer_paths[1]).get_parameter(name))
    assert all(parameter.is_meta for parameter in layer.parameters())
    ids = token_ids(2, 7)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, dense(input_ids=ids).logits)


# --- half precision, other sources ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, dtype):
    path = write_checkpoint(tmp_path / "dense")
    config, batches = LLMPrunerConfig(0.3, repair="least_squares"), [{"input_ids": token_ids(2, 12) % 64}]
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    wanted = prune(dense, config, calibration=batches)
    found = prune(path, config, calibration=batches, layers_on="disk", dtype=dtype)
    assert found.plan.kept_indices == wanted.plan.kept_indices
    save_pruned(found.model, tmp_path / "pruned")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned"), wanted.model)


def test_a_pruned_checkpoint_is_pruned_again(tmp_path):
    path = write_checkpoint(tmp_path / "dense", num_layers=3)
    first = prune(path, MagnitudeConfig(0.3, allocation="global"), layers_on="disk")
    save_pruned(first.model, tmp_path / "first", plan=first.plan)
    wanted = prune(tmp_path / "first", MagnitudeConfig(0.2, round_to=None), layers_on="memory")
    found = prune(tmp_path / "first", MagnitudeConfig(0.2, round_to=None), layers_on="disk")
    assert not is_on_disk(wanted.model)
    assert found.plan == wanted.plan
    save_pruned(found.model, tmp_path / "second", plan=found.plan)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "second"), wanted.model)


def test_temporary_files_go_with_the_models(tmp_path, monkeypatch):
    import gc
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    path = write_checkpoint(tmp_path / "dense")
    found = prune(path, RandomConfig(0.3), layers_on="disk")
    assert list((tmp_path / "tmp").iterdir())
    del found
    gc.collect()
    assert not list((tmp_path / "tmp").iterdir())


# --- work directory ---------------------------------------------------------------------------------------------------

RESUMED = {
    "fisher": LLMPrunerConfig(0.3, num_samples=6, seq_len=16, selection="obs", repair="least_squares"),
    "obs in steps, all repair": OBSConfig(0.4, num_samples=12, seq_len=16, num_steps=2, repair="all"),
    "policy gradient": PolicyGradientConfig(0.3, num_samples=8, seq_len=16, state_steps=1, **LEARN),
    "search": WandaConfig(0.3, num_samples=6, seq_len=16, allocation="search", search_evaluations=8, search_samples=4),
}


class Interrupted(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("name", list(RESUMED))
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, name, where):
    """Stopped at random places, at every file that is about to be written, and resumed until it is through."""
    from hf_prune.layers import work

    path, config = write_checkpoint(tmp_path / "dense", num_layers=3), RESUMED[name]
    write_text(tmp_path / "text.txt", 400, seed=1)
    wanted = prune(path, config, calibration=str(tmp_path / "text.txt"), layers_on="memory")
    draw, written = random.Random(name), work.write_tensors
    stops = 0

    def sometimes(*args):
        if draw.random() < 0.12:
            raise Interrupted
        written(*args)

    others = ("layers.boundaries", "surgery.pruning", "repair.end_to_end")
    for module in (work, *(sys.modules[f"hf_prune.{name}"] for name in others)):
        monkeypatch.setattr(module, "write_tensors", sometimes)
    options = {"calibration": str(tmp_path / "text.txt"), "layers_on": where, "work_dir": tmp_path / "work"}
    while True:
        try:
            found = prune(path, config, **options)
            break
        except Interrupted:
            stops += 1
            assert stops < 60
    assert stops > 0 or isinstance(config, PolicyGradientConfig)  # which writes its state by itself
    assert found.plan == wanted.plan
    assert all(torch.equal(found.scores[axis], values) for axis, values in wanted.scores.items())
    save_pruned(found.model, tmp_path / "pruned", plan=found.plan)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype=torch.float32), wanted.model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_done_already_is_taken_as_it_is(tmp_path, monkeypatch, dtype):
    path = write_checkpoint(tmp_path / "dense", num_layers=3)
    write_text(tmp_path / "text.txt", 400, seed=1)
    config = WandaConfig(0.3, num_samples=12, seq_len=16, repair="end_to_end")
    options = {"calibration": str(tmp_path / "text.txt"), "layers_on": "disk", "dtype": dtype, "batch_size": 4}
    wanted = prune(path, config, **options)

    def stop(*args):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("hf_prune.repair.step_end_to_end_", stop)
        with pytest.raises(Interrupted):
            prune(path, config, work_dir=tmp_path / "work", **options)
    for _ in range(2):  # goes on, and is done
        found = prune(path, config, work_dir=tmp_path / "work", **options)
        assert {p.dtype for p in found.model.parameters()} == {getattr(torch, dtype)}
        assert found.perplexity_after == wanted.perplexity_after
        assert same_weights_on_disk(found.model, wanted.model)


@pytest.mark.parametrize("checkpoint", ["llama"], indirect=True)
def test_layers_that_were_being_exchanged_when_a_run_was_killed_are_whole_afterwards(checkpoint, tmp_path, monkeypatch):
    _, path, dense = checkpoint
    config, options = WandaConfig(0.3, repair="end_to_end"), {"calibration": calibration()}
    wanted = prune(dense, config, **options)
    moved, replace = [], Path.replace

    def first_only(file, target):
        if file.parent.name == "rewritten" and file.suffix == ".safetensors":
            moved.append(file)
            if len(moved) > 1:
                raise Interrupted
        return replace(file, target)

    options |= {"layers_on": "disk", "work_dir": tmp_path / "work"}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", first_only)
        with pytest.raises(Interrupted):
            prune(path, config, **options)
    for _ in range(2):  # goes on, and is done
        assert same_weights_on_disk(prune(path, config, **options).model, wanted.model)


def same_weights_on_disk(found, wanted):
    names = [name for name, _ in wanted.named_parameters()]
    return all(torch.equal(read_weight(found, name), read_weight(wanted, name)) for name in names)


def test_scores_are_kept_for_other_ratios(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "dense", num_layers=3)
    options = {"calibration": [{"input_ids": token_ids(3, 12) % 64}], "work_dir": tmp_path / "work"}
    prune(path, WandaConfig(0.3), **options)
    passes = []
    forward = Walk.forward
    monkeypatch.setattr(Walk, "forward", lambda self, *args, **kw: (passes.append(1), forward(self, *args, **kw))[1])
    found = prune(path, WandaConfig(0.5, allocation="global"), **options)
    assert not passes
    assert found.plan == prune(path, WandaConfig(0.5, allocation="global"), calibration=options["calibration"]).plan
    with pytest.raises(CheckpointError, match=r"the work of another run: .*method"):
        prune(path, LLMPrunerConfig(0.3), **options)
    with pytest.raises(CheckpointError, match=r"the work of another run: .*text"):
        prune(path, WandaConfig(0.3), **options | {"calibration": [{"input_ids": token_ids(3, 13) % 64}]})
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(1.0)
    with pytest.raises(CheckpointError, match=r"the work of another run: .*model"):
        prune(other, WandaConfig(0.3), **options)


def test_what_a_search_measured_serves_the_same_question_only(tmp_path):
    """Plans lose something else on other windows, and when they are repaired."""
    path = write_checkpoint(tmp_path / "dense", num_layers=3)
    batches = [{"input_ids": token_ids(4, 12, seed=seed) % 64} for seed in range(2)]
    search = {"allocation": "search", "search_evaluations": 8, "search_samples": 4}
    for other in ({}, {"search_samples": 8}, {"repair": "least_squares"}):
        config = WandaConfig(0.4, **search | other)
        found = prune(path, config, calibration=batches, work_dir=tmp_path / "work")
        assert found.plan == prune(path, config, calibration=batches).plan
    files = sorted(file.parent.name for file in (tmp_path / "work").glob("search*/divergences.safetensors"))
    assert len(files) == 3


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_before_work(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(path)
    batches = [{"input_ids": token_ids(3, 12) % 64}]
    with pytest.raises(ConfigError, match="layers_on='disk' found a model in memory"):
        prune(dense, RandomConfig(0.3), layers_on="disk")
    with pytest.raises(ConfigError, match="layers_on: found 'cloud'"):
        prune(path, RandomConfig(0.3), layers_on="cloud")
    with pytest.raises(ConfigError, match="latency table"):
        prune(path, RandomConfig(0.3, budget="latency"), layers_on="disk")
    with pytest.raises(CheckpointError, match="'nowhere'"):
        prune("nowhere", RandomConfig(0.3), layers_on="disk")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match=r"the work directory .* cannot be written"):
        prune(dense, RandomConfig(0.3), work_dir=tmp_path / "file")
    with pytest.raises(CheckpointError, match="has no data"):
        prune(dense.to("meta"), RandomConfig(0.3))
    monkeypatch.setattr(boundaries.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(CheckpointError, match=r"this run writes [\d,]+ bytes to the disk of .*, 10 are free"):
        prune(path, LLMPrunerConfig(0.3), calibration=batches, work_dir=tmp_path / "work")


def test_layers_that_exchange_more_than_hidden_states_are_one_segment(tmp_path):
    """In memory everything but repair works; from disk, and repair, are refused before anything is scored."""
    path = write_checkpoint(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(path)
    batches = [{"input_ids": token_ids(3, 12) % 64}]
    first, second = model.model.layers
    seen = []
    first.register_forward_hook(lambda module, args, output: seen.append(output.mean()))
    hook = lambda module, args, kwargs: ((args[0] + seen[-1], *args[1:]), kwargs)  # noqa: E731
    handle = second.register_forward_pre_hook(hook, with_kwargs=True)
    structure = infer_structure(AutoModelForCausalLM.from_pretrained(path))
    assert not Walk(model, structure.layer_paths, batches).protocol.layered
    score(model, structure, LLMPrunerConfig(0.3), batches)
    with pytest.raises(StructureError, match="cannot be run one at a time"):
        prune(model, OBSConfig(0.3), calibration=batches)
    handle.remove()
    assert Walk(model, structure.layer_paths, batches).protocol.layered


def test_the_command_line(tmp_path):
    from typer.testing import CliRunner

    from hf_prune.cli.main import app

    path, text = write_checkpoint(tmp_path / "dense"), write_text(tmp_path / "text.txt", 400, seed=1)
    options = ["--method", "obs", "--pruning-ratio", "0.3", "--calibration", str(text)]
    options += ["--num-samples", "4", "--seq-len", "16", "--layers-on", "disk", "--work-dir", str(tmp_path / "work")]
    result = CliRunner().invoke(app, ["prune", str(path), str(tmp_path / "out"), *options])
    assert result.exit_code == 0, result.output
    assert "this run reads" in result.stderr
    wanted = prune(path, OBSConfig(0.3, num_samples=4, seq_len=16), calibration=str(text), layers_on="memory")
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), wanted.model)
    assert Path(tmp_path / "work").is_dir()


def test_buffers_that_are_saved_stay_with_their_layers(tmp_path, monkeypatch):
    """As the correction bias of a router in DeepSeek-V3, which is a buffer in some versions of transformers."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    init, forward = LlamaMLP.__init__, LlamaMLP.forward

    def with_buffer(self, config):
        init(self, config)
        self.register_buffer("offset", torch.zeros(config.hidden_size))

    monkeypatch.setattr(LlamaMLP, "__init__", with_buffer)
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) + self.offset)
    path = write_checkpoint(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(path)
    for layer in dense.model.layers:
        layer.mlp.offset.normal_()
    dense.save_pretrained(path)
    wanted, found = (prune(path, MagnitudeConfig(0.3), layers_on=where) for where in ("memory", "disk"))
    save_pruned(found.model, tmp_path / "pruned", plan=found.plan)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert same_weights(loaded, wanted.model)
    assert torch.equal(loaded.model.layers[1].mlp.offset, dense.model.layers[1].mlp.offset)

    def interrupted(self):
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr("hf_prune.surgery.pruning.PrunedLayers.finish", interrupted)
        with pytest.raises(Interrupted):
            prune(path, MagnitudeConfig(0.3), layers_on="disk", work_dir=tmp_path / "work")
    resumed = prune(path, MagnitudeConfig(0.3), layers_on="disk", work_dir=tmp_path / "work")
    save_pruned(resumed.model, tmp_path / "resumed", plan=resumed.plan)
    assert same_weights(AutoModelForCausalLM.from_pretrained(tmp_path / "resumed"), wanted.model)
