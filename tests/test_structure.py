"""What inference finds: the axes, layouts, owners and config attributes of each family, at tiny and at full size."""

from __future__ import annotations

import resource

import pytest
import torch
from models import FAMILIES, logits, make_plan, shared_model, shared_structure, tiny_config
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, CpmAntConfig, LlamaConfig, PreTrainedConfig, PreTrainedModel

from hf_prune.config import MagnitudeConfig, selected_axes
from hf_prune.errors import StructureError
from hf_prune.layers.masking import masked
from hf_prune.structure.axes import Owner, SlicedArgument
from hf_prune.structure.consumers import consumers_of
from hf_prune.structure.inference import _use, infer_structure
from hf_prune.structure.tracing import ConstantInput
from hf_prune.structure.unify import Atom, Prod
from hf_prune.surgery.pruning import apply_plan
from hf_prune.surgery.width_attributes import find_width_attributes

# Layer 1 of each family, written by hand. A = layers.1.attention, Q = layers.1.attention.queries, M = layers.1.mlp,
# D = hidden.
_DENSE = {"gate_proj": ("M", "D"), "up_proj": ("M", "D"), "down_proj": ("D", "M")}


def _grouped(head_dim):
    wide, narrow = f"(A × Q × {head_dim})", f"(A × {head_dim})"
    return {"q_proj": (wide, "D"), "k_proj": (narrow, "D"), "v_proj": (narrow, "D"), "o_proj": ("D", wide)}


GOLDEN: dict[str, tuple[int, int, int, dict[str, tuple[str, ...]]]] = {
    # attention units, mlp units, hidden units, layouts of the weights
    "llama": (3, 40, 48, {**_grouped(10), **_DENSE}),
    "llama_tied": (2, 40, 48, {**_grouped(10), **_DENSE}),
    "mistral": (3, 40, 48, {**_grouped(10), **_DENSE}),
    "qwen2": (3, 40, 36, {**_grouped(10), **_DENSE}),
    "qwen3": (4, 40, 48, {**_grouped(10), **_DENSE, "q_norm": ("10",), "k_norm": ("10",)}),
    "gemma3_text": (3, 40, 48, {**_grouped(10), **_DENSE, "post_feedforward_layernorm": ("D",)}),
    "phi3": (
        3,
        40,
        48,
        {
            "qkv_proj": ("[(A × Q × 8) + (A × 8) + (A × 8)]", "D"),
            "o_proj": ("D", "(A × Q × 8)"),
            "gate_up_proj": ("[M + M]", "D"),
            "down_proj": ("D", "M"),
        },
    ),
    "gpt2": (
        5,
        56,
        40,
        {
            "c_attn": ("D", "[(A × 8) + (A × 8) + (A × 8)]"),
            "attn.c_proj": ("(A × 8)", "D"),
            "c_fc": ("D", "M"),
            "mlp.c_proj": ("M", "D"),
        },
    ),
    "opt": (
        5,
        56,
        40,
        {
            "q_proj": ("(A × 8)", "D"),
            "k_proj": ("(A × 8)", "D"),
            "v_proj": ("(A × 8)", "D"),
            "out_proj": ("D", "(A × 8)"),
            "fc1": ("M", "D"),
            "fc2": ("D", "M"),
        },
    ),
    "gpt_neox": (
        5,
        56,
        40,
        {
            "query_key_value": ("(A × 24)", "D"),
            "attention.dense": ("D", "(A × 8)"),
            "dense_h_to_4h": ("M", "D"),
            "dense_4h_to_h": ("D", "M"),
        },
    ),
    "bloom": (
        5,
        160,
        40,
        {
            "query_key_value": ("(A × 3 × 8)", "D"),
            "self_attention.dense": ("D", "(A × 8)"),
            "dense_h_to_4h": ("M", "D"),
            "dense_4h_to_h": ("D", "M"),
        },
    ),
    "falcon": (
        3,
        56,
        48,
        {
            "query_key_value": ("(A × [Q + 2] × 8)", "D"),
            "self_attention.dense": ("D", "(A × Q × 8)"),
            "dense_h_to_4h": ("M", "D"),
            "dense_4h_to_h": ("D", "M"),
        },
    ),
    "falcon_mqa": (
        6,
        56,
        48,
        {
            "query_key_value": ("([A + 2] × 8)", "D"),
            "self_attention.dense": ("D", "(A × 8)"),
            "dense_h_to_4h": ("M", "D"),
            "dense_4h_to_h": ("D", "M"),
        },
    ),
    "glm4": (3, 40, 48, {**_grouped(10), "gate_up_proj": ("[M + M]", "D"), "down_proj": ("D", "M")}),
    "mixtral": (
        3,
        40,
        48,
        {
            **_grouped(10),
            "mlp.gate": ("E", "D"),
            "experts.gate_up_proj": ("E", "[M + M]", "D"),
            "experts.down_proj": ("E", "D", "M"),
        },
    ),
}
CONSUMERS = ("o_proj", "out_proj", "down_proj", "c_proj", "fc2", "dense_4h_to_h", ".dense.")


