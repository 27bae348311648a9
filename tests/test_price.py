"""The price of a run from disk is what it reads and writes."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import pytest
from accelerate.utils import OffloadedWeightsLoader
from test_layers_on_disk import EXPERTS, NOT_ON, SHAPES, calibration, checkpoint  # noqa: F401  a fixture
from transformers import CONFIG_MAPPING

from hf_prune import (
    LLMPrunerConfig,
    MagnitudeConfig,
    OBSConfig,
    PolicyGradientConfig,
    PruneNetConfig,
    RandomConfig,
    WandaConfig,
    infer_structure,
    prune,
)
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.layers.price import EPOCHS, STEPS, count_price, price_of
from hf_prune.loading import open_model
from hf_prune.repair import end_to_end

CONFIGS = {
    "random": RandomConfig(0.3),
    "magnitude": MagnitudeConfig(0.3, allocation="spectral"),
    "wanda": WandaConfig(0.3),
    "fisher": LLMPrunerConfig(0.3, repair="least_squares", selection="obs"),
    "mixed": LLMPrunerConfig(0.3, criterion="mixed"),
    "obs": OBSConfig(0.3, repair="least_squares"),
    "prunenet": PruneNetConfig(0.3, num_episodes=2, repair="data_free"),
    "policy gradient": PolicyGradientConfig(0.3, policy_steps=3, windows_per_step=4, num_masks=2, init_samples=6),
}
REFUSED = {
    "policy gradient": NOT_ON["policy gradient, units"],
    "obs": NOT_ON["obs"],
    "fisher": ("bamba",),
    "prunenet": NOT_ON["prunenet, repair without data"],
}


@contextlib.contextmanager
def counted():
    """A list of one number: bytes of weights that were read from disk within."""
    read, load = [0], OffloadedWeightsLoader.__getitem__

    def loaded(loader, key):
        found = load(loader, key)
        read[0] += found.nbytes
        return found

    with patch.object(OffloadedWeightsLoader, "__getitem__", loaded):
        yield read


@pytest.mark.parametrize("name", list(CONFIGS))
def test_weights_that_are_read(checkpoint, name, tmp_path):  # noqa: F811
    family, path, _ = checkpoint
    if family in REFUSED.get(name, ()):
        pytest.skip("refused")
    config, model = CONFIGS[name], open_model(path, layers_on="disk", dtype="float32")
    price = price_of(infer_structure(model), config, calibration(), model)
    with counted() as read:
        result = prune(model, config, calibration=calibration())
        assert read[0] == price.bytes_read
        read[0] = 0
        save_pruned(result.model, tmp_path / "pruned")
    off = abs(result.plan.achieved["decoder"] - config.pruning_ratio)  # the price is that of the asked ratio
    dense = sum(parameter.nbytes for parameter in model.parameters())
    assert abs(read[0] - price.pruned_bytes_read) <= off * dense + 8
    shards = sum(file.stat().st_size for file in (tmp_path / "pruned").glob("*.safetensors"))
    assert abs(shards + read[0] - price.bytes_written) <= 2 * off * dense + 20_000  # headers


def test_the_step_end_to_end_reads_pruned_layers_for_each_size_that_is_tried(checkpoint, monkeypatch):  # noqa: F811
    family, path, whole = checkpoint
    if family not in ("llama", "mixtral"):
        pytest.skip("long")
    config, sizes, go = RandomConfig(0.3, repair="end_to_end"), [], end_to_end._Steps.go_
    monkeypatch.setattr(end_to_end._Steps, "go_", lambda self, size: sizes.append(size) or go(self, size))
    model = open_model(path, layers_on="disk", dtype="float32")
    price = price_of(infer_structure(model), config, calibration(), model)
    assert price_of(infer_structure(whole), config, calibration(), whole).rewritten_bytes == 0 < price.rewritten_bytes
    with counted() as read:
        pruned = prune(model, config, calibration=calibration()).model
    layers = sum(parameter.nbytes for parameter in pruned.parameters() if parameter.is_meta)
    tried, taken = len(sizes) - 1, sizes[-1] > 0  # at last the best one is gone back to
    assert taken == (family == "llama")
    assert read[0] == price.bytes_read + (3 + tried + taken) * layers
    assert price.pruned_bytes_read == pytest.approx((4 + STEPS + 1) * layers, rel=0.1)  # and saved


def test_search_reads_once_for_each_generation(checkpoint):  # noqa: F811
    family, path, _ = checkpoint
    if family in (*EXPERTS, "bamba"):
        pytest.skip("long")
    config = RandomConfig(0.3, allocation="search", search_evaluations=8, search_samples=2)
    model = open_model(path, layers_on="disk", dtype="float32")
    price = price_of(infer_structure(model), config, calibration(), model)
    with counted() as read:
        prune(model, config, calibration=calibration())
    layers = sum(parameter.nbytes for parameter in model.parameters() if parameter.is_meta)
    assert price.bytes_read - layers <= read[0] <= price.bytes_read  # the first plans may fill a generation


def test_curves_from_disk_are_those_in_memory_and_read_no_more_than_is_told(checkpoint):  # noqa: F811
    family, path, whole = checkpoint
    if family not in ("llama", "gpt2"):
        pytest.skip("long")
    config = RandomConfig(0.3, allocation="curves", search_samples=2, repair="least_squares")
    model = open_model(path, layers_on="disk", dtype="float32")
    price = price_of(infer_structure(model), config, calibration(), model)
    with counted() as read:
        plan = prune(model, config, calibration=calibration()).plan
    assert 0 < read[0] <= price.bytes_read
    assert prune(whole, config, calibration=calibration()).plan == plan


def test_a_mixture_computes_what_its_routed_experts_do():
    structure = infer_structure(CONFIG_MAPPING["qwen3_moe"](**SHAPES["qwen3_moe"]))
    config = WandaConfig(0.3)
    found = count_price(structure, config, [16] * 4, 48, 2)
    layers = sum(structure.numel(name) for name in structure.owners)
    experts = sum(structure.numel(name) for name in structure.owners if ".experts." in name)
    assert found.operations == 2 * 64 * (layers - experts // 2)  # two of four


def test_operations_of_passes():
    structure = infer_structure(CONFIG_MAPPING["llama"](**SHAPES["llama"]))
    layers = sum(structure.numel(name) for name in structure.owners)
    tokens, head = 32, 96 * 48
    assert count_price(structure, WandaConfig(0.3), [8] * 4, 48, 4).operations == 2 * layers * tokens
    curves = RandomConfig(0.3, allocation="curves", axes=("mlp",), search_samples=3)
    found = count_price(structure, curves, [8] * 4, 48, 4)  # of each of 3 layers 8 plans run what is left from there on
    assert found.operations == 24 * (2 * layers * (1 + 1 + 8 * (3 + 2 + 1) / 3) + 2 * head * (1 + 1 + 24))
    assert found.boundary_bytes == 24 * 48 * 4 * (3 + 1)
    fisher = count_price(structure, LLMPrunerConfig(0.3), [8] * 4, 48, 4)
    assert fisher.operations == 6 * layers * tokens + 4 * head * tokens
    assert fisher.boundary_bytes == tokens * 48 * 4 * 4
    small = layers - round(0.3 * structure.num_parameters(budget="decoder"))
    fitted, trained, stepped, both = (
        count_price(structure, RandomConfig(0.3, repair=repair), [8] * 4, 48, 4)
        for repair in ("least_squares", "train", "end_to_end", "all")
    )
    assert trained.operations - fitted.operations == 6 * EPOCHS * small * tokens
    assert stepped.operations - fitted.operations == 8 * (small + head) * tokens
    assert both.operations == trained.operations + stepped.operations - fitted.operations
    assert [price.boundary_bytes for price in (trained, stepped)] == [0, tokens * 48 * 4 * 4]
