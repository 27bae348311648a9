"""Slicing, masking and the config of a pruned model, case by case; the laws over all families are in test_laws.py."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from models import logits, make_plan, shared_model, shared_structure, tiny_model, token_ids
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from hf_prune.errors import PlanError
from hf_prune.format.building import needs_plugin
from hf_prune.layers.masking import keep_mask, mask_axis, masked
from hf_prune.structure.forward import Forward
from hf_prune.structure.inference import infer_structure
from hf_prune.structure.layouts import unit_ids
from hf_prune.surgery.pruned_config import pruned_config
from hf_prune.surgery.pruning import _copy_buffers, apply_plan
from hf_prune.surgery.slicing import pruned_name, slice_state_dict, slice_tensor

_SIZES = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 8}
WIDE = {
    "llama": _SIZES,
    "deepseek_v3": {
        **_SIZES,
        "num_key_value_heads": 8,
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 6,
    },
}
KEPT = {"layers.0.mlp": tuple(range(1, 40, 3)), "layers.1.attention": (0, 2)}


def llama_plan(kept=KEPT):
    return make_plan(shared_structure("llama"), kept)


# --- slicing ----------------------------------------------------------------------------------------------------------


def test_slices_by_hand():
    """Group 1 of 3 goes: 2 query heads of 10 entries each, and one key and one value head."""
    state = shared_model("llama").state_dict()
    sliced = slice_state_dict(state, shared_structure("llama"), llama_plan())
    prefix = "model.layers.1.self_attn."
    q, o = state[prefix + "q_proj.weight"], state[prefix + "o_proj.weight"]
    assert torch.equal(sliced[prefix + "q_proj.weight"], torch.cat([q[:20], q[40:]]))
    assert torch.equal(sliced[prefix + "o_proj.weight"], torch.cat([o[:, :20], o[:, 40:]], 1))
    k = state[prefix + "k_proj.weight"]
    assert torch.equal(sliced[prefix + "k_proj.weight"], torch.cat([k[:10], k[20:]]))
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(sliced[down], state[down][:, 1::3])


def test_slices_of_fused_weights_by_hand():
    state, structure = shared_model("phi3").state_dict(), shared_structure("phi3")
    plan = make_plan(structure, {"layers.0.mlp": (3, 5), "layers.0.attention": (1, 2)})
    sliced = slice_state_dict(state, structure, plan)
    gate_up, qkv = "model.layers.0.mlp.gate_up_proj.weight", "model.layers.0.self_attn.qkv_proj.weight"
    assert torch.equal(sliced[gate_up], state[gate_up][[3, 5, 43, 45]])
    rows = [*range(16, 48), *range(56, 72), *range(80, 96)]
    assert torch.equal(sliced[qkv], state[qkv][rows])


def test_slicing_is_pure_and_shares_no_memory():
    state = {name: tensor.clone() for name, tensor in shared_model("llama").state_dict().items()}
    before = {name: tensor.clone() for name, tensor in state.items()}
    sliced = slice_state_dict(state, shared_structure("llama"), llama_plan())
    for tensor in sliced.values():
        tensor.zero_()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_tied_weights_stay_tied():
    model, structure = shared_model("llama_tied"), shared_structure("llama_tied")
    plan = make_plan(structure, {"hidden": tuple(range(24))})
    sliced = slice_state_dict(model.state_dict(keep_vars=True), structure, plan)
    assert sliced["lm_head.weight"] is sliced["model.embed_tokens.weight"]
    pruned = apply_plan(model, structure, plan)
    assert pruned.lm_head.weight is pruned.model.embed_tokens.weight


def test_names_move_up_when_layers_go():
    structure = shared_structure("llama")
    plan = make_plan(structure, {"layers": (0, 2), "layers.mlp": (0,)})
    assert pruned_name("model.layers.1.mlp.up_proj.weight", structure, plan) is None
    norm = "input_layernorm.weight"
    assert pruned_name(f"model.layers.2.{norm}", structure, plan) == f"model.layers.1.{norm}"
    assert pruned_name("model.layers.2.mlp.up_proj.weight", structure, plan) is None
    assert pruned_name("model.norm.weight", structure, plan) == "model.norm.weight"


def test_tensors_that_do_not_belong_are_refused():
    structure, plan = shared_structure("llama"), llama_plan()
    with pytest.raises(PlanError, match=r"rotary\.weight: this tensor is not part of the structure of llama"):
        slice_tensor("rotary.weight", torch.zeros(3), structure, plan)
    with pytest.raises(PlanError, match=r"found shape \(3,\), the structure has \(48,\)"):
        slice_tensor("model.norm.weight", torch.zeros(3), structure, plan)


# --- masking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bloom"])
def test_masking_leaves_the_model_as_it_was_also_after_an_error(family):
    model, structure = copy.deepcopy(shared_model(family)), shared_structure(family)
    removed = {"layers.attention": (0, 1)} if len(structure.layer_paths) == 3 else {}
    plan = make_plan(structure, {"layers.0.mlp": (0, 1), "layers.1.attention": (0, 2), **removed})
    expected = logits(model)
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    with contextlib.suppress(KeyError), masked(model, structure, plan):
        assert not torch.equal(logits(model), expected)
        raise KeyError
    assert torch.equal(logits(model), expected)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    for name, parameter in model.named_parameters():
        assert id(parameter) == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_masks_may_be_soft():
    """Scale one unit by a half: as if its column of down_proj were halved."""
    model, structure = copy.deepcopy(shared_model("llama")), shared_structure("llama")
    mask = torch.ones(40)
    mask[7] = 0.5
    with mask_axis(model, structure, "layers.1.mlp", mask):
        found = logits(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 7] *= 0.5
    assert torch.allclose(found, logits(model), rtol=1e-9, atol=0)
    assert keep_mask(4, (1, 3)).tolist() == [False, True, False, True]


# --- the pruned model -------------------------------------------------------------------------------------------------


def test_flags_modes_and_generation_config_come_along():
    model = tiny_model("llama", dtype=torch.bfloat16)
    model.set_attn_implementation("eager")
    model.generation_config.max_new_tokens = 3
    model.generation_config.repetition_penalty = 1.5
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[2].mlp.up_proj.weight.requires_grad_(False)
    model.train()
    plan = llama_plan({**{k: v for k, v in KEPT.items() if "1" not in k}, "layers": (0, 2)})
    pruned = apply_plan(model, shared_structure("llama"), plan)
    assert pruned.training
    assert all(module.training for module in pruned.modules())
    assert pruned.dtype == torch.bfloat16
    assert pruned.config.dtype == model.config.dtype
    assert pruned.config._attn_implementation == "eager"
    assert pruned.generation_config.to_dict() == model.generation_config.to_dict()
    assert pruned.generation_config is not model.generation_config
    frozen = {name for name, parameter in pruned.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"}
    assert pruned._pruning_plan == plan


def test_the_dense_model_and_its_config_are_not_changed():
    model = tiny_model("llama")
    state, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    pruned = apply_plan(model, shared_structure("llama"), llama_plan())
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.zero_()
    pruned.config.hidden_size = 1
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_offloaded_weights_and_other_models_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(PlanError, match="the model is on disk; use `prune`"):
        apply_plan(model, shared_structure("llama"), llama_plan())
    with pytest.raises(PlanError, match=r"the plan is for model type 'llama', found 'mistral'.*make a new plan"):
        apply_plan(shared_model("mistral"), shared_structure("mistral"), llama_plan())
    with pytest.raises(PlanError, match="found shape"):
        apply_plan(shared_model("llama_tied"), shared_structure("llama"), llama_plan())


# --- its config -------------------------------------------------------------------------------------------------------


def test_per_layer_values_where_widths_differ():
    config = apply_plan(shared_model("llama"), shared_structure("llama"), llama_plan()).config
    values = config.to_dict()
    overrides = {int(layer): own for layer, own in values["per_layer_config"].items()}
    assert overrides == {0: {"intermediate_size": 13}, 1: {"num_attention_heads": 4, "num_key_value_heads": 2}}
    assert values["intermediate_size"] == 40
    assert values["num_attention_heads"] == 6
    assert values["head_dim"] == 10
    assert "surgery" not in values["pruning_config"]
    assert needs_plugin(config)
    assert config.per_layer_config[0].intermediate_size == 13
    assert config.per_layer_config[1].num_key_value_heads == 2


def test_uniform_widths_are_plain_values():
    kept = {f"layers.{layer}.mlp": tuple(range(layer, layer + 16)) for layer in range(3)}
    kept |= {f"layers.{layer}.attention": (layer,) for layer in range(3)}
    config = apply_plan(shared_model("llama"), shared_structure("llama"), llama_plan(kept)).config
    assert (config.intermediate_size, config.num_attention_heads, config.num_key_value_heads) == (16, 2, 1)
    assert not needs_plugin(config)
    assert "per_layer_config" not in config.to_dict()


def test_removing_layers_shortens_every_list_of_layers():
    structure = shared_structure("gemma3_text")
    config = apply_plan(shared_model("gemma3_text"), structure, make_plan(structure, {"layers": (1, 2)})).config
    assert config.num_hidden_layers == 2
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert not needs_plugin(config)


def test_hidden_width_is_plain_where_the_class_takes_it():
    structure = shared_structure("mistral")
    plan = make_plan(structure, {"hidden": tuple(range(0, 48, 2))})
    config = apply_plan(shared_model("mistral"), structure, plan).config
    assert (config.hidden_size, config.head_dim) == (24, 10)
    assert not needs_plugin(config)


@pytest.mark.parametrize(("family", "width"), [("gpt2", 20), ("gpt2", 37), ("opt", 20), ("gemma3_text", 24)])
def test_what_a_class_derives_from_the_hidden_size_stays(family, width, tmp_path):
    """head_dim, or the scale of gemma's embeddings, must be the dense one: attention sees the same products."""
    from transformers import AutoModelForCausalLM

    model, structure = tiny_model(family, dtype=torch.float32), shared_structure(family)
    plan = make_plan(structure, {"hidden": tuple(range(width))})
    pruned = apply_plan(model, structure, plan)
    pruned.save_pretrained(tmp_path)
    expected = logits(pruned)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, atol=1e-6)
    ignore_hidden_channels_(model, structure, width)
    assert torch.allclose(logits(model), expected, atol=1e-5)


