"""`hf-prune export`, and docs/serving.md: every command of the page runs, on a tiny model called `my-model`."""

from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from served import byte_tokenizer, save, tiny_served_model
from test_cli import run
from test_output import contents
from tiny import write_text

import hf_prune
from hf_prune.errors import CheckpointError, ConfigError

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4}
    save(folder / "my-model", tiny_served_model("llama", **sizes, head_dim=32))
    write_text(folder / "evaluation.txt", 600, seed=2)
    return folder


@pytest.mark.slow
def test_every_command_of_the_page_runs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    exports = [command for command in commands if command[:2] == ["hf-prune", "export"]]
    assert {command[command.index("--format") + 1] for command in exports} == {"gguf", "plain", "onnx"}
    for command in commands:
        if command[:2] == ["hf-prune", "quantise"] and find_spec("torchao") is None:
            continue
        if command and command[0] == "hf-prune":
            result = run(*command[1:])
            assert result.exit_code == 0, (command, result.output)


def test_the_command_prints_what_it_wrote(folder, tmp_path):
    result = run("export", folder / "my-model", tmp_path / "m.gguf", "--format", "gguf", "--dtype", "q8_0", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["architecture"] == "llama"
    assert values["num_bytes"] == (tmp_path / "m.gguf").stat().st_size
    assert values["num_exported"] == values["num_parameters"]


def test_only_an_earlier_export_is_replaced_and_only_if_asked(folder, tmp_path, monkeypatch):
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    model = folder / "my-model"
    for output, format, said, said_with_overwrite in (
        (model, "plain", "would replace what is read: model", "would replace what is read: model"),
        (folder, "plain", "would replace what is read: model", "would replace what is read: model"),
        (tmp_path / "thesis.tex", "gguf", "no GGUF file", "no GGUF file"),
        (tmp_path / "full", "plain", "holds more than a checkpoint", "holds more than a checkpoint"),
        (tmp_path / "full", "gguf", "no GGUF file", "no GGUF file"),
        (tmp_path / "thesis.tex", "onnx", "is a file", "is a file"),
        (tmp_path / "m.gguf", "gguf", "exists already", ""),
        (tmp_path / "plain", "plain", "holds a checkpoint already", ""),
    ):
        if not said_with_overwrite:
            hf_prune.export(model, output, format=format, dtype="bf16" if format == "gguf" else "bfloat16")
        before = contents(tmp_path)
        for overwrite, words in ((False, said), (True, said_with_overwrite)):
            if words:
                with pytest.raises(CheckpointError, match=words):
                    hf_prune.export(model, output, format=format, overwrite=overwrite)
                assert contents(tmp_path) == before
        if not said_with_overwrite:
            written = hf_prune.export(model, output, format=format, overwrite=True)
            sizes = [path.stat().st_size for path in (output.iterdir() if output.is_dir() else [output])]
            assert written.num_bytes == sum(sizes) > sum(len(before[name]) for name in before if output.name in name)
    with monkeypatch.context() as patched:
        patched.setattr("hf_prune.atomic.shutil.disk_usage", lambda path: type("Usage", (), {"free": 9}))
        for format in ("plain", "gguf", "onnx"):
            with pytest.raises(CheckpointError, match=r"saving needs .* 9 are free"):
                hf_prune.export(model, tmp_path / "new" / "out", format=format)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_onnx_runtime_and_openvino_compute_the_same(tmp_path):
    """Any batch, any length, padding on the left; different heads, odd widths, no attention in a layer."""
    onnxruntime, openvino = pytest.importorskip("onnxruntime"), pytest.importorskip("openvino")
    model = tiny_served_model("qwen2", "no attention")
    path = save(tmp_path / "pruned", model)
    written = hf_prune.export(path, tmp_path / "onnx", format="onnx")
    graph = str(written.path / "model.onnx")
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(openvino.convert_model(graph), "CPU", settings)
    for shape in ((1, 5), (3, 12)):
        ids = torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(0))
        mask = torch.ones_like(ids)
        mask[0, : shape[0] - 1] = 0
        with torch.no_grad():
            expected = model(ids, attention_mask=mask).logits[mask.bool()]
        inputs = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
        for found in (session.run(None, inputs)[0], next(iter(compiled(inputs).values()))):
            assert (torch.from_numpy(found)[mask.bool()] - expected).abs().max() < 1e-4
    assert sorted(entry.name for entry in written.path.iterdir()) == [
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_onnx_without_its_packages_says_what_to_install(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install 'hf_prune\[onnx\]'"):
        hf_prune.export(folder / "my-model", tmp_path / "onnx", format="onnx")
    assert not (tmp_path / "onnx").exists()


def test_tokenizers_of_the_page_are_those_of_the_code():
    from hf_prune.exporting.gguf import _ARCHITECTURES, DTYPES
    from hf_prune.exporting.tokenizer import _SPLITS

    page = PAGE.read_text(encoding="utf-8")
    for name in (*_ARCHITECTURES, *DTYPES, *_SPLITS.values()):
        assert f"`{name}`" in page, name
    assert len(byte_tokenizer()) < 320