def test_every_family_has_a_golden_row():
    assert set(GOLDEN) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_axes_and_layouts(family):
    attention, mlp, hidden, weights = GOLDEN[family]
    structure = shared_structure(family)
    num_layers = len(structure.layer_paths)
    units = {"hidden": hidden, "vocab": 96, "layers": num_layers}
    units |= {"layers.attention": num_layers, "layers.mlp": num_layers}
    for layer in range(num_layers):
        units |= {f"layers.{layer}.attention": attention, f"layers.{layer}.mlp": mlp}
        if family == "mixtral":
            units |= {f"layers.{layer}.experts": 4, f"layers.{layer}.mlp.channels": 4 * 40}
        if (heads := tiny_config(family).num_attention_heads) > attention:
            units[f"layers.{layer}.attention.queries"] = heads
    assert structure.widths == units
    assert {name: axis.blocker for name, axis in structure.axes.items() if axis.blocker} == (
        {"layers.mlp": "mlp of layer 0 is not one module with a tensor result"} if family == "opt" else {}
    )
    assert [name for name, axis in structure.axes.items() if not axis.exact] == ["hidden"]
    assert not structure.unsupported_ops
    prefix = structure.layer_paths[1] + "."
    here = {name.removeprefix(prefix): found for name, found in structure.layouts.items() if name.startswith(prefix)}
    for part, expected in weights.items():
        (name,) = [name for name in here if f".{part}." in f".{name}." and not name.endswith("bias")]
        texts = " | ".join(map(str, here[name]))
        names = {"attention.queries": "Q", "attention": "A", "mlp": "M", "experts": "E"}
        for name, letter in names.items():
            texts = texts.replace(f"layers.1.{name}", letter)
        short = texts.replace("hidden", "D")
        assert tuple(short.split(" | ")) == expected, name


@pytest.mark.parametrize("family", FAMILIES)
def test_members_and_roles(family):
    structure = shared_structure(family)
    for axis in ("layers.1.attention", "layers.1.mlp"):
        roles: dict[str, set[str]] = {}
        for member in structure.members[axis]:
            assert axis in str(structure.layouts[member.parameter][member.dim])
            roles.setdefault(member.role, set()).add(member.parameter)
        assert len(roles["consumer"]) == 1
        (consumer,) = roles["consumer"]
        assert any(part in f"{consumer}." for part in CONSUMERS)
        assert roles["producer"]
        assert consumer not in roles["producer"]
        assert all(name.endswith(("bias", "norm.weight")) for name in roles.get("other", ()))
    carriers = {member.parameter for member in structure.members["hidden"]}
    assert {structure.aliases.get(name, name) for name in ("lm_head.weight",)} & carriers


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_counts_and_owners_are_those_of_the_model(family):
    model, structure = shared_model(family), shared_structure(family)
    state = model.state_dict()
    assert {name: structure.shape(name) for name in structure.layouts} == {n: tuple(t.shape) for n, t in state.items()}
    assert structure.num_parameters() == sum(parameter.numel() for parameter in model.parameters())
    norms_and_rest = 0
    for name in structure.counted("model"):
        owner = structure.owners.get(name)
        path = next((path for path in structure.layer_paths if name.startswith(path + ".")), None)
        assert (owner is None) == (path is None)
        if owner is None or "norm" in name.removeprefix(path).split(".")[-2] or ".ln_" in name:
            if owner is None or owner.branch is None:
                norms_and_rest += structure.numel(name)
            continue
        assert path == structure.layer_paths[owner.layer]
        inside = name.removeprefix(path)
        assert owner.branch == ("attention" if "att" in inside else "mlp"), name
    assert structure.num_parameters(budget="decoder") == structure.num_parameters() - norms_and_rest


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_says_as_much_as_a_model(family):
    assert infer_structure(tiny_config(family)) == shared_structure(family)


