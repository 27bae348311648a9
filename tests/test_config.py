import copy
import dataclasses
import json
import pickle
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structures import llama

from hf_prune.cli.flags import field_help
from hf_prune.config import (
    CONFIGS,
    MagnitudeConfig,
    OBSConfig,
    PruneNetConfig,
    PruningConfig,
    RandomConfig,
    REAPConfig,
    WandaConfig,
    selected_axes,
)
from hf_prune.config.checks import parse_layers
from hf_prune.errors import ConfigError, StructureError

KINDS = ("mlp", "attention", "expert", "hidden", "layer", "layer_attention", "layer_mlp")


@st.composite
def configs(draw):
    config_class = draw(st.sampled_from(list(CONFIGS.values())))
    own = {"norm": draw(st.sampled_from(["l1", "l2"]))} if config_class is MagnitudeConfig else {}
    kinds = ("mlp", "attention") if config_class in (OBSConfig, PruneNetConfig) else KINDS
    kinds = ("expert",) if config_class is REAPConfig else kinds
    layers = st.lists(st.integers(0, 90), min_size=1, unique=True).map(tuple)
    return config_class(
        draw(st.floats(0, 1, exclude_min=True, exclude_max=True)),
        budget=draw(st.sampled_from(["decoder", "model", "units"])),
        axes=tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, unique=True))),
        allocation=draw(st.sampled_from(["uniform", "global"])),
        round_to=draw(st.none() | st.just("auto") | st.integers(1, 512)),
        min_units=draw(st.integers(1, 64)),
        layers=draw(st.none() | layers),
        protect=tuple(draw(st.lists(st.text(string.ascii_letters + ".*?", min_size=1)))),
        seed=draw(st.integers(0, 2**63)),
        num_samples=draw(st.integers(1, 10**6)),
        seq_len=draw(st.integers(1, 10**6)),
        **own,
    )


@given(configs())
def test_json_round_trip_is_equal_and_keeps_the_class(config):
    again = PruningConfig.from_json(config.to_json())
    assert again == config
    assert type(again) is type(config)
    assert json.loads(config.to_json())["method"] == config.method


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("pruning_ratio", value) for value in (0, 1, -0.1, 30, float("nan"), float("inf"), "0.3", None, True)),
        *(("budget", value) for value in ("layers", None, ["decoder"])),
        *(("axes", value) for value in ((), ("mlp", "mlp"), ("heads",), "mlp,", "mlp,heads", None, (["mlp"],))),
        *(("allocation", value) for value in ("Uniform", 1)),
        *(("round_to", value) for value in (0, -8, 64.0, "64", True)),
        *(("min_units", value) for value in (0, 1.0, None, True)),
        *(("layers", value) for value in ((), (-1,), (1, 1), (True,), 3, "4-", "all")),
        *(("protect", value) for value in ("", "layers.0.*,", (1,), ("",))),
        *(("seed", value) for value in (-1, 0.5, None)),
        ("num_samples", 0),
        ("seq_len", 0),
        ("norm", "l3"),
        ("method", "wanda"),
    ],
)
def test_a_wrong_value_is_named(field, value):
    with pytest.raises(ConfigError, match=rf"(?s)^{field}: found .*expected"):
        MagnitudeConfig(**{"pruning_ratio": 0.3, field: value})


def test_names_in_one_text_are_what_the_flags_give():
    config = PruningConfig(0.3, method="random", axes="mlp, attention", targets="gguf", protect="layers.0.*,layers.1")
    assert (config.axes, config.targets) == (("mlp", "attention"), ("gguf",))
    assert config.protect == ("layers.0.*", "layers.1")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "magnitude", "pruning_ratio": 0.3, "ratio": 1}, r"unknown keys \['ratio'\]"),
        ({"method": "random", "pruning_ratio": 0.3, "norm": "l1"}, r"unknown keys \['norm'\]"),
        ({"method": "magic", "pruning_ratio": 0.3}, "method: found 'magic', expected one of"),
        ({"method": ["random"], "pruning_ratio": 0.3}, "method: found"),
        ({"method": "random"}, "pruning_ratio is missing"),
        ([], "JSON object"),
    ],
)
def test_from_dict_refuses(values, message):
    with pytest.raises(ConfigError, match=message):
        PruningConfig.from_dict(values)