def ignore_hidden_channels_(model, structure, width):
    """Make the dense model ignore hidden channels from `width` on: their weights zero, norms over the others only."""
    state = model.state_dict()
    for member in structure.members["hidden"]:
        ids = unit_ids(structure.layouts[member.parameter][member.dim], "hidden")
        state[member.parameter].index_fill_(member.dim, (ids >= width).nonzero().flatten(), 0.0)
    hidden = structure.axes["hidden"].num_units

    def norm(module, args, output):
        x, weight = args[0][..., :width], module.weight[:width]
        if isinstance(module, torch.nn.LayerNorm):
            found = torch.nn.functional.layer_norm(x, (width,), weight, module.bias[:width], module.eps)
        else:  # gemma scales by 1 + weight
            found = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.eps) * (1 + weight)
        return torch.nn.functional.pad(found, (0, hidden - width))

    for module in model.modules():
        if "Norm" in type(module).__name__ and module.weight.shape == (hidden,):
            module.register_forward_hook(norm)


def test_surgery_says_what_no_attribute_can(tmp_path):
    structure = shared_structure("gpt2")
    plan = make_plan(structure, {"layers.1.attention": (0, 3), "layers.2.mlp": (5, 6, 7)})
    config = apply_plan(shared_model("gpt2"), structure, plan).config
    modules = config.pruning_config["surgery"]["modules"]
    assert modules["transformer.h.1.attn.c_attn"]["shapes"] == {"weight": [40, 48], "bias": [48]}
    assert modules["transformer.h.1.attn.c_proj"]["shapes"] == {"weight": [16, 40]}
    assert modules["transformer.h.1.attn"]["attributes"]["num_heads"] == 2
    assert modules["transformer.h.1.attn"]["attributes"]["split_size"] == 16
    assert not any(path.startswith(("transformer.h.0", "transformer.h.2")) for path in modules)
    assert {int(layer): own for layer, own in config.to_dict()["per_layer_config"].items()} == {2: {"n_inner": 3}}


