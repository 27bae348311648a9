import logging
import types

import pytest
import torch
import torch.nn.functional as F
from structures import llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_prune.config import CONFIGS, MagnitudeConfig, PruningConfig, RandomConfig, WandaConfig, selected_axes
from hf_prune.errors import CalibrationError, ConfigError, ScoreError
from hf_prune.scores import METHODS, Method, score
from hf_prune.structure.axes import Axis, Member, Structure
from hf_prune.structure.layouts import Fixed, Units

SHAPE = {"num_layers": 2, "hidden": 32, "mlp": 24, "kv": 2, "group": 2, "head_dim": 8, "vocab": 64}
EXPERTS = 3
EVERY_KIND = ("mlp", "attention", "hidden", "layer", "layer_attention", "layer_mlp")


def make_model(family="llama", seed=0):
    torch.manual_seed(seed)
    common = {
        "vocab_size": SHAPE["vocab"],
        "hidden_size": SHAPE["hidden"],
        "intermediate_size": SHAPE["mlp"],
        "num_hidden_layers": SHAPE["num_layers"],
        "num_attention_heads": SHAPE["kv"] * SHAPE["group"],
        "num_key_value_heads": SHAPE["kv"],
        "tie_word_embeddings": True,
        "pad_token_id": None,
    }
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, head_dim=8)), llama(**SHAPE)
    if family == "phi3":
        return Phi3ForCausalLM(Phi3Config(**common)), llama(**SHAPE, fused=True)
    config = MixtralConfig(**common, num_local_experts=EXPERTS, num_experts_per_tok=2)
    return MixtralForCausalLM(config), llama(**SHAPE, experts=EXPERTS)


def make_batches(num=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, SHAPE["vocab"], (2, 16), generator=generator)} for _ in range(num)]


def layer(i):
    return f"model.layers.{i}."


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_hand_made_structures_have_the_shapes_of_the_models(family):
    model, structure = make_model(family)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert shapes == {name: structure.shape(name) for name in structure.layouts}
    assert structure.num_parameters() == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "reap"])
class TestContract:
    """Every method passes this, with the kinds of axes that it scores (`reap`, of experts: test_experts.py)."""

    KINDS = {
        "policy_gradient": ("mlp", "attention", "layer_mlp"),
        "prunenet": ("mlp", "attention"),
        "obs": ("mlp", "attention"),
    }
    SHORT = {"policy_gradient": {"policy_steps": 2}, "prunenet": {"num_episodes": 2}}

    def config(self, method, **changes):
        axes = self.KINDS.get(method, EVERY_KIND)
        return CONFIGS[method](0.3, axes=axes, **self.SHORT.get(method, {}), **changes)

    @pytest.fixture(autouse=True)
    def _masks_reach_every_consumer(self, family, method):
        if (family, method) == ("mixtral", "policy_gradient"):
            pytest.skip("refuses experts, whose tokens are not rows of a batch: see test_policy_gradient_masks.py")

    def run(self, family, method, **changes):
        model, structure = make_model(family)
        config = self.config(method, **changes)
        return score(model, structure, config, make_batches()), structure, config

    def test_finite_float32_per_selected_axis(self, family, method):
        scores, structure, config = self.run(family, method)
        assert list(scores) == [axis.name for axis in selected_axes(structure, config)]
        for name, values in scores.items():
            assert values.dtype == torch.float32
            assert values.shape == (structure.axes[name].num_units,)
            assert values.isfinite().all()
            assert len(set(values.tolist())) > 1

    def test_same_seed_same_scores(self, family, method):
        first, second = self.run(family, method)[0], self.run(family, method)[0]
        assert all(torch.equal(first[name], second[name]) for name in first)
        only = self.run(family, method, protect=("layers.0.*",))[0]
        assert "layers.0.mlp" not in only
        assert "layers.1.mlp" in only

    def test_the_model_and_the_global_generator_are_left_as_they_were(self, family, method):
        model, structure = make_model(family)
        model.train()
        model.model.layers[1].eval()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        flags = [module.training for module in model.modules()]
        experts = model.config._experts_implementation
        state = torch.get_rng_state()
        score(model, structure, self.config(method), make_batches())
        assert torch.equal(torch.get_rng_state(), state)
        assert flags == [module.training for module in model.modules()]
        assert model.config._experts_implementation == experts
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("config", [MagnitudeConfig(0.3, norm="l1"), MagnitudeConfig(0.3), WandaConfig(0.3)])
@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_law_6_permuting_units_permutes_scores(config, family):
    model, structure = make_model(family)
    before = score(model, structure, config, make_batches())
    generator = torch.Generator().manual_seed(3)
    for axis, num_units in (("layers.0.mlp", SHAPE["mlp"]), ("layers.1.attention", SHAPE["kv"])):
        permutation = torch.randperm(num_units, generator=generator) if num_units > 2 else torch.tensor([1, 0])
        permute_units_(model, structure, axis, permutation)
        after = score(model, structure, config, make_batches())
        assert torch.allclose(after[axis], before[axis][permutation], rtol=1e-4)
        assert not torch.allclose(after[axis], before[axis], rtol=5e-4)


