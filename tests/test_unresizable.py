"""Axes that the tracing finds but the code of a model does not let go: named with the cause before scoring."""

from __future__ import annotations

import pytest
import torch
from models import make_plan, tiny_model

from hf_prune import MagnitudeConfig, WandaConfig, infer_structure, prune
from hf_prune.cli import inspection
from hf_prune.errors import StructureError
from hf_prune.layers.masking import masked
from hf_prune.surgery.pruned_config import pruned_config, unresizable
from hf_prune.surgery.pruning import apply_plan

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


def test_attention_outside_of_the_layers_is_named():
    from transformers import XLMConfig

    config = XLMConfig(vocab_size=64, emb_dim=48, n_layers=2, n_heads=6, max_position_embeddings=64, causal=True)
    rows = {row.name: row for row in inspection.inspect_config(config).families}
    assert rows["mlp"].prunable
    assert rows["attention"].reason.startswith(
        "it is outside of the list of decoder layers, as transformer.attentions.0"
    )


_CTRL = {"n_embd": 48, "n_head": 6, "n_layer": 3, "dff": 40, "n_positions": 64, "vocab_size": 64}
_REFORMER = {
    "attn_layers": ["local", "local"],
    "is_decoder": True,
    "axial_pos_embds": False,
    "attention_head_size": 8,
    "num_attention_heads": 6,
    "hidden_size": 48,
    "feed_forward_size": 40,
    "max_position_embeddings": 64,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    ("model_type", "sizes", "kind", "cause"),
    [
        ("ctrl", _CTRL, "layer_mlp", "whose constructor takes `config`"),  # its layers are built from numbers
        ("reformer", _REFORMER, "layer", "no attribute 'attn_output'"),  # its layers pass on two streams
    ],
)
def test_verification_goes_on_after_what_is_refused(model_type, sizes, kind, cause):
    """A kind that no checkpoint can hold is named with its cause; the others are proved."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes)).eval()
    checks = {check.kind: check for check in inspection.verify(model)}
    assert cause in checks[kind].refused
    assert not checks[kind].equal
    assert all(checks[proved].equal for proved in ("mlp", "attention"))


def test_layers_that_take_their_heads_from_other_attributes():
    """Sliding layers count theirs by attributes of their own: sizes that coincide are told apart in each kind."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    sizes = {"vocab_size": 96, "unpadded_vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "d_rel": 4}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}
    sliding = {f"swa_{name}": size for name, size in heads.items()}
    experts = {"moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2}
    kinds = {"layer_types": ["hybrid_sliding", "hybrid"], "sliding_window_size": 6, "rel_extent": 64}
    config = CONFIG_MAPPING["inkling2_text"](**sizes, **heads, **sliding, **experts, **kinds)
    model = AutoModelForCausalLM.from_config(config).eval()
    structure = infer_structure(model)
    kept = {f"layers.{i}.attention": (0, 2) for i in range(2)} | {
        f"layers.{i}.attention.queries": (0, 3, 4) for i in range(2)
    }
    plan = make_plan(structure, kept)
    ids = torch.arange(2, 11)[None]
    with torch.no_grad(), masked(model, structure, plan):
        expected = model(ids).logits
    assert torch.allclose(apply_plan(model, structure, plan)(ids).logits, expected, atol=1e-5)
