"""What a pruned checkpoint does where its loader is missing: in a process without hf_prune, once for all cases."""

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hand_pruned import FAMILIES, VOCAB, hand_pruned, ids, skip_only
from transformers import LlamaConfig

from hf_prune.checkpoint.autoload import _InstallingLoader
from hf_prune.errors import CheckpointError
from hf_prune.format import per_layer
from hf_prune.format.remote_code import MODULE_NAME, auto_map, remote_code
from hf_prune.format.stock_guard import FLAG, make_stock_refuse

REPOSITORY = Path(__file__).parents[1]
SKIPS = ["llama", "phi3", "falcon", "gpt2", "bloom"]

# Prints, for each directory, whether config, tokenizer and model load, and writes the logits.
PROBE = """
import json, sys
if sys.argv[1] == "plugin":
    from hf_prune.checkpoint.autoload import install_on_import
    install_on_import()
    install_on_import()
    assert not {"torch", "transformers"} & set(sys.modules), "import hf_prune must stay light"
import torch, transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

def attempt(load):
    try:
        return load(), "ok"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"

ids, found = torch.tensor(json.loads(sys.argv[2])), {}
for directory in sys.argv[3:]:
    trust = directory.endswith("remote")
    name, result = directory.rsplit("/", 1)[-1], {}
    result["config"] = attempt(lambda: AutoConfig.from_pretrained(directory))[1]
    result["tokenizer"] = attempt(lambda: AutoTokenizer.from_pretrained(directory)("w1 w2").input_ids)[1]
    model, result["model"] = attempt(lambda: AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust))
    if model is not None:
        with torch.no_grad():
            result["logits"] = model.eval()(ids).logits.tolist()
        result["modules"] = [cls.__module__ for cls in type(model).__mro__ if cls.__name__ == type(model).__name__]
    if trust and model is not None:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            result["eager"] = model(ids).logits.tolist()
        base = AutoModel.from_pretrained(directory, trust_remote_code=True)
        result["base"] = [type(base).__module__.split(".")[-1], sum(p.numel() for p in base.parameters())]
        model.save_pretrained(directory + "-resaved")
    found[name] = result
init = transformers.modeling_utils.PreTrainedModel.__init__
found["depth"] = 0
while hasattr(init, "__wrapped__"):
    init, found["depth"] = init.__wrapped__, found["depth"] + 1
assert sys.argv[1] == "plugin" or "hf_prune" not in sys.modules
assert not any("autoload" in type(finder).__module__ for finder in sys.meta_path)
print(json.dumps(found))
"""


