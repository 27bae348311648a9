"""Plans for an engine or a number format keep to what it can serve; budgets of bytes are met and exact."""

from __future__ import annotations

import functools
import json

import models
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING
from typer.testing import CliRunner

from hf_prune.allocation import allocate, rounding
from hf_prune.checkpoint.saving import load_plan
from hf_prune.cli.main import app
from hf_prune.config import PruningConfig, selected_axes
from hf_prune.config.targets import TARGETS
from hf_prune.errors import BudgetError, ConfigError, StructureError
from hf_prune.memory import MARGIN, count_memory, fit_ratio, memory_of, usable_bytes
from hf_prune.structure.forward import tensors
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

WIDE = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 16, "vocab_size": 96}
GATED = {**WIDE, "intermediate_size": 352, "num_key_value_heads": 8, "head_dim": 16}
FAMILIES = {
    "llama": GATED,
    "qwen2": GATED,
    "mixtral": {**GATED, "num_local_experts": 4},
    "falcon": {**WIDE, "ffn_hidden_size": 352, "num_kv_heads": 8, "new_decoder_architecture": True, "alibi": False},
    "gpt2": {"n_embd": 128, "n_layer": 3, "n_head": 8, "n_inner": 352, "vocab_size": 96},
}


@functools.cache
def structure_of(family):
    return infer_structure(CONFIG_MAPPING[family](**FAMILIES[family]), cache=True)


def scores_of(structure, config, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {axis.name: torch.rand(axis.num_units, generator=generator) for axis in selected_axes(structure, config)}


ASKED = (
    ("gguf", ("mlp", "attention", "hidden", "layer_attention")),
    ("int4", ("mlp", "attention", "hidden")),
    ("vllm", ("mlp", "attention", "layer")),
    ("plain", ("mlp", "attention", "layer")),
    ("tp=4", ("mlp", "attention")),
    ("tp=3", ("mlp", "hidden")),
    ("plain,gguf", ("mlp", "attention")),
    ("int4,tp=2", ("mlp", "attention")),
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("names", "axes"), ASKED)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_plan_for_a_target_obeys_it_and_meets_the_budget(family, names, axes, data):
    structure = structure_of(family)
    targets = tuple(names.split(","))
    allocations = ["uniform", "global", {"mlp": 2, "*": 1}] + ["spectral"] * ("plain" not in targets)
    config = PruningConfig(
        data.draw(st.floats(0.05, 0.6)),
        axes=axes,
        targets=targets,
        budget=data.draw(st.sampled_from(["decoder", "model", "units", "memory"])),
        allocation=data.draw(st.sampled_from(allocations)),
        standardise=data.draw(st.sampled_from(["none", "zscore"])),
    )
    exponents = {layer: 2.0 + layer for layer in range(3)}
    try:
        plan = allocate(
            scores_of(structure, config, data.draw(st.integers(0, 9))), structure, config, exponents=exponents
        )
    except BudgetError:
        return
    assert_obeys(plan, structure, targets)
    if config.budget in ("decoder", "model") and config.axes == ("mlp", "attention"):
        dense = structure.num_parameters(budget=config.budget)
        one_step = {a.name: a.num_units - rounding(a, config, structure) for a in selected_axes(structure, config)}
        one_each = dense - structure.num_parameters({k: max(w, 0) for k, w in one_step.items()}, config.budget)
        assert abs(plan.achieved[config.budget] - config.pruning_ratio) * dense <= one_each


def assert_obeys(plan, structure, targets):
    """Each limit once more, from shapes instead of from steps."""
    block = max([32 * ("gguf" in targets), 64 * ("int4" in targets), 1])
    shards = next((int(name[3:]) for name in targets if name.startswith("tp=")), 1)
    widths = plan.widths
    for name in plan.kept_indices:
        axis = structure.axes[name]
        if axis.kind == "layer":
            continue
        assert axis.kind == "hidden" or widths[name] % shards == 0
        assert axis.kind == "hidden" or widths[name] >= shards
        for member in structure.members[name]:
            if member.role == "consumer":
                shape = structure.shape(member.parameter, widths)
                assert shape[member.dim] % (block * (1 if axis.kind == "hidden" else shards)) == 0, (name, shape)
    removed = {branch for _, branch in plan.removed_branches}
    if "vllm" in targets or "plain" in targets:
        assert "attention" not in removed
    if "plain" in targets:
        assert "mlp" not in removed
        for kind in ("attention", "mlp"):
            found = {widths[a.name] for a in structure.axes_of(kind) if a.layer not in plan.removed_layers}
            assert len(found) == 1


def test_every_target_takes_something_away():
    """The limits above are not empty: without them these plans break them."""
    structure = structure_of("llama")
    config = PruningConfig(0.3, allocation="global", axes=("mlp", "attention"))
    plan = allocate(scores_of(structure, config), structure, config)
    for targets in (("gguf",), ("int4",), ("plain",), ("tp=4",)):
        with pytest.raises(AssertionError):
            assert_obeys(plan, structure, targets)


def test_a_search_for_plain_keeps_layers_equal():
    model = models.tiny_model("qwen3", dtype=torch.float32)
    structure = infer_structure(model)
    config = PruningConfig(0.3, allocation="search", targets=("plain",), search_evaluations=12, search_samples=2)
    batches = [{"input_ids": models.token_ids(2, 9)}]
    plan = allocate(scores_of(structure, config), structure, config, model=model, batches=batches)
    assert plan.kept_indices
    assert_obeys(plan, structure, ("plain",))


@pytest.mark.parametrize(
    "targets", [("gguff",), ("tp=1",), ("tp=x",), ("tp=2", "tp=4"), ("gguf", "gguf"), "gguf,gguf", (1,)]
)
def test_unknown_targets_are_refused(targets):
    with pytest.raises(ConfigError, match=r"targets: found .* expected gguf, vllm, plain, int4 or tp=N"):
        PruningConfig(0.3, targets=targets)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        (
            {"targets": ("vllm",), "axes": ("layer_attention",)},
            "axes: found 'layer_attention', which vllm cannot serve",
        ),
        ({"targets": ("plain",), "axes": ("mlp", "layer_mlp")}, "axes: found 'layer_mlp', which plain cannot serve"),
        ({"targets": ("plain",), "allocation": "spectral"}, "allocation: found 'spectral'"),
        ({"targets": ("plain",), "layers": (0, 1)}, "of 3 axes 'mlp' 2 may lose units"),
        ({"targets": ("plain",), "protect": ("layers.1.mlp",)}, "of 3 axes 'mlp' 2 may lose units"),
        ({"targets": ("plain",), "allocation": {"layers.0.*": 1, "*": 2}}, "weigh whole kinds"),
        ({"budget": "memory", "bits": 5}, "bits: found 5, expected 4, 8, 16 or 32"),
        ({"budget": "memory", "context": 0}, "context: found 0"),
    ],
)
def test_what_a_target_cannot_serve_is_refused_with_its_reason(settings_, message):
    structure = structure_of("llama")

    def plan():
        config = PruningConfig(0.3, **settings_)
        return allocate(scores_of(structure, config), structure, config)

    with pytest.raises(ConfigError, match=message):
        plan()


