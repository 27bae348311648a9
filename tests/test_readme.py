"""Documents and examples run: all Python and every command line in them, on a tiny model called `my-model`."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from hf_prune.cli.main import app
from hf_prune.config import WandaConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "docs/quickstart.md", "docs/cli.md", "docs/calibration.md")
PAGES = (
    "README.md",
    "docs/quickstart.md",
    "docs/cli.md",
    "docs/methods.md",
    "docs/calibration.md",
    "docs/llm_pruner.md",
    "docs/policy_gradient.md",
    "docs/prunenet.md",
    "docs/obs.md",
    "docs/repair.md",
    "docs/allocation.md",
    "docs/recovery.md",
    "docs/serving.md",
    "docs/design.md",
    "docs/changelog.md",
    "docs/contributing.md",
)


def blocks(document, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What the documents take for granted: a model, two texts and a settings file."""
    folder = tmp_path_factory.mktemp("readme")
    tiny.write_checkpoint(folder / "my-model", max_position_embeddings=512)
    tiny.write_text(folder / "calibration.txt", 128 * 256, seed=1)
    tiny.write_text(folder / "evaluation.txt", 600, seed=2)
    (folder / "settings.json").write_text(WandaConfig(0.2).to_json().replace('"wanda"', '"random"'))
    return folder


@pytest.mark.parametrize(
    "document", [pytest.param(name, marks=pytest.mark.slow) if name == "docs/cli.md" else name for name in DOCUMENTS]
)
def test_command_lines_run(document, material, monkeypatch):
    monkeypatch.chdir(material)
    lines = [line for block in blocks(document, "bash") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("hf-prune ")]
    assert commands
    for command in commands:
        result = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
        assert result.exit_code == 0, (command, result.output)


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if blocks(name, "python")])
def test_python_blocks_run(document, material, monkeypatch, capsys):
    monkeypatch.chdir(material)
    names: dict[str, object] = {}
    for block in blocks(document, "python"):
        exec(compile(block, document, "exec"), names)
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    later = {"docs/architectures.md", "docs/results.md"}  # made by benchmarks
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            path = (ROOT / page).parent / target
            assert path.is_file() or path.resolve().relative_to(ROOT).as_posix() in later, target


def test_readme_has_a_place_for_results_and_contributing_is_short():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.count("<!-- results -->") == readme.count("<!-- /results -->") == 1
    assert len((ROOT / "docs/contributing.md").read_text(encoding="utf-8").splitlines()) <= 60


def _example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_example_prune_and_save(material, tmp_path, capsys):
    texts = {"calibration": str(material / "calibration.txt"), "evaluation": str(material / "evaluation.txt")}
    _example("prune_and_save")(str(material / "my-model"), tmp_path / "pruned", **texts, num_samples=2)
    assert "removed 20" in capsys.readouterr().out
    assert "perplexity" in (tmp_path / "pruned" / "README.md").read_text()


def test_example_prune_global(material, tmp_path, capsys):
    texts = {"calibration": str(material / "calibration.txt"), "evaluation": str(material / "evaluation.txt")}
    _example("prune_global")(str(material / "my-model"), **texts, picture=tmp_path / "widths.png", num_samples=2)
    assert capsys.readouterr().out.count("│ global") == 4
    assert (tmp_path / "widths.png").is_file()