def permute_units_(model, structure, axis, permutation):
    """Put unit `permutation[i]` at place `i`; the model computes the same function."""
    state = model.state_dict()
    for member in structure.members[axis]:
        layout = structure.layouts[member.parameter][member.dim]
        value = state[member.parameter]
        value.copy_(value.index_select(member.dim, positions(layout, axis, permutation)))


def positions(layout, axis, permutation):
    if isinstance(layout, Units):
        return permutation if layout.axis == axis else torch.arange(layout.num_units)
    if isinstance(layout, Fixed):
        return torch.arange(layout.length)
    if hasattr(layout, "factors"):
        result = torch.zeros(1, dtype=torch.int64)
        for factor in layout.factors:
            inner = positions(factor, axis, permutation)
            result = (result[:, None] * len(inner) + inner[None, :]).reshape(-1)
        return result
    parts, offset = [], 0
    for part in layout.parts:
        inner = positions(part, axis, permutation)
        parts.append(inner + offset)
        offset += len(inner)
    return torch.cat(parts)


def test_random_draws_from_its_generator_only():
    model, structure = make_model()
    config = RandomConfig(0.3, seed=5)
    drawn = score(model, structure, config, generator=torch.Generator().manual_seed(5))
    assert all(torch.equal(drawn[name], values) for name, values in score(model, structure, config).items())
    other = score(model, structure, RandomConfig(0.3, seed=6))
    assert not torch.equal(other["layers.0.mlp"], drawn["layers.0.mlp"])


def test_magnitude_by_hand():
    model, structure = make_model()
    state = model.state_dict()
    l2 = score(model, structure, MagnitudeConfig(0.3, axes=EVERY_KIND))
    l1 = score(model, structure, MagnitudeConfig(0.3, axes=EVERY_KIND, norm="l1"))
    mlp = {name: state[f"{layer(1)}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")}
    channel = torch.cat([mlp["gate"][5], mlp["up"][5], mlp["down"][:, 5]])
    assert l2["layers.1.mlp"][5] == pytest.approx(channel.norm().item(), rel=1e-5)
    assert l1["layers.1.mlp"][5] == pytest.approx(channel.abs().sum().item(), rel=1e-5)
    q, k, v, o = (state[f"{layer(0)}self_attn.{name}_proj.weight"] for name in "qkvo")
    group = torch.cat([part.flatten() for part in (q[16:], k[8:], v[8:], o[:, 16:])])
    assert l2["layers.0.attention"][1] == pytest.approx(group.norm().item(), rel=1e-5)
    column = []
    for name in structure.layouts:
        if name in structure.aliases:  # tied: counts once
            continue
        dim = next(member.dim for member in structure.members["hidden"] if member.parameter == name)
        column.append(state[name].select(dim, 7).flatten())
    assert l2["hidden"][7] == pytest.approx(torch.cat(column).norm().item(), rel=1e-5)
    everything = torch.cat([value.flatten() for name, value in state.items() if name.startswith(layer(1))])
    assert l2["layers"][1] == pytest.approx(everything.norm().item(), rel=1e-5)
    assert l1["layers.mlp"][1] == pytest.approx(sum(part.abs().sum().item() for part in mlp.values()), rel=1e-5)


def test_magnitude_sums_low_precision_weights_in_float32():
    model, structure = make_model()
    model.to(torch.bfloat16)
    scores = score(model, structure, MagnitudeConfig(0.3, norm="l1"))
    expected = score(model.float(), structure, MagnitudeConfig(0.3, norm="l1"))
    assert all(torch.equal(scores[name], expected[name]) for name in scores)


