"""Quantised bases: refused at once with the flag that helps, or dequantised as they are loaded."""

from __future__ import annotations

import json

import pytest
import torch
from models import token_ids
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_prune import WandaConfig, export, infer_structure, prune
from hf_prune.cli.main import app
from hf_prune.errors import ConfigError, StructureError
from hf_prune.loading import load_config, load_model
from hf_prune.surgery.slicing import slice_state_dict

CALIBRATION = [{"input_ids": token_ids()}]
CONFIG = WandaConfig(0.3, allocation="global")
_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def saved(directory, kind, quantisation, change, **values):
    """A checkpoint whose weights `change` (of a dictionary of tensors, in place) has quantised."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **_SHAPE, **values), dtype=torch.bfloat16)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))
    return directory


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory):
    """gpt-oss as it is published: experts in blocks of 32 numbers of 4 bits with one scale."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            experts, width, out = tensors.pop(name).shape
            shape = (experts, out, width // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 123, shape, dtype=torch.uint8)

    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}
    own["layer_types"] = ["sliding_attention", "full_attention"]
    return saved(tmp_path_factory.mktemp("mxfp4"), "gpt_oss", {"quant_method": "mxfp4"}, change, **own)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """Llama with weights of 8 bits and a scale for each block of 32 × 32."""

    def change(tensors):
        for name in [name for name in tensors if "proj" in name]:
            rows, columns = tensors[name].shape
            tensors[f"{name}_scale_inv"] = torch.full((rows // 32, columns // 32), 0.002)
            tensors[name] = (tensors[name].float() / 0.002).clamp(-400, 400).to(torch.float8_e4m3fn)

    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    return saved(tmp_path_factory.mktemp("fp8"), "llama", settings, change)


def test_weights_of_4_bits_become_what_their_blocks_say(mxfp4):
    model = load_model(str(mxfp4), config=load_config(str(mxfp4), dequantise=True))
    stored = load_file(mxfp4 / "model.safetensors")
    name = "model.layers.0.mlp.experts.down_proj"
    blocks, scales = stored[f"{name}_blocks"].int(), stored[f"{name}_scales"].int()
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)  # [experts, out, blocks, 32]
    values = torch.where(codes < 8, 1.0, -1.0) * _FP4[codes & 7] * 2.0 ** (scales[..., None] - 127)
    expected = values.flatten(2).transpose(1, 2)
    assert torch.equal(model.get_parameter(name).float(), expected)
    assert getattr(model.config, "quantization_config", None) is None


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_pruned_from_disk_as_in_memory(kind, request):
    source = request.getfixturevalue(kind)
    options = {"calibration": CALIBRATION, "dequantise": True}
    found = {on: prune(source, CONFIG, layers_on=on, **options) for on in ("memory", "disk")}
    assert found["memory"].plan == found["disk"].plan
    dense = load_model(str(source), config=load_config(str(source), dequantise=True))
    expected = slice_state_dict(dense.state_dict(), infer_structure(dense), found["memory"].plan)
    for name, tensor in found["memory"].model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    with torch.no_grad():
        logits = [result.model(token_ids()).logits for result in found.values()]
    assert torch.equal(*logits)


def test_command_line(mxfp4, tmp_path):
    arguments = ["prune", str(mxfp4), str(tmp_path / "out"), "--method", "magnitude", "--pruning-ratio", "0.3"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "--dequantise" in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()
    result = CliRunner().invoke(app, [*arguments, "--dequantise"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert "quantization_config" not in config
    assert config["pruning_config"]["achieved"]["decoder"] >= 0.29


def test_gguf(tmp_path):
    plain, file = tmp_path / "plain", tmp_path / "model.gguf"
    load_model("hf_prune/demo_model").save_pretrained(plain)
    pytest.importorskip("gguf")
    export("hf_prune/demo_model", file, format="gguf", dtype="f32")
    with pytest.raises(StructureError, match=r"model\.gguf is a GGUF file, .*--dequantise"):
        prune(file, CONFIG, calibration=CALIBRATION)
    with pytest.raises(ConfigError, match="gguf weights, which are read as a whole"):
        prune(file, CONFIG, calibration=CALIBRATION, dequantise=True, layers_on="disk")
    found = prune(file, CONFIG, calibration=CALIBRATION, dequantise=True)
    assert found.plan.kept_indices == prune(plain, CONFIG, calibration=CALIBRATION).plan.kept_indices


def test_refused_with_the_cause(fp8, tmp_path):
    with pytest.raises(StructureError, match=r"fp8\).*dequantise=True \(--dequantise\)"):
        prune(fp8, CONFIG, calibration=CALIBRATION)
    config = json.loads((fp8 / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StructureError, match="transformers cannot dequantise gptq"):
        load_config(str(tmp_path), dequantise=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(StructureError, match=r"holds an adapter.*merge_and_unload"):
        prune(adapter, CONFIG)