def test_rows_of_the_table_differ_and_say_so():
    assert len({target.name for target in TARGETS}) == len({target.text for target in TARGETS}) == len(TARGETS)


# --- bytes ------------------------------------------------------------------------------------------------------------


def cache_of(output):
    """Bytes of all that is in the cache, counters aside."""
    layers = output.past_key_values.layers
    return sum(t.nbytes for layer in layers for t in tensors(list(vars(layer).values())) if t.dim() > 1)


@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("axes", [("mlp", "attention"), ("layer_attention", "mlp", "hidden")])
def test_predicted_bytes_are_those_of_weights_and_cache(family, axes):
    model = models.tiny_model(family, dtype=torch.float32)
    structure = infer_structure(model, cache=True)
    round_to = 4 if family == "mixtral" else None  # rows of its grouped products are whole 16 bytes
    config = PruningConfig(0.3, budget="memory", axes=axes, context=13, batch=2, bits=32, round_to=round_to)
    plan = allocate(scores_of(structure, config), structure, config)
    dense = count_memory(structure, config)
    for subject, predicted in ((model, dense), (apply_plan(model, structure, plan), memory_of(plan, structure))):
        with torch.no_grad():
            output = subject.generate(
                models.token_ids(2, 5),
                max_new_tokens=9,
                min_new_tokens=9,
                do_sample=False,
                return_dict_in_generate=True,
            )
        assert (predicted.weights, predicted.cache) == (sum(p.nbytes for p in subject.parameters()), cache_of(output))
    assert plan.achieved["memory"] == pytest.approx(1 - memory_of(plan, structure).total / dense.total)
    assert plan.achieved["memory"] >= 0.3


@pytest.mark.parametrize("axis", ["layers", "layers.attention"])
def test_what_is_gone_takes_its_cache_along(axis):
    """Also where the cache has one head, whatever the number of query heads."""
    structure = infer_structure(models.tiny_config("falcon_mqa"), cache=True)
    plan = models.make_plan(structure, {axis: (0,)})
    config = PruningConfig(0.3, context=13, batch=2)
    dense = count_memory(structure, config).cache
    assert count_memory(structure, config, plan.widths, plan.removed_layers, plan.removed_branches).cache == dense / 2


def test_a_window_bounds_the_cache():
    structure = infer_structure(models.tiny_config("gemma3_text"), cache=True)
    short, long = (count_memory(structure, PruningConfig(0.3, context=n)).cache for n in (100, 1000))
    kept = 2 * 3 * 10 * 2  # keys and values, 3 heads of 10 channels, 2 bytes
    assert (short, long) == (kept * (100 + 2 * 4), kept * (1000 + 2 * 4))