@torch.no_grad()
def test_wanda_by_hand():
    model, structure = make_model()
    batches = make_batches()
    scores = score(model, structure, WandaConfig(0.3, axes=EVERY_KIND), batches)
    mlp, seen = model.model.layers[1].mlp, []
    handle = mlp.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    for batch in batches:
        model(**batch)
    handle.remove()
    x = torch.cat(seen).reshape(-1, 32)
    down_input = F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
    down = mlp.down_proj.weight.abs() * down_input.norm(dim=0)
    assert torch.allclose(scores["layers.1.mlp"], down.sum(0), rtol=1e-4)
    rest = sum((linear.weight.abs() * x.norm(dim=0)).sum() for linear in (mlp.gate_proj, mlp.up_proj))
    assert scores["layers.mlp"][1] == pytest.approx((down.sum() + rest).item(), rel=1e-4)
    assert torch.allclose(scores["layers"], scores["layers.mlp"] + scores["layers.attention"], rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_wanda_gives_each_expert_the_tokens_routed_to_it(implementation):
    model, structure = make_model("mixtral")
    model.set_experts_implementation(implementation)
    batches = make_batches()
    scores = score(model, structure, WandaConfig(0.3, axes=("mlp",)), batches)
    assert model.config._experts_implementation == implementation
    experts, seen = model.model.layers[1].mlp.experts, []
    handle = experts.register_forward_hook(lambda _, args, __: seen.append(args))
    for batch in batches:
        model(**batch)
    handle.remove()
    x, chosen = torch.cat([args[0] for args in seen]), torch.cat([args[1] for args in seen])
    expected = torch.zeros(SHAPE["mlp"])
    for expert in range(EXPERTS):
        gate, up = (x[(chosen == expert).any(1)] @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        expected += (experts.down_proj[expert].abs() * (F.silu(gate) * up).norm(dim=0)).sum(0)
    assert torch.allclose(scores["layers.1.mlp"], expected, rtol=1e-4)


class Toy(nn.Module):
    """Two products over one axis `layers.0.mlp`: a Conv1D, and a stack of weights in the given way."""

    def __init__(self, product):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = Conv1D(4, 6)  # weight [in, out]
        self.stack = nn.Parameter(torch.randn(2, 6, 4))
        self.product = product

    def forward(self, input_ids, use_cache):
        x = self.embed(input_ids).reshape(-1, 6)
        self.product(x, self.stack)
        return types.SimpleNamespace(logits=self.conv(x))


def toy_structure(*members):
    axis = Axis("layers.0.mlp", "mlp", 0, 6)
    units = Units("layers.0.mlp", 6)
    layouts = {"conv.weight": (units, Fixed(4)), "stack": (Fixed(2), units, Fixed(4))}
    return Structure("toy", {axis.name: axis}, layouts, {axis.name: members}, ("conv",), {})


PRODUCTS = {
    "bmm": lambda x, stack: torch.bmm(x.expand(2, *x.shape), stack),
    "matmul": lambda x, stack: [x @ stack[expert] for expert in (0, 1)],
    "linear": lambda x, stack: [F.linear(x, stack[expert].T) for expert in (0, 1)],
}


@pytest.mark.parametrize("way", list(PRODUCTS))
def test_wanda_reads_conv1d_and_stacked_weights(way):
    torch.manual_seed(0)
    model, batches = Toy(PRODUCTS[way]), [{"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}]
    norms = model.embed.weight[1:7].norm(dim=0)
    config = WandaConfig(0.3, axes=("mlp",))
    conv, stack = Member("conv.weight", 0, "consumer"), Member("stack", 1, "consumer")
    only_conv = score(model, toy_structure(conv), config, batches)["layers.0.mlp"]
    assert torch.allclose(only_conv, model.conv.weight.abs().sum(1) * norms)
    both = score(model, toy_structure(conv, stack), config, batches)["layers.0.mlp"]
    assert torch.allclose(both, only_conv + model.stack.abs().sum((0, 2)) * norms)


def test_wanda_falls_back_to_weights_with_a_warning(caplog):
    torch.manual_seed(0)
    model = Toy(lambda x, stack: torch.einsum("ti,eio->teo", x, stack))
    config = WandaConfig(0.3, axes=("mlp",))
    batches = [{"input_ids": torch.tensor([[1, 2, 3]])}]
    with caplog.at_level(logging.WARNING):
        scores = score(model, toy_structure(Member("stack", 1, "consumer")), config, batches)
    assert "layers.0.mlp: no input of its consumers could be observed" in caplog.text
    assert torch.allclose(scores["layers.0.mlp"], model.stack.abs().sum((0, 2)))


def test_wanda_restores_the_model_after_an_error():
    model, structure = make_model("mixtral")
    model.train()
    implementation = model.config._experts_implementation
    bad = [*make_batches(1), {"input_ids": torch.full((1, 4), 10**6)}]
    with pytest.raises(IndexError):
        score(model, structure, WandaConfig(0.3), bad)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.config._experts_implementation == implementation


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, "needs calibration batches"),
        ([], "found none"),
        ([{"input_ids": torch.zeros(2, 0, dtype=torch.int64)}], "found \\(2, 0\\)"),
        ([{"ids": torch.zeros(2, 2)}], "found dict"),
        ([torch.zeros(2, 2)], "found Tensor"),
        ([{"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.tensor([[1, 0]])}], "padding"),
    ],
)
def test_unusable_calibration_is_refused(batches, message):
    model, structure = make_model()
    with pytest.raises(CalibrationError, match=message):
        score(model, structure, WandaConfig(0.3), batches)


def test_score_refuses_an_unknown_method_and_bad_scores(monkeypatch):
    model, structure = make_model()
    with pytest.raises(ConfigError, match="method: found 'custom'"):
        score(model, structure, PruningConfig(0.3))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = float("nan")
    with pytest.raises(ScoreError, match=r"layers.1.mlp: 1 of 24 scores are NaN"):
        score(model, structure, MagnitudeConfig(0.3))
    monkeypatch.setitem(METHODS, "random", Method(lambda *_, **__: {}, needs_calibration=False))
    with pytest.raises(ScoreError, match=r"layers.0.mlp: no scores"):
        score(model, structure, RandomConfig(0.3))