def test_from_dict_of_a_subclass_reads_only_its_own():
    assert RandomConfig.from_dict({"pruning_ratio": 0.3}) == RandomConfig(0.3)
    with pytest.raises(ConfigError, match="expected one of"):
        RandomConfig.from_dict(WandaConfig(0.3).to_dict())
    with pytest.raises(ConfigError, match="must be JSON"):
        PruningConfig.from_json("{")


def test_every_field_has_help():
    for config_class in CONFIGS.values():
        help_of = field_help(config_class)
        for field in dataclasses.fields(config_class):
            assert len(help_of[field.name]) > 10
            assert "\n" not in help_of[field.name]


@pytest.mark.parametrize("method", list(CONFIGS))
def test_the_base_class_makes_the_configuration_of_any_method(method):
    made = PruningConfig(0.4, method=method, layers="1-3,7")
    assert type(made) is CONFIGS[method]
    assert made == CONFIGS[method](0.4, layers=(1, 2, 3, 7))
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), dataclasses.replace(made, seed=0)):
        assert again == made
        assert type(again) is type(made)


@pytest.mark.parametrize(
    ("values", "meant"),
    [
        ({"method": "llmpruner"}, "llm_pruner"),
        ({"method": "random", "allocation": "globle"}, "global"),
        ({"method": "random", "axes": ["mlp", "layer_atention"]}, "layer_attention"),
        ({"method": "random", "budget": "latncy"}, "latency"),
        ({"method": "random", "num_sample": 3}, "num_samples"),
    ],
)
def test_what_was_meant_is_said(values, meant):
    with pytest.raises(ConfigError, match=f"Did you mean '{meant}'"):
        PruningConfig.from_dict({"pruning_ratio": 0.3, **values})


def test_parse_layers():
    assert parse_layers("4-6,9") == (4, 5, 6, 9)
    assert parse_layers(" 3 , 1 - 2,2") == (1, 2, 3)
    for text in ("", "a", "3-1", "-1", "1-", "1,,2", "1-2-3", "²"):
        with pytest.raises(ConfigError, match="expected numbers and ranges"):
            parse_layers(text)


def test_selected_axes():
    structure = llama(3)

    def names(**settings):
        return [axis.name for axis in selected_axes(structure, PruningConfig(0.3, **settings))]

    assert names() == [f"layers.{i}.{kind}" for kind in ("mlp", "attention") for i in range(3)]
    assert names(layers=(1,)) == ["layers.1.mlp", "layers.1.attention"]
    assert names(axes=("mlp",), protect=("layers.[12].*",)) == ["layers.0.mlp"]
    assert names(axes=("hidden", "layer_mlp"), layers=(1,)) == ["hidden", "layers.mlp"]
    assert names(axes=("layer",), protect=("layers.1",)) == ["layers"]  # one unit of it is protected, not the axis


def test_selected_axes_errors():
    structure = llama(2)
    blocked = dict(structure.axes)
    for i in range(2):
        name = f"layers.{i}.attention"
        blocked[name] = dataclasses.replace(blocked[name], blocker="op aten.sort has no rule")
    some = dataclasses.replace(structure, axes={**blocked, "layers.1.attention": structure.axes["layers.1.attention"]})
    attention = PruningConfig(0.3, axes=("attention",))
    with pytest.raises(StructureError, match=r"kind 'attention'.*op aten.sort has no rule"):
        selected_axes(dataclasses.replace(structure, axes=blocked), attention)
    assert [axis.name for axis in selected_axes(some, attention)] == ["layers.1.attention"]
    with pytest.raises(StructureError, match="has 1 unit"):
        selected_axes(llama(2, kv=1), attention)
    no_hidden = {name: axis for name, axis in structure.axes.items() if name != "hidden"}
    with pytest.raises(StructureError, match="no axis of kind 'hidden'"):
        selected_axes(dataclasses.replace(structure, axes=no_hidden), PruningConfig(0.3, axes=("hidden",)))
    with pytest.raises(ConfigError, match="layers: found 2, expected 0 to 1"):
        selected_axes(structure, PruningConfig(0.3, layers=(0, 2)))
    with pytest.raises(ConfigError, match=r"'layer\.0' matches none"):
        selected_axes(structure, PruningConfig(0.3, protect=("layer.0",)))