def probe(mode, directories, cache):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(REPOSITORY)} if mode == "plugin" else {}
    command = [sys.executable, "-c", PROBE, mode, json.dumps(ids().tolist()), *map(str, directories)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({"<unk>": 0} | {f"w{i}": i for i in range(1, VOCAB)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def save_skip_only(family, directory, values):
    pruned = hand_pruned(family)
    dense = {name: t for name, t in pruned.masked.state_dict().items() if name != "lm_head.weight" or family == "llama"}
    prefix = "model.layers." if any(name.startswith("model.layers.") for name in dense) else "transformer.h."
    gone = tuple(f"{prefix}{name}." for name in ("1.self_attn", "1.self_attention", "1.attn", "2.mlp"))
    object.__setattr__(pruned, "state", {name: t for name, t in dense.items() if not name.startswith(gone)})
    return pruned.save(directory, values)


def add_remote_code(source, directory):
    shutil.copytree(source, directory)
    values = json.loads((directory / "config.json").read_text())
    config = type(hand_pruned(source.name).masked.config).from_dict(values)
    values["auto_map"] = auto_map(config)
    (directory / "config.json").write_text(json.dumps(values))
    text = remote_code(values["architectures"], values["model_type"], Path(per_layer.__file__).read_text())
    (directory / f"{MODULE_NAME}.py").write_text(text)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("traps")
    found = {family: hand_pruned(family).save(root / family) for family in FAMILIES}
    found |= {f"{f}-skip": save_skip_only(f, root / f"{f}-skip", make_stock_refuse(skip_only(f))) for f in SKIPS}
    found["silent"] = save_skip_only("llama", root / "silent", skip_only("llama"))
    found["no_flag"] = hand_pruned("llama").save(root / "no_flag", hand_pruned("llama").values)
    for directory in found.values():
        tokenizer().save_pretrained(directory)
    for family in ("llama", "bloom"):
        found[f"{family}-remote"] = add_remote_code(found[family], root / f"{family}-remote")
    return found


@pytest.fixture(scope="module")
def stock(directories, tmp_path_factory):
    return probe("stock", directories.values(), tmp_path_factory.mktemp("modules"))


@pytest.fixture(scope="module")
def plugin(directories, stock, tmp_path_factory):
    chosen = [directories["llama"], directories["bloom-remote"], directories["llama-remote"]]
    return probe("plugin", chosen, tmp_path_factory.mktemp("modules"))


LOUD = r"AmbiguousGlobalPerLayerAttributeError|ignore_mismatched_sizes"


@pytest.mark.parametrize("case", [*FAMILIES, *(f"{family}-skip" for family in SKIPS)])
def test_stock_reads_config_and_tokenizer_but_refuses_the_model(stock, case):
    assert stock[case]["config"] == "ok"
    assert stock[case]["tokenizer"] == "ok"
    assert any(reason in stock[case]["model"] for reason in LOUD.split("|")), stock[case]["model"]


def test_the_traps_are_real(stock):
    """Without the flag even the tokenizer fails; without sentinels stock fills the gaps with random weights."""
    assert "AmbiguousGlobal" in stock["no_flag"]["config"]
    assert "AmbiguousGlobal" in stock["no_flag"]["tokenizer"]
    assert stock["silent"]["model"] == "ok"


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_remote_code_needs_no_plugin(stock, directories, family):
    found = stock[f"{family}-remote"]
    assert found["model"] == "ok"
    expected = hand_pruned(family).masked(ids()).logits
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(found["eager"]), expected, atol=1e-5, rtol=1e-4)
    assert found["base"][0] == MODULE_NAME
    resaved = Path(f"{directories[f'{family}-remote']}-resaved")
    before, after = (json.loads((d / "config.json").read_text()) for d in (directories[f"{family}-remote"], resaved))
    assert after["architectures"] == before["architectures"]
    assert after["auto_map"] == before["auto_map"]
    assert (resaved / f"{MODULE_NAME}.py").is_file()


def test_plugin_and_remote_code_together(stock, plugin):
    for name in ("bloom-remote", "llama-remote"):
        assert plugin[name]["logits"] == stock[name]["logits"]
        assert MODULE_NAME in plugin[name]["modules"][0]
    assert plugin["llama"]["logits"] == stock["llama-remote"]["logits"]
    assert plugin["depth"] == stock["depth"] == 1


# --- what make_stock_refuse writes -------------------------------------------------------------------------------


def test_flag_only_where_it_is_needed():
    assert make_stock_refuse(hand_pruned("llama").values)[FLAG] is True  # its validator reads num_attention_heads
    for family in ("mistral", "falcon", "gpt2", "bloom"):
        values = hand_pruned(family).values
        assert FLAG not in make_stock_refuse(values | {FLAG: True})
        assert {k: v for k, v in make_stock_refuse(values).items() if k != FLAG} == {
            k: v for k, v in values.items() if k != FLAG
        }


def test_flag_where_only_the_model_reads_the_attribute():
    """Rotary embeddings of this kind read the model's head count when they are built; the config does not."""
    rope = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    values = hand_pruned("mistral").values | {"rope_parameters": rope}
    assert make_stock_refuse(values)[FLAG] is True


@pytest.mark.parametrize("family", SKIPS)
def test_sentinels_change_nothing_else(family):
    values = skip_only(family)
    loud = make_stock_refuse(values)
    assert make_stock_refuse(loud) == loud
    before, after = values.pop("per_layer_config"), loud.pop("per_layer_config")
    assert {k: v for k, v in loud.items() if k != FLAG} == {k: v for k, v in values.items() if k != FLAG}
    added = {layer: {k: v for k, v in after[layer].items() if k not in before[layer]} for layer in after}
    assert sum(map(len, added.values())) == 1
    assert all(before[layer].items() <= after[layer].items() for layer in before)


def test_ordinary_config_is_left_alone():
    from hand_pruned import LLAMA

    values = LlamaConfig(**LLAMA).to_dict()
    assert make_stock_refuse(values) == values


def test_surgery_that_stock_would_ignore_is_refused():
    values = hand_pruned("bloom").values
    for record in values["pruning_config"]["surgery"]["modules"].values():
        record["shapes"], record["attributes"] = {}, {}
    with pytest.raises(CheckpointError, match="random weights"):
        make_stock_refuse(values)


def test_config_that_cannot_be_built_is_refused():
    values = hand_pruned("llama").values
    values["per_layer_config"]["2"] = {"skip": ["mixer"]}
    with pytest.raises(CheckpointError, match="mixer"):
        make_stock_refuse(values)


# --- the remote-code file ---------------------------------------------------------------------------------------------


def test_auto_map_names_the_classes_in_the_file():
    config = LlamaConfig(architectures=["LlamaForCausalLM"])
    assert auto_map(config) == {
        "AutoModel": f"{MODULE_NAME}.LlamaModel",
        "AutoModelForCausalLM": f"{MODULE_NAME}.LlamaForCausalLM",
    }
    text = remote_code(["LlamaForSequenceClassification"], "llama", "source")
    for name in ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification"):
        assert f"class {name}(_modeling.{name}):" in text
    assert "@use_experts_implementation" not in text
    assert "@use_experts_implementation" in remote_code([], "mixtral", "source")


@pytest.mark.parametrize(("architectures", "model_type"), [(["LlamaForNothing"], "llama"), (["LlamaModel"], "lama")])
def test_unknown_family_or_class_is_refused(architectures, model_type):
    with pytest.raises(CheckpointError, match="no remote code"):
        remote_code(architectures, model_type, "source")


def test_loader_imports_nothing_of_ours():
    source = Path(per_layer.__file__).read_text()
    assert "import hf_prune" not in source
    assert "from hf_prune" not in source


def test_the_import_hook_still_shows_the_source():
    assert _InstallingLoader(json.__loader__, lambda: None).get_source("json") == inspect.getsource(json)