def test_alibi_slopes_are_those_of_the_heads_that_stay():
    structure = shared_structure("bloom")
    once = apply_plan(shared_model("bloom"), structure, make_plan(structure, {"layers.0.attention": (1, 2, 3, 4)}))
    selected = once.config.pruning_config["surgery"]["modules"]["transformer.h.0.self_attention"]["select_inputs"]
    assert selected["alibi"]["kept"] == [1, 2, 3, 4]
    again = infer_structure(once)
    if again.axes["layers.0.attention"].prunable:
        twice = apply_plan(once, again, make_plan(again, {"layers.0.attention": (0, 3)}))
        selected = twice.config.pruning_config["surgery"]["modules"]["transformer.h.0.self_attention"]["select_inputs"]
        assert selected["alibi"]["kept"] == [1, 4]
        with masked(once, again, make_plan(again, {"layers.0.attention": (0, 3)})):
            assert torch.allclose(logits(twice), logits(once), rtol=1e-9)


def test_training_goes_through_the_pruned_layers():
    pruned = apply_plan(tiny_model("gpt2", dtype=torch.float32), shared_structure("gpt2"), gpt2_plan()).train()
    ids = token_ids()
    pruned(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in pruned.parameters())


def gpt2_plan():
    return make_plan(shared_structure("gpt2"), {"layers.1.attention": (0, 3), "layers.0.mlp": tuple(range(9))})


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_models_built_do_not_grow_with_layers(model_type, monkeypatch):
    """Probing builds a model per kind of axis and candidate, and runs one where sizes are no attribute of the config.

    Every layer of these plans has widths of its own.
    """
    counts = []
    for num_layers in (3, 6):
        built, ran = [], []
        post_init, run = PreTrainedModel.post_init, Forward.run
        with monkeypatch.context() as patch:
            patch.setattr(PreTrainedModel, "post_init", lambda model, f=post_init, n=built: (n.append(model), f(model)))
            patch.setattr(Forward, "run", lambda mode, model, f=run, n=ran: (n.append(model), f(mode, model)))
            config = CONFIG_MAPPING[model_type](**{**WIDE[model_type], "num_hidden_layers": num_layers})
            structure = infer_structure(config)
            axes = [a for a in structure.axes.values() if a.prunable and a.kind in ("attention", "mlp")]
            kept = {axis.name: tuple(range(axis.num_units - 1 - axis.layer % 6)) for axis in axes}
            pruned_config(config, structure, make_plan(structure, kept))
        counts.append((len(built), len(ran)))
    assert counts[0] == counts[1]


