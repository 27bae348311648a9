"""The vLLM plugin, against small fakes of what it touches; and against vLLM's own classes where its source is there."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace

import models
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_prune import vllm as plugin
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.errors import CheckpointError
from hf_prune.format import per_layer
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

HAS_VLLM = importlib.util.find_spec("vllm") is not None


class Registry:
    """As vLLM 0.33: its own class of an architecture unless the Transformers backend is asked for."""

    def inspect_model_cls(self, architectures, model_config):
        return ("info", "TransformersForCausalLM" if model_config.model_impl == "transformers" else architectures[0])

    def resolve_model_cls(self, architectures, model_config):
        return (object, "TransformersForCausalLM" if model_config.model_impl == "transformers" else architectures[0])


class Convertor:
    """As vLLM 0.33 reads transformers' heterogeneous configs."""

    def __init__(self, config):
        self.hf_text_config = config

    def get_per_layer_hf_configs(self):
        config = self.hf_text_config
        if not getattr(config, "is_heterogeneous", False):
            return None
        return [(config.per_layer_config[i], config.per_layer_config[i]) for i in range(len(config.per_layer_config))]


@pytest.fixture
def fakes(monkeypatch):
    registry, convertor = type("R", (Registry,), {}), type("C", (Convertor,), {})
    for name, found in {
        "vllm": {},
        "vllm.config": {},
        "vllm.model_executor": {},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.registry": {"_ModelRegistry": registry},
        "vllm.transformers_utils": {},
        "vllm.transformers_utils.model_arch_config_convertor": {"ModelArchConfigConvertorBase": convertor},
    }.items():
        module = ModuleType(name)
        vars(module).update(found)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(per_layer.STAND_INS, "vllm", plugin.idle_attention)
    plugin.register()
    plugin.register()  # vLLM may
    return SimpleNamespace(registry=registry(), convertor=convertor)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Layers of different widths, the last one without attention; the model and where it lies."""
    dense = models.tiny_model("llama", dtype=torch.float32)
    structure = infer_structure(dense)
    plan = models.make_plan(
        structure,
        {"layers.0.mlp": tuple(range(7)), "layers.1.attention": (0, 2), "layers.attention": (0, 1)},
    )
    folder = tmp_path_factory.mktemp("vllm") / "pruned"
    save_pruned(apply_plan(dense, structure, plan), folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval(), folder


def asked(config, model_impl="auto"):
    return SimpleNamespace(hf_config=config, model_impl=model_impl)


def test_the_entry_point_is_the_plugin():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nhf_prune = "hf_prune.vllm:register"\n' in project


def test_checkpoints_whose_layers_differ_go_to_the_transformers_backend(fakes, pruned):
    config, names = pruned[0].config, ["LlamaForCausalLM"]
    for method in ("inspect_model_cls", "resolve_model_cls"):
        assert getattr(fakes.registry, method)(names, asked(config))[1] == "TransformersForCausalLM"
        assert getattr(fakes.registry, method)(names, asked(models.tiny_config("llama")))[1] == "LlamaForCausalLM"
        with pytest.raises(CheckpointError, match=r"model_impl='vllm' builds equal ones: leave it at 'auto'"):
            getattr(fakes.registry, method)(names, asked(config, "vllm"))


def test_other_numbers_of_experts_in_each_layer_are_refused(fakes):
    dense, structure = models.shared_model("mixtral"), models.shared_structure("mixtral")
    for kept, expected in (((0, 1, 2), "TransformersForCausalLM"), ((0, 1), None)):
        plan = {"layers.0.experts": kept, "layers.1.experts": (0, 2, 3), "layers.0.mlp": tuple(range(8))}
        pruned = apply_plan(dense, structure, models.make_plan(structure, plan))
        if expected is None:
            with pytest.raises(CheckpointError, match=r"have \[2, 3\] experts"):
                fakes.registry.resolve_model_cls(["MixtralForCausalLM"], asked(pruned.config))
        else:
            assert fakes.registry.resolve_model_cls(["MixtralForCausalLM"], asked(pruned.config))[1] == expected


def test_removed_attention_has_the_smallest_cache(fakes, pruned):
    found = fakes.convertor(pruned[0].config).get_per_layer_hf_configs()
    assert [text.num_key_value_heads for _, text in found] == [3, 2, 1]
    assert fakes.convertor(models.tiny_config("llama")).get_per_layer_hf_configs() is None


def build_for_vllm(model):
    """As its Transformers backend builds: the base model of a config whose attention implementation is vLLM's."""
    config = AutoConfig.from_pretrained(model.config._name_or_path)
    config._attn_implementation = "vllm"
    return AutoModelForCausalLM.from_config(config)


def test_every_layer_passes_for_one_with_attention_and_computes_the_same(fakes, pruned, monkeypatch):
    exact = pruned[0]
    seen = []

    def attention(module, query, key, value, mask, **settings):
        seen.append((module.layer_idx, query.shape[1], key.shape[1]))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **settings)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", attention)
    model = build_for_vllm(exact)
    model.load_state_dict(exact.state_dict())
    ids = models.token_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, exact(ids).logits, rtol=1e-5, atol=1e-5)
    assert seen == [(0, 6, 3), (1, 4, 2)], "layer 2 computes nothing"
    for index, layer in enumerate(model.model.layers):
        module = layer.self_attn
        assert (module.layer_idx, module.config._attn_implementation) == (index, "vllm")
        assert calls_the_interface(type(module).forward)
    assert not list(model.model.layers[2].self_attn.parameters())
    assert type(exact.model.layers[2].self_attn) is per_layer.ZeroBranch, "elsewhere nothing changes"


def calls_the_interface(forward):
    """What vLLM looks for, read from its `AttentionFuser`: one look-up in `ALL_ATTENTION_FUNCTIONS`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    return any(isinstance(node, ast.Name) and node.id == "ALL_ATTENTION_FUNCTIONS" for node in ast.walk(tree))


def test_the_zero_branch_alone_would_be_refused():
    assert not calls_the_interface(per_layer.ZeroBranch.forward)


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_vllms_own_classes_read_the_checkpoint(pruned, monkeypatch):
    monkeypatch.setitem(per_layer.STAND_INS, "vllm", plugin.idle_attention)
    plugin.register()
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config = pruned[0].config
    found = ModelArchConfigConvertorBase(config, config.get_text_config()).convert()
    assert [found[i].total_num_attention_heads for i in range(2)] == [6, 4]
    assert [found[i].total_num_kv_heads for i in range(3)] == [3, 2, 1]
    with pytest.raises(CheckpointError, match="builds equal ones"):
        ModelRegistry.resolve_model_cls(["LlamaForCausalLM"], asked(config, "vllm"))


@pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed")
def test_vllms_fuser_takes_the_stand_in(pruned, monkeypatch):
    monkeypatch.setitem(per_layer.STAND_INS, "vllm", plugin.idle_attention)
    fusers = pytest.importorskip("vllm.model_executor.models.transformers.fusers.attention", exc_type=ImportError)
    for layer in build_for_vllm(pruned[0]).model.layers:
        fuser = fusers.AttentionFuser.match(None, layer.self_attn)
        assert fuser is not None
        assert fuser.validate(layer.self_attn, None)
        assert fuser.layer_index(layer.self_attn) is not None