def test_tied_embeddings_count_once():
    tied = shared_structure("llama_tied")
    assert tied.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in tied.counted("model")
    assert not shared_structure("llama").aliases


def test_alibi_slopes_are_selected_on_entry():
    (use,) = shared_structure("bloom").selected_inputs["layers.1.attention"]
    assert (use.module_path, use.name) == ("transformer.h.1.self_attention", "alibi")
    assert (use.sizes, use.factor) == ((-1, 5), 1)
    assert not shared_structure("llama").selected_inputs


# --- config attributes ------------------------------------------------------------------------------------------------

_HEADS = "num_key_value_heads, num_attention_heads / 2"
KNOBS = {
    "llama": {"attention": _HEADS, "mlp": "intermediate_size"},
    "llama_tied": {"attention": "num_key_value_heads, num_attention_heads / 3", "mlp": "intermediate_size"},
    "mistral": {"attention": _HEADS, "mlp": "intermediate_size"},
    "qwen2": {"attention": _HEADS, "mlp": "intermediate_size"},
    "qwen3": {"attention": _HEADS, "mlp": "intermediate_size"},
    "gemma3_text": {"attention": _HEADS, "mlp": "intermediate_size"},
    "phi3": {"attention": _HEADS, "mlp": "intermediate_size"},
    "gpt2": {"mlp": "n_inner"},  # head_dim is hidden_size // n_head: no attribute says how many heads stay
    "opt": {"mlp": "ffn_dim"},
    "gpt_neox": {"mlp": "intermediate_size"},
    "bloom": {},  # the MLP is 4 * hidden_size
    "falcon": {"mlp": "ffn_hidden_size"},
    "falcon_mqa": {"mlp": "ffn_hidden_size"},
    "glm4": {"attention": _HEADS, "mlp": "intermediate_size"},
    "mixtral": {"attention": _HEADS, "mlp": "intermediate_size", "experts": "num_local_experts"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_config_attributes_found_by_probing(family):
    model, structure = shared_model(family), shared_structure(family)
    knobs = find_width_attributes(model.config, structure, type(model))
    assert {name: str(knob) for name, knob in knobs.items()} == KNOBS[family]
    if "attention" in knobs:
        heads = dict(knobs["attention"].values(1))
        assert heads["num_attention_heads"] * structure.axes["layers.0.attention"].num_units == (
            model.config.num_attention_heads
        )


def test_probing_is_silent(caplog, capfd):
    """transformers logs an error for every attribute that a config class refuses."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        find_width_attributes(shared_model("falcon").config, shared_structure("falcon"), type(shared_model("falcon")))
    finally:
        logging.set_verbosity(level)
    assert "Can't set" not in capfd.readouterr().err


# --- full size --------------------------------------------------------------------------------------------------------


def _llama_7b() -> LlamaConfig:
    return LlamaConfig()  # the defaults are those of Llama 7B


def test_7b_llama_from_its_config_alone():
    infer_structure(LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    structure = infer_structure(_llama_7b())
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # kilobytes on Linux
    assert grown < 500_000, "one layer of weights alone is 800 MB"
    assert structure.num_parameters() == 6_738_415_616
    assert structure.num_parameters(budget="decoder") == 6_476_005_376
    assert len(structure.layer_paths) == 32
    assert structure.axes["layers.31.attention"].num_units == 32
    assert structure.axes["layers.31.mlp"].num_units == 11_008
    assert structure.axes["hidden"].num_units == 4_096
    assert str(structure.layouts["model.layers.31.self_attn.q_proj.weight"][0]) == "(layers.31.attention × 128)"
    assert structure.owners["model.layers.31.mlp.up_proj.weight"] == Owner(31, "mlp")
    assert structure.num_parameters({"layers.0.mlp": 11_007}) == 6_738_415_616 - 3 * 4_096


# --- what cannot be inferred ------------------------------------------------------------------------------------------


class CustomConfig(PreTrainedConfig):
    model_type = "custom_for_tests"

    def __init__(self, hidden_size=16, num_hidden_layers=2, vocab_size=32, what="", **kwargs):
        self.hidden_size, self.num_hidden_layers, self.vocab_size, self.what = (
            hidden_size,
            num_hidden_layers,
            vocab_size,
            what,
        )
        super().__init__(**kwargs)


class CustomLayer(nn.Module):
    def __init__(self, config, shared):
        super().__init__()
        self.what = config.what
        self.up = nn.Linear(config.hidden_size, 24)
        self.down = shared if config.what == "shared" else nn.Linear(24, config.hidden_size)

    def forward(self, hidden_states):
        inner = self.up(hidden_states)
        if self.what == "op without a rule":
            inner = torch.fft.fft(inner).real
        elif self.what == "data-dependent":
            inner = inner * inner.sum().item()
        elif self.what == "masked rows":
            inner[inner.sum(-1) > 0] = inner[inner.sum(-1) > 0] + 1
        return hidden_states + self.down(torch.relu(inner))


class CustomModel(PreTrainedModel):
    config_class = CustomConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        shared = nn.Linear(24, config.hidden_size)
        layers = [CustomLayer(config, shared) for _ in range(config.num_hidden_layers)]
        self.layers = nn.Sequential(*layers) if config.what == "no layers" else nn.ModuleList(layers)
        self.head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=False):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return self.head(hidden_states)


def test_a_custom_architecture_is_inferred():
    structure = infer_structure(CustomModel(CustomConfig()))
    assert structure.widths["layers.1.mlp"] == 24
    assert structure.axes["layers.1.mlp"].prunable
    assert structure.axes["hidden"].num_units == 16


def test_entries_that_a_mask_takes_keep_their_other_dimensions():
    assert infer_structure(CustomModel(CustomConfig(what="masked rows"))).axes["layers.1.mlp"].prunable


def test_heads_with_modules_of_their_own_are_named_and_not_pruned():
    from transformers import StableLmConfig

    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "qk_layernorm": True}
    structure = infer_structure(StableLmConfig(**sizes, **heads))
    axis = structure.axes["layers.1.attention"]
    assert (axis.num_units, axis.blocker) == (6, "each of its heads has modules of its own")
    assert [axis.name for axis in structure.axes_of("mlp")] == ["layers.0.mlp", "layers.1.mlp"]


def test_an_op_without_a_rule_blocks_what_it_touches_and_is_named():
    structure = infer_structure(CustomModel(CustomConfig(what="op without a rule")))
    assert any("fft" in name for name in structure.unsupported_ops)
    assert structure.unsupported_ops[next(iter(structure.unsupported_ops))] == "layers.0"
    axis = structure.axes.get("layers.0.mlp")
    assert axis is None or ("fft" in axis.blocker and not axis.prunable)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom"])
def test_a_single_head_is_attention(family):
    """It has no axis of its own; its values are no channels of an MLP, and the branch can go as a whole."""
    config = tiny_config(family)
    for name in ("num_attention_heads", "num_key_value_heads"):
        if hasattr(config, name):
            setattr(config, name, 1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    structure = infer_structure(model)
    several = infer_structure(tiny_config(family))
    for name in ("layers.0.attention", "layers.attention", "layers.0.mlp", "layers.mlp"):
        found, expected = structure.axes[name], several.axes[name]
        assert found.prunable == (expected.prunable and name != "layers.0.attention")
        assert name not in structure.branch_modules or structure.branch_modules[name] == several.branch_modules[name]
    assert structure.axes.keys() == {name for name, axis in several.axes.items() if not axis.block}
    assert structure.owners == several.owners
    assert structure.axes["layers.0.attention"].blocker == "it has one unit"
    plan = make_plan(structure, {"layers.attention": (0, 2), "layers.0.mlp": (0, 3, 5)})
    with masked(model, structure, plan):
        expected = logits(model)
    torch.testing.assert_close(logits(apply_plan(model, structure, plan)), expected, rtol=1e-9, atol=1e-9)


def test_heads_that_layers_share_are_not_a_single_head():
    """A table of position biases of all layers: CPM-Ant."""
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "dim_head": 8, "dim_ff": 40, "num_hidden_layers": 2}
    structure = infer_structure(CpmAntConfig(vocab_size=96, **sizes))
    for layer in range(2):
        axis = structure.axes[f"layers.{layer}.attention"]
        assert axis.num_units == 6
        assert axis.blocker.startswith("its heads are shared with ")


def test_an_axis_shared_by_layers_is_not_an_axis_of_one_layer():
    structure = infer_structure(CustomModel(CustomConfig(what="shared")))
    assert not structure.axes_of("mlp")
    with pytest.raises(StructureError, match="no axis of kind 'mlp'"):
        selected_axes(structure, MagnitudeConfig(0.3, axes=("mlp",)))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("data-dependent", r"cannot be traced without weights.*depends on values"),
        ("no layers", "no list of decoder layers"),
    ],
)
def test_models_that_cannot_be_traced_are_refused(what, message):
    with pytest.raises(StructureError, match=message):
        infer_structure(CustomModel(CustomConfig(what=what)))


def test_a_model_that_its_class_cannot_build_is_refused():
    config = LlamaConfig(hidden_size=30, num_attention_heads=5)
    config.num_attention_heads = 0
    with pytest.raises(StructureError, match="llama: its config class refuses this config"):
        infer_structure(config)


def test_a_constant_is_split_where_it_carries_the_axis():
    """Only a batch before the axis may be of any size."""
    heads, rest, batch = Atom(4), Atom(2), Atom(3)
    first = ConstantInput("attn", "alibi", (5, 8), (Atom(5), Prod((heads, rest))))
    second = ConstantInput("attn", "alibi", (24,), (Prod((batch, heads, rest)),))
    assert _use(first, heads, {id(heads)}) == SlicedArgument("attn", "alibi", 1, (4, 2), 0)
    assert _use(second, heads, {id(heads)}) == SlicedArgument("attn", "alibi", 0, (-1, 4, 2), 1)
    assert _use(second, Atom(4), {id(heads)}) is None


def test_the_group_of_an_axis_holds_each_of_its_parameters_once():
    structure = shared_structure("llama_tied")
    mlp = structure.group(structure.axes["layers.1.mlp"])
    assert sorted(mlp) == [f"model.layers.1.mlp.{name}_proj.weight" for name in ("down", "gate", "up")]
    hidden = structure.group(structure.axes["hidden"])
    assert "model.embed_tokens.weight" in hidden
    assert "lm_head.weight" not in hidden


@pytest.mark.parametrize(
    ("family", "kind", "dim", "output_dim"),
    [("llama", "linear", 1, 0), ("gpt2", "linear", 0, 1), ("mixtral", "experts", 2, 1)],
)
def test_what_sums_over_an_mlp_axis(family, kind, dim, output_dim):
    (found,) = consumers_of(shared_model(family), shared_structure(family), "layers.1.mlp")
    assert (found.kind, found.dim, found.output_dim) == (kind, dim, output_dim)


def test_several_axes_of_one_branch_are_named_by_their_modules():
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=64,
        hidden_size=32,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    names = [axis.name for axis in infer_structure(config).axes_of("mlp") if axis.layer == 1]
    assert names == ["layers.1.mlp.experts", "layers.1.mlp.shared_expert"]


def _config(kind, **values):
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, vocab_size=64, **values)


ROUTED = {
    "jetmoe": {  # splits tokens into parts as large as experts are asked for
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "kv_channels": 8,
        "intermediate_size": 24,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
    },
    "dbrx": {  # counts one class of experts more than there are
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2},
    },
}


@pytest.mark.parametrize("kind", ROUTED)
def test_numbers_of_tokens_that_weights_decide_are_no_obstacle(kind):
    structure = infer_structure(_config(kind, **ROUTED[kind]))
    found = {axis.kind: axis.num_units for axis in structure.axes.values() if axis.layer == 1 and axis.prunable}
    assert found["mlp"] == 24
    assert found["attention"] == 2
