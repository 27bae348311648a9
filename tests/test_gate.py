"""The gate before work: every refusal, through API, command line, sweep and Trainer, before anything is done."""

from __future__ import annotations

import math
import os
import shutil
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from models import tiny_model
from test_price import counted
from tiny import write_checkpoint, write_text
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    RobertaConfig,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING
from typer.testing import CliRunner

from hf_prune import (
    LLMPrunerConfig,
    MagnitudeConfig,
    OBSConfig,
    PrunedModelForCausalLM,
    PruneNetConfig,
    PruningCallback,
    RandomConfig,
    WandaConfig,
    infer_structure,
    perplexity,
    prune,
)
from hf_prune.calibration import calibration_batches
from hf_prune.cli.inspection import inspect_config, verify
from hf_prune.cli.main import app
from hf_prune.cli.sweep import sweep
from hf_prune.data import evaluation_windows, load_text
from hf_prune.errors import CalibrationError, CheckpointError, ConfigError, ScoreError, StructureError
from hf_prune.evaluation.perplexity import perplexity_of
from hf_prune.gate import check_config, check_windows
from hf_prune.layers.price import price_of
from hf_prune.layers.statistics import factorise_, ridges, solving
from hf_prune.layers.walk import Walk
from hf_prune.loading import open_model

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = {"num_samples": 2, "seq_len": 16}
BATCHES = [{"input_ids": torch.arange(3, 19)[None]}]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A checkpoint with weights, beside it a text."""
    path = write_checkpoint(tmp_path_factory.mktemp("dense") / "model")
    write_text(path.parent / "text.txt", 400, seed=1)
    return path


def described(path: Path, dense: Path, config) -> Path:
    """A directory with a config and a tokenizer, and no weights: to load it is an error of another kind."""
    shutil.copytree(dense, path, ignore=shutil.ignore_patterns("*.safetensors"))
    config.architectures = ["LlamaForCausalLM"]
    if config.model_type == "gpt2":
        config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(path)
    return path


def llama(**changes) -> LlamaConfig:
    """Llama-3 70B."""
    shape = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    return LlamaConfig(**{"vocab_size": 128256, **shape, "num_key_value_heads": 8, **changes})


def gpt2() -> GPT2Config:
    return GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=12, bos_token_id=0, eos_token_id=1)


# --- before weights are loaded: by config, text and disk --------------------------------------------------------------

FIFOS = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "merges.txt")
BY_CONFIG = {
    **{
        f"quantised: {method}": (
            lambda method=method: llama(quantization_config={"quant_method": method}),
            {},
            (StructureError, f"quantised (quantization_config: {method})", "Prune the model that it was made from"),
        )
        for method in (*AUTO_QUANTIZATION_CONFIG_MAPPING, "not known yet")
    },
    "positions": (gpt2, {}, (ConfigError, "a window is 16 tokens long, but the model has 12 positions")),
    "vocabulary": (
        lambda: llama(vocab_size=40),
        {},
        (CalibrationError, "the model embeds 40 tokens: pass this model's"),
    ),
    "no text": (llama, {"calibration": "missing.txt"}, (CalibrationError, "no file at", "check the path")),
    "no text, without need": (
        llama,
        {"calibration": "missing.txt", "method": "magnitude"},
        (CalibrationError, "no file at", "check the path"),
    ),
    "short text": (llama, {"seq_len": 4096}, (CalibrationError, "2 windows of 4096 need 8,192: pass a longer text")),
    **{f"pipe: {name}": (llama, {"pipe": name}, (CheckpointError, name, "not a regular file")) for name in FIFOS},
}


def _made(case, dense, tmp_path):
    make, changes, expected = BY_CONFIG[case]
    source = described(tmp_path / "model", dense, make())
    if "pipe" in changes:
        (source / changes["pipe"]).unlink(missing_ok=True)
        os.mkfifo(source / changes["pipe"])
    text = tmp_path / changes["calibration"] if "calibration" in changes else dense.parent / "text.txt"
    return source, str(text), changes.get("method", "wanda"), changes.get("seq_len", 16), expected


@pytest.mark.parametrize("case", BY_CONFIG)
def test_refused_by_the_config_and_the_text(case, dense, tmp_path):
    source, text, method, seq_len, (error, *words) = _made(case, dense, tmp_path)
    config = {"wanda": WandaConfig, "magnitude": MagnitudeConfig}[method](0.3, num_samples=2, seq_len=seq_len)
    calls = [
        lambda: prune(source, config, calibration=text),
        lambda: prune(source, config, calibration=text, layers_on="disk", work_dir=tmp_path / "work"),
        lambda: PrunedModelForCausalLM.from_pretrained(source, pruning_config=config, calibration=text),
    ]
    for call in calls:
        with pytest.raises(error) as caught:
            call()
        assert type(caught.value) is error
        assert all(word in str(caught.value) for word in words), caught.value
    out = tmp_path / "out"
    flags = [str(source), str(out), "--pruning-ratio", "0.3", "--calibration", text, "--method", method]
    result = CliRunner().invoke(app, ["prune", *flags, "--num-samples", "2", "--seq-len", str(seq_len)])
    assert result.exit_code == 2, result.output
    assert all(word in result.output for word in words), result.output
    assert not out.exists()


@pytest.mark.parametrize("case", ["quantised: gptq", "no text", *(f"pipe: {name}" for name in FIFOS)])
@pytest.mark.parametrize("command", ["sweep", "inspect", "eval", "recover"])
def test_other_commands_neither_hang_nor_load_weights(case, command, dense, tmp_path):
    source, text, _, _, (_, *words) = _made(case, dense, tmp_path)
    there = str(dense.parent / "text.txt")
    flags = {
        "sweep": ["--methods", "wanda", "--ratios", "0.3", "--text", there, "--calibration", text],
        "inspect": [],
        "eval": ["--text", text],
        "recover": ["--train", text],
    }[command]
    where = [str(source), str(tmp_path / "out")] if command in ("sweep", "recover") else [str(source)]
    result = CliRunner().invoke(app, [command, *where, *flags])
    if command == "inspect" and not case.startswith("pipe"):
        assert result.exit_code == 0
        assert ("quantised (gptq): prune the model that" in result.output) == (case != "no text")
    elif command == "sweep" or case.startswith("pipe"):
        assert result.exit_code == 2, result.output
        assert all(word in result.output for word in words), result.output
    else:  # there are no weights
        assert result.exit_code == 2


def test_quantised_while_loading_and_dequantised(dense):
    config = LlamaConfig.from_pretrained(dense)
    check_config(config)
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(StructureError, match="fp8"):
        check_config(config)
    check_config(config, {"quant_method": "fp8", "dequantize": True})
    wanted = {"quant_method": "torchao"}
    with pytest.raises(StructureError, match=r"quantised \(quantization_config: torchao\)"):
        PrunedModelForCausalLM.from_pretrained(dense, pruning_config=RandomConfig(0.3), quantization_config=wanted)
    assert "gptq" in inspect_config(llama(quantization_config={"quant_method": "gptq"}, num_hidden_layers=1)).quantised
    assert not inspect_config(llama(num_hidden_layers=1)).quantised


def test_learned_positions_are_told_from_others(caplog):
    ids = [{"input_ids": torch.full((1, 65), 3)}]
    sizes = {"d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 64}  # ALiBi of a fixed length
    mpt = AutoModelForCausalLM.from_config(MptConfig(vocab_size=96, **sizes))
    for model in (tiny_model("gpt2"), tiny_model("opt"), mpt):
        with pytest.raises(ConfigError, match="65 tokens long, but the model has 64 positions"):
            check_windows(model, ids)
        check_windows(model, [{"input_ids": ids[0]["input_ids"][:, :64]}])
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": 2, "intermediate_size": 40}
    offset = RobertaConfig(vocab_size=96, max_position_embeddings=64, is_decoder=True, **sizes)  # its padding is 1
    roberta = AutoModelForCausalLM.from_config(offset)
    with pytest.raises(ConfigError, match="row 64 of a table of 64"):
        check_windows(roberta, [{"input_ids": ids[0]["input_ids"][:, :63]}])
    check_windows(roberta, [{"input_ids": ids[0]["input_ids"][:, :62]}])
    for family in ("llama", "mixtral", "gpt_neox", "bloom"):
        caplog.clear()
        check_windows(tiny_model(family), [])
        check_windows(tiny_model(family), ids)
        assert ("made for 64" in caplog.text) == (family != "bloom"), family
    pruned = prune(tiny_model("gpt2", dtype=torch.float32), RandomConfig(0.3, allocation="global")).model
    with pytest.raises(ConfigError, match="64 positions"):
        check_windows(pruned, ids)


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_no_room_and_no_right_to_write(dense, tmp_path, monkeypatch):
    flags = [str(dense), "--method", "magnitude", "--pruning-ratio", "0.3"]
    result = CliRunner().invoke(app, ["prune", flags[0], "/proc/nowhere/out", *flags[1:]])
    assert result.exit_code == 2
    assert "/proc/nowhere/out cannot be made" in result.output
    model = open_model(dense, layers_on="disk")
    structure, config = infer_structure(model), MagnitudeConfig(0.3)
    price = price_of(structure, config, None, model)
    free = price.layer_bytes + price.checkpoint_bytes + price.held_bytes  # all are on one disk
    usage = type("Usage", (), {"free": free - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with patch("hf_prune.pipeline.decide", side_effect=AssertionError("scored")):
        with pytest.raises(CheckpointError, match=rf"writes {free:,} bytes .* {free - 1:,} are free"):
            prune(model, config, work_dir=tmp_path / "work", output=tmp_path / "out")
        result = CliRunner().invoke(
            app,
            [
                "prune",
                flags[0],
                str(tmp_path / "out"),
                *flags[1:],
                "--work-dir",
                str(tmp_path / "work"),
                "--layers-on=disk",
            ],
        )
        assert (result.exit_code, f"writes {free:,} bytes" in result.output) == (2, True), result.output
    usage.free = free
    result = prune(model, config, work_dir=tmp_path / "work", output=tmp_path / "out")
    usage.free = free - price.layer_bytes // 2  # what is there already needs no room
    prune(model, config, work_dir=tmp_path / "work", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- models in memory -------------------------------------------------------------------------------------------------


def _with(change):
    def make(path, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(path)
        return change(model, tmp_path) or model

    return make


def _nan(name, value=math.nan):
    return _with(lambda model, _: model.get_parameter(name).data.view(-1)[7:8].fill_(value) is None)


def _adapted(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))


def _with_adapter(model, tmp_path):
    from peft import LoraConfig

    model.add_adapter(LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


def _torchao(path, tmp_path):
    quantisation = pytest.importorskip("torchao.quantization")
    model = AutoModelForCausalLM.from_pretrained(path)
    quantisation.quantize_(model, quantisation.Int8WeightOnlyConfig())
    return model


def _cut(model, tmp_path):
    model.model.layers = model.model.layers[:1]


def _compiled_layer(model, tmp_path):
    model.model.layers[0] = torch.compile(model.model.layers[0])


def _float8(model, tmp_path):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.to(torch.float8_e4m3fn)


def _offloaded_head(path, tmp_path):
    device_map = {"model": "cpu", "lm_head": "disk"}
    return AutoModelForCausalLM.from_pretrained(path, device_map=device_map, offload_folder=str(tmp_path / "off"))


IN_MEMORY = {
    "NaN in an embedding": (_nan("model.embed_tokens.weight"), (CheckpointError, "embed_tokens.weight holds", "NaN")),
    "infinite norm": (_nan("model.norm.weight", math.inf), (CheckpointError, "model.norm.weight", "infinite")),
    "NaN in a layer": (
        _nan("model.layers.1.mlp.down_proj.weight", -math.inf),
        (CheckpointError, "model.layers.1.mlp.down_proj.weight", "expected finite"),
    ),
    "adapter": (_with(_adapted), (StructureError, "PeftModel", "merge_and_unload()")),
    "adapter inside": (_with(_with_adapter), (StructureError, "carries an adapter", "merge_and_unload()")),
    "wrapped": (_with(lambda m, _: nn.DataParallel(m)), (ConfigError, "wrapped in DataParallel", "model.module")),
    "no head": (_with(lambda m, _: m.model), (ConfigError, "found LlamaModel", "expected a causal LM")),
    "not a model": (_with(lambda m, _: nn.Linear(2, 2)), (ConfigError, "found Linear", "expected a causal LM")),
    "compiled layer": (_with(_compiled_layer), (StructureError, "model.layers.0", "exchanged, compiled or wrapped")),
    "compiled in place": (
        _with(lambda m, _: m.compile()),
        (StructureError, "compiled in place", "Load it again"),
    ),
    "torchao": (_torchao, (StructureError, "Int8Tensor", "before the model is quantised")),
    "float8": (_with(_float8), (StructureError, "up_proj.weight is a Tensor of torch.float8_e4m3fn")),
    "meta": (_with(lambda m, _: m.to("meta")), (CheckpointError, "has no data", "from_pretrained")),
    "all on the CPU of accelerate": (
        _with(lambda m, _: cpu_offload(m, torch.device("cpu"))),
        (StructureError, "embed_tokens.weight is offloaded", "layers_on='disk'"),
    ),
    "all on disk": (
        _with(lambda m, tmp: disk_offload(m, str(tmp / "off"), torch.device("cpu"))),
        (StructureError, "embed_tokens.weight is offloaded", "layers_on='disk'"),
    ),
    "head on disk": (_offloaded_head, (StructureError, "lm_head.weight is offloaded", "expected in memory")),
    "layers cut by hand": (_with(_cut), (StructureError, "model.layers.1", "exchanged", "Bring model.config")),
}
METHODS = (RandomConfig(0.3), MagnitudeConfig(0.3), PruneNetConfig(0.3, num_episodes=2), OBSConfig(0.3, **SETTINGS))


@pytest.mark.parametrize("case", IN_MEMORY)
def test_refused_in_memory(case, dense, tmp_path):
    """By every method, before anything is scored; by a sweep and a Trainer too."""
    make, (error, *words) = IN_MEMORY[case]
    model = make(dense, tmp_path)
    text, tokenizer = str(dense.parent / "text.txt"), AutoTokenizer.from_pretrained(dense)

    def train(mode):
        args = TrainingArguments(tmp_path / "train", max_steps=4, report_to="none", use_cpu=True, save_strategy="no")
        ids = torch.arange(3, 9)
        rows = [{"input_ids": ids, "labels": ids}] * 4
        Trainer(model, args, train_dataset=rows, callbacks=[PruningCallback(MagnitudeConfig(0.3), mode, begin_step=1)])

    refuses = [*(lambda config=config: prune(model, config, calibration=BATCHES) for config in METHODS)]
    refuses.append(lambda: sweep(model, tokenizer, tmp_path / "s", methods=["random"], ratios=[0.3], text=text))
    refuses.append(lambda: verify(model))
    if case not in ("not a model", "meta", "float8", "torchao", "no head", "wrapped") and "offload" not in words[0]:
        refuses += [lambda mode=mode: train(mode) for mode in ("start", "cut", "gradual")]
    with (
        patch("hf_prune.pipeline.decide", side_effect=AssertionError("scored")),
        patch("hf_prune.cli.sweep.score", side_effect=AssertionError("scored")),
        patch("hf_prune.cli.inspection.score", side_effect=AssertionError("scored")),
        patch("hf_prune.recovery.callback.score", side_effect=AssertionError("scored")),
    ):
        for refused in refuses:
            with pytest.raises(error) as caught:
                refused()
            assert all(word in str(caught.value) for word in words), caught.value
    assert not list((tmp_path / "s").glob("*.json"))  # no row was measured


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.full((1, 16), 3.0), ("torch.float32", "whole numbers")),
        (torch.full((1, 16), True), ("torch.bool", "whole numbers")),
        (torch.full((1, 16), 64), ("token 64", "embeds 64 tokens")),
        (torch.full((1, 16), -100), ("token -100", "embeds 64 tokens")),
    ],
)
def test_ids_of_the_caller(dense, ids, words):
    for source in (dense, AutoModelForCausalLM.from_pretrained(dense)):
        with pytest.raises(CalibrationError) as caught:
            prune(source, WandaConfig(0.3), calibration=[*BATCHES, {"input_ids": ids}])
        assert all(word in str(caught.value) for word in words)


def test_a_compiled_model_is_unwrapped(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    expected = prune(model, WandaConfig(0.3), calibration=BATCHES)
    found = prune(torch.compile(model), WandaConfig(0.3), calibration=BATCHES)
    assert found.plan == expected.plan
    assert type(found.model) is type(model)


def test_some_layers_on_disk_are_served(dense, tmp_path):
    device_map = {"": "cpu", "model.layers.1": "disk"}
    modules = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    device_map = {**dict.fromkeys(modules, "cpu"), "model.layers.1": "disk"}
    part = AutoModelForCausalLM.from_pretrained(dense, device_map=device_map, offload_folder=str(tmp_path))
    whole = AutoModelForCausalLM.from_pretrained(dense)
    for config in METHODS[1:]:
        plans = [prune(model, config, calibration=BATCHES).plan for model in (part, whole)]
        assert plans[0].kept_indices == plans[1].kept_indices


@pytest.mark.parametrize("config", METHODS, ids=lambda config: config.method)
def test_weights_on_disk_are_looked_at_by_the_probe(dense, tmp_path, config):
    """Before anything is scored, and without reading a byte for it (prices in test_price.py are exact)."""
    path = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.model.layers[1].self_attn.k_proj.weight.data[3, 4] = math.nan
    model.save_pretrained(path)
    broken = open_model(path, layers_on="disk")
    layers = sum(p.nbytes for p in model.model.layers.parameters())
    forwards = [module.__dict__.get("forward") for module in broken.modules()]
    with counted() as read, patch("hf_prune.pipeline.decide", side_effect=AssertionError("scored")):
        with pytest.raises(CheckpointError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight holds"):
            prune(broken, config, calibration=BATCHES)
        assert read[0] <= layers
    assert [module.__dict__.get("forward") for module in broken.modules()] == forwards  # as it was


# --- linear algebra ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("features", ["scale_free", "row"])
@pytest.mark.parametrize("distance", ["ks", "energy", "wasserstein"])
def test_prunenet_of_a_layer_of_zeros(allocation, features, distance):
    model = tiny_model("llama", dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.model.layers[1].mlp.parameters():
            parameter.zero_()
    start = "zero" if features == "row" else "row_norm"
    for exact_up_to in (4096, 1):
        settings = {"distance": distance, "features": features, "start": start, "exact_up_to": exact_up_to}
        config = PruneNetConfig(0.2, num_episodes=2, axes=("mlp",), allocation=allocation, **settings)
        result = prune(model, config)
        zeros, others = result.scores["layers.1.mlp"], result.scores["layers.0.mlp"]
        assert zeros.isfinite().all()
        assert features == "row" or others.unique().numel() > 1
        if allocation == "global":  # nothing is lost with it: it goes first, and as far as may be
            assert (zeros == 0).all()
            assert result.plan.widths["layers.1.mlp"] < result.plan.widths["layers.0.mlp"]


def test_failures_of_linear_algebra_name_the_axis():
    with (
        pytest.raises(ScoreError, match=r"layers\.3\.mlp: linear algebra failed .*protect this axis"),
        solving("layers.3.mlp"),
    ):
        torch.linalg.eigvalsh(torch.full((3, 3), math.nan))
    with pytest.raises(ScoreError, match="no_proj: linear algebra failed"), solving("no_proj"):
        torch.linalg.solve(torch.zeros(2, 2), torch.ones(2, 2))
    with pytest.raises(ScoreError, match="x: linear algebra failed"), solving("x"):
        factorise_(torch.full((3, 3), math.nan, dtype=torch.float64), 0.0)
    assert next(ridges(torch.full((2, 2), -1e-20), 0.5)) == (0.5, 0.5)  # zeros but for rounding
    matrix = torch.full((2, 2), -1e-20, dtype=torch.float64)
    assert factorise_(matrix, 1e-2) == (1e-2, 1e-2)
    assert matrix.tril().diagonal().tolist() == pytest.approx([0.1, 0.1])


# --- perplexity on text that was not calibrated with ------------------------------------------------------------------


@pytest.mark.parametrize("layers_on", ["memory", "disk"])
def test_perplexity_of_windows_that_were_not_calibrated_with(dense, layers_on, tmp_path):
    text, tokenizer = str(dense.parent / "text.txt"), AutoTokenizer.from_pretrained(dense)
    config = LLMPrunerConfig(0.3, repair="least_squares", seed=3, **SETTINGS)
    source = open_model(dense, layers_on=layers_on)
    result = prune(source, config, tokenizer=tokenizer, calibration=text, batch_size=3)
    used = calibration_batches(tokenizer, text, **SETTINGS, batch_size=3, seed=3)
    assert prune(source, config, calibration=used).plan == result.plan
    assert prune(source, config, calibration=used).perplexity_after is None
    windows = evaluation_windows(tokenizer, load_text(text), 16)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat([batch["input_ids"] for batch in used]), windows[order[:2]])
    left = windows[order[2:10]]
    for model, found in ((source, result.perplexity_before), (result.model, result.perplexity_after)):
        with torch.no_grad():
            logits = torch.cat([model(input_ids=row[None]).logits for row in left])[:, :-1].double()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), left[:, 1:].flatten())
        assert found == pytest.approx(float(loss.exp()), rel=1e-5)
    assert result.perplexity_before != result.perplexity_after


def test_perplexity_of_a_walk_is_that_of_the_model(dense):
    tokenizer, model = AutoTokenizer.from_pretrained(dense), AutoModelForCausalLM.from_pretrained(dense)
    text = load_text(dense.parent / "text.txt")
    windows = evaluation_windows(tokenizer, text, 20)
    walk = Walk(model, infer_structure(model).layer_paths, list(windows.split(3)))
    assert perplexity_of(walk) == pytest.approx(perplexity(model, tokenizer, text, window=20).perplexity, rel=1e-6)


def test_what_it_reads_is_in_the_price(dense, tmp_path):
    text, tokenizer = str(dense.parent / "text.txt"), AutoTokenizer.from_pretrained(dense)
    model, config = open_model(dense, layers_on="disk"), MagnitudeConfig(0.3)
    price = price_of(infer_structure(model), config, None, model, held_out=128)
    without = price_of(infer_structure(model), config, None, model)
    layers = sum(p.numel() * p.element_size() for p in model.model.layers.parameters())
    assert price.bytes_read - without.bytes_read == layers
    with counted() as read:
        result = prune(model, config, tokenizer=tokenizer, calibration=text)
    assert result.perplexity_after is not None
    pruned = sum(p.numel() * p.element_size() for p in result.model.model.layers.parameters())
    assert read[0] == price.bytes_read + pruned
    assert abs(price.pruned_bytes_read - without.pruned_bytes_read - pruned) <= 0.05 * layers


def test_layers_that_go_and_too_little_text(dense, tmp_path):
    text, tokenizer = str(dense.parent / "text.txt"), AutoTokenizer.from_pretrained(dense)
    config = RandomConfig(0.5, axes=("layer",), seq_len=16)
    for layers_on in ("memory", "disk"):
        result = prune(dense, config, calibration=text, layers_on=layers_on)
        assert len(result.model.model.layers) == 1
        assert result.perplexity_after > 1
    short = write_text(tmp_path / "short.txt", 40, seed=1)  # two windows of 16
    result = prune(dense, WandaConfig(0.3, **SETTINGS), tokenizer=tokenizer, calibration=str(short))
    assert (result.perplexity_before, result.perplexity_after) == (None, None)
    assert prune(dense, RandomConfig(0.3)).perplexity_after is None


@pytest.mark.parametrize(("after", "warns"), [(29.9, False), (30.1, True), (math.inf, True), (math.nan, True)])
def test_damage_is_warned_of(dense, after, warns, caplog):
    text, measured = str(dense.parent / "text.txt"), iter((10.0, after))
    with patch("hf_prune.pipeline.perplexity_of", lambda walk: next(measured)):
        result = prune(dense, MagnitudeConfig(0.3, seq_len=16), calibration=text)
    assert result.perplexity_before == 10.0
    assert ("badly damaged" in caplog.text) == warns


def test_the_command_line_shows_it(dense):
    flags = ["--method", "magnitude", "--pruning-ratio", "0.5", "--seq-len", "16", "--dry-run"]
    result = CliRunner().invoke(app, ["prune", str(dense), *flags, "--calibration", str(dense.parent / "text.txt")])
    assert result.exit_code == 0, result.output
    assert "on text that was not calibrated with" in result.output
    assert CliRunner().invoke(app, ["prune", str(dense), *flags]).output.count("not measured: no text was given") == 1