# --- sizes that coincide ----------------------------------------------------------------------------------------------

_MIXED = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
_MAMBA = {**_MIXED, "num_key_value_heads": 2, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_chunk_size": 8}
COINCIDING = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1], "mamba_d_state": 8},
    "nemotron_h": {
        **_MIXED,
        "num_key_value_heads": 2,
        "layers_block_type": ["mamba", "attention", "mamba"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "head_dim": 16,
    },
    "mamba2": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "gptj": {"n_embd": 96, "n_layer": 2, "n_head": 8, "n_positions": 64, "rotary_dim": 8},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64, "multi_query": True},
}
"""Heads as many as the entries of a state, of the rotary part, or of one head."""


@pytest.mark.parametrize(
    ("model_type", "layers_go"), [*((name, False) for name in COINCIDING), ("gptj", True), ("gpt_bigcode", True)]
)
def test_a_size_that_coincides_with_the_heads_stays(model_type, layers_go):
    config = CONFIG_MAPPING[model_type](vocab_size=96, **COINCIDING[model_type])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double().eval()
    structure = infer_structure(model)
    last = len(structure.layer_paths) - 1
    kept = {"layers": tuple(range(1, last + 1))} if layers_go else {}
    for axis in structure.axes.values():
        if axis.prunable and axis.kind in ("attention", "mlp") and axis.layer == last:
            kept[axis.name] = tuple(range(1, axis.num_units))
    assert any(structure.axes[name].kind != "layer" for name in kept)
    plan = make_plan(structure, kept)
    found = logits(apply_plan(model, structure, plan))
    if all(structure.axes[name].exact for name in kept):
        with masked(model, structure, plan):
            assert torch.allclose(found, logits(model), atol=1e-9)
    else:  # a norm mixes the units
        assert found.isfinite().all()


def test_a_model_that_the_auto_class_does_not_choose_for_its_config():
    """Text decoders of multimodal families: the class counts, the auto classes know only the family's whole config."""
    from transformers import MllamaForCausalLM, MllamaTextConfig

    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3}
    config = MllamaTextConfig(vocab_size=96, num_hidden_layers=2, cross_attention_layers=[], pad_token_id=2, **sizes)
    model = MllamaForCausalLM(config).double().eval()
    structure = infer_structure(model)
    plan = make_plan(structure, {"layers.0.mlp": tuple(range(1, 30)), "layers.1.attention": (0, 2)})
    with masked(model, structure, plan):
        expected = logits(model)
    torch.testing.assert_close(logits(apply_plan(model, structure, plan)), expected, atol=1e-12, rtol=0)


def test_a_removed_branch_returns_what_its_module_returned():
    structure = shared_structure("llama")
    stay = tuple(range(1, len(structure.layer_paths)))
    config = pruned_config(shared_model("llama").config, structure, make_plan(structure, {"layers.attention": stay}))
    assert config.per_layer_config[0].skip == ["attention"]
    assert config.pruning_config["surgery"]["branches"]["attention"] == {
        "module": structure.branch_modules["layers.0.attention"].path,
        "outputs": ["zeros", None],
    }


@pytest.mark.parametrize(("values", "taken"), [([2.0] * 4, [2.0] * 3), ([0.0, 1.0, 2.0, 3.0], None), ([], None)])
def test_a_buffer_of_another_shape_is_taken_only_where_it_is_uniform(values, taken):
    structure, model = shared_structure("llama"), tiny_model("llama")
    pruned = tiny_model("llama").to("meta")
    model.model.register_buffer("table", torch.tensor(values), persistent=False)
    pruned.model.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    if taken is None:
        with pytest.raises(PlanError, match=r"buffer 'model\.table' depends on what is pruned"):
            _copy_buffers(model, pruned, structure, make_plan(structure, {}))
    else:
        _copy_buffers(model, pruned, structure, make_plan(structure, {}))
        assert pruned.model.table.tolist() == taken