def test_a_hybrid_keeps_states_of_one_size():
    config = CONFIG_MAPPING["lfm2"](
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"],
    )  # fmt: skip
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config).eval()
    structure = infer_structure(model, cache=True)
    found = count_memory(structure, PruningConfig(0.3, context=13, batch=2, bits=32))
    with torch.no_grad():
        output = model.generate(
            models.token_ids(2, 5), max_new_tokens=9, min_new_tokens=9, do_sample=False, return_dict_in_generate=True
        )
    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.cache == cache_of(output)


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_what_must_fit_fits_and_no_step_is_wasted(allocation, bits):
    structure = structure_of("llama")
    asked = PruningConfig(0.5, budget="memory", context=512, batch=4, bits=bits, allocation=allocation)
    dense = count_memory(structure, asked).total
    for share in (0.9, 0.7, 0.55):
        fit = f"{round(share * dense / 1000)}KB"
        size = 1000 * int(fit[:-2])
        config = PruningConfig(**{**asked.to_dict(), "pruning_ratio": fit_ratio(structure, fit, asked)})
        found = memory_of(allocate(scores_of(structure, config), structure, config), structure).total
        steps = {axis.name: axis.num_units - 1 for axis in selected_axes(structure, config)}
        one_each = dense - count_memory(structure, config, steps).total
        assert usable_bytes(fit) - one_each < found <= usable_bytes(fit) == int(size * (1 - MARGIN))


def test_longer_contexts_are_paid_for_by_heads():
    """A KV head is worth its weights and its cache: the longer the context, the earlier it goes."""
    structure = structure_of("llama")
    kept = []
    for context in (1, 100):
        config = PruningConfig(0.3, budget="memory", context=context, allocation="global")
        worth = {"attention": 40.0, "mlp": 1.0}  # a head has the parameters of 16 channels: without a cache it stays
        scores = {a.name: torch.full((a.num_units,), worth[a.kind]) for a in selected_axes(structure, config)}
        plan = allocate(scores, structure, config)
        kept.append(sum(plan.widths[axis.name] for axis in structure.axes_of("attention")))
    assert kept == [24, 8]


def test_bytes_that_cannot_be_are_refused():
    structure = structure_of("llama")
    config = PruningConfig(0.5, budget="memory")
    with pytest.raises(BudgetError, match="nothing has to go: the dense model takes"):
        fit_ratio(structure, "8GB", config)
    for fit in ("eight", "8", "infGB", "-1GB"):
        with pytest.raises(ConfigError, match="fit: found"):
            fit_ratio(structure, fit, config)
    with pytest.raises(StructureError, match="infer its structure with cache=True"):
        count_memory(infer_structure(models.tiny_config("llama")), config)


def run(*arguments):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_inspect_answers_from_the_config_alone(tmp_path):
    models.tiny_config("llama").save_pretrained(tmp_path)
    code, output = run("inspect", tmp_path, "--fit", "130KB", "--context", 64, "--batch", 2, "--bits", 16, "--json")
    dense, *rows = json.loads(output)["rows"]
    assert code == 0
    assert dense["weights"] + dense["cache"] > 123_500
    assert dense["note"] == "does not fit: 123,500 bytes of 130KB are usable"
    assert [row["axes"] for row in rows] == ["mlp, attention", "mlp", "attention", "hidden", "layer"]
    assert any("weights" in row for row in rows)
    assert all(row["weights"] + row["cache"] <= 123_500 for row in rows if "weights" in row)
    assert all("out of reach" in row["note"] for row in rows if "weights" not in row)
    code, output = run("inspect", tmp_path, "--fit", "8GB")
    assert code == 0
    assert "none: fits: 7,600,000,000 bytes of 8GB are usable" in output


def test_prune_to_fit_for_targets(tmp_path):
    tiny.write_checkpoint(tmp_path / "dense")
    asked = ["--fit", "40KB", "--set", "context=100", "--for", "plain,tp=2", "--method", "magnitude", "--axes", "mlp"]
    code, output = run("prune", tmp_path / "dense", tmp_path / "pruned", *asked)
    assert code == 0, output
    assert "plain, tp=2: heads and MLP channels divisible by 2; equal widths" in output
    assert "bytes of weights +" in output
    plan = load_plan(tmp_path / "pruned")
    assert plan.config.targets == ("plain", "tp=2")
    structure = infer_structure(str(tmp_path / "dense"), cache=True)
    assert memory_of(plan, structure).total <= 38_000
    assert plan.widths["layers.0.mlp"] == plan.widths["layers.1.mlp"] < 48
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "Pruned for plain, tp=2: heads and MLP channels divisible by 2" in card
    assert "| bytes of weights and cache |" in card
    code, output = run("prune", tmp_path / "dense", tmp_path / "no", *asked, "--pruning-ratio", 0.2)
    assert code == 2
    assert "leave out --pruning-ratio" in output


def test_several_steps_end_where_one_does_with_memory_and_ties():
    model = models.tiny_model("qwen3", dtype=torch.float32)
    from hf_prune import prune
    from hf_prune.config import MagnitudeConfig

    for targets in ((), ("plain",)):
        config = MagnitudeConfig(0.3, budget="memory", context=50, targets=targets, num_steps=3)
        plan = prune(model, config).plan
        assert plan.achieved["memory"] >= 0.3
        assert_obeys(plan, infer_structure(model), targets)
