"""Axes that the tracing finds but the code of a model does not let go: named with the cause before scoring."""

from __future__ import annotations

import pytest
import torch
from models import make_plan, tiny_model

from hf_prune import MagnitudeConfig, WandaConfig, infer_structure, prune
from hf_prune.cli import inspection
from hf_prune.errors import StructureError
from hf_prune.surgery.pruned_config import pruned_config, unresizable

_SIZES = {
    "vocab_size": 64,
    "d_model": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def trocr():
    """Its attention joins the heads to as many channels as the hidden states have, whatever it was built with."""
    from transformers import AutoModelForCausalLM, TrOCRConfig

    return AutoModelForCausalLM.from_config(TrOCRConfig(**_SIZES)).eval()


def test_refused_before_scoring(trocr, monkeypatch):
    monkeypatch.setattr("hf_prune.pipeline.score", lambda *_, **__: pytest.fail("it was scored"))
    batches = [{"input_ids": torch.arange(3, 20)[None]}]
    with pytest.raises(StructureError, match=r"'layers.*.attention' cannot be pruned.*invalid for input.*protect="):
        prune(trocr, WandaConfig(0.3), calibration=batches)


def test_the_other_axes_are_pruned_and_verified(trocr):
    result = prune(trocr, MagnitudeConfig(0.2, axes=("mlp",)))
    assert result.model.model.decoder.layers[0].fc1.out_features < 40
    assert "mlp" in {check.kind for check in inspection.verify(trocr) if check.equal}


def test_inspection_gives_the_cause(trocr):
    rows = {row.name: row for row in inspection.inspect_config(trocr.config).families}
    assert rows["mlp"].prunable
    assert not rows["attention"].prunable
    assert "in model.decoder.layers.0.self_attn" in rows["attention"].reason


def test_models_that_let_all_axes_go_have_no_causes():
    for family in ("llama", "gpt2"):
        model = tiny_model(family)
        assert not unresizable(model.config, infer_structure(model), type(model))


def test_a_state_of_one_width_for_all_layers():
    from transformers import RwkvConfig

    sizes = {"attention_hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2}
    config = RwkvConfig(vocab_size=64, hidden_size=32, context_length=64, **sizes)
    structure = infer_structure(config)
    name = "layers.{}.mlp.attention"
    one = make_plan(structure, {name.format(0): tuple(range(30))})
    with pytest.raises(StructureError, match="does not run token by token"):
        pruned_config(config, structure, one)
    both = make_plan(structure, {name.format(layer): tuple(range(30)) for layer in range(2)})
    assert pruned_config(config, structure, both).attention_hidden_size == 30
