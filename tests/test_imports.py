"""Importing is light, public names resolve, and files import only from files above them in the flow."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_prune

PACKAGE = Path(hf_prune.__file__).parent
HEAVY = ("torch", "transformers", "peft", "datasets", "matplotlib", "lm_eval", "numpy", "rich", "typer")

# docs/design.md: a stage imports from earlier stages and from itself. The first prefix that fits counts.
STAGES = {
    "checkpoint.per_layer": 0,  # the leaves: nothing of ours but errors; surgery and structure build with them
    "errors": 0,
    "atomic": 0,
    "reading": 0,
    "structure": 1,
    "checkpoint.loud": 2,  # surgery asks it
    "config": 1,
    "data": 1,
    "plan": 2,
    "latency": 2,  # a table of numbers
    "layers": 3,  # what runs layers
    "memory": 3,
    "calibration": 4,
    "methods": 4,
    "allocation": 5,
    "surgery": 6,
    "gate": 4,
    "vocabulary": 7,
    "repair": 7,
    "evaluation.perplexity": 7,
    "evaluation.speed": 7,
    "evaluation.latency": 7,  # prune() measures where the budget is time
    "evaluation.report": 7,  # draws the pictures that checkpoints carry
    "checkpoint": 8,
    "loading": 8,
    "pipeline": 9,
    "modeling": 10,
}
LAST = 11  # evaluation, recovery, export, command line: on top of everything


def modules() -> dict[str, Path]:
    """Dotted name without `hf_prune.` → file; packages by their name, the top level as ''."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(name: str, path: Path) -> set[str]:
    """Modules of ours that a file imports, also inside of functions; not those under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            targets = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            continue
        found |= {target.removeprefix("hf_prune.") for target in targets if target.startswith("hf_prune.")}
    return {_module(target) for target in found} - {""}


def _module(target: str) -> str:
    known = modules()
    while target and target not in known:  # `from hf_prune.checkpoint import per_layer`, or a name inside of a module
        target = target.rpartition(".")[0]
    return target


def stage(name: str) -> int:
    fitting = [prefix for prefix in STAGES if f"{name}.".startswith(f"{prefix}.")]
    return STAGES[max(fitting, key=len)] if fitting else LAST


def test_imports_go_one_way():
    wrong = [
        f"{name} (stage {stage(name)}) imports {target} (stage {stage(target)})"
        for name, path in modules().items()
        if name
        for target in imports_of(name, path)
        if stage(target) > stage(name)
    ]
    assert not wrong


def test_the_stages_are_seen():
    """The parser above finds imports at all."""
    assert {"errors", "methods", "surgery.pruning"} <= imports_of("pipeline", PACKAGE / "pipeline.py")
    assert stage("surgery.slicing") == 6
    assert stage("checkpoint.saving") == 8
    assert stage("checkpoint.per_layer") == 0


def test_nothing_is_called_utils():
    names = [path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*")]
    assert not [name for name in names if "util" in name.lower() or "helper" in name.lower()]


def test_import_is_light():
    code = f"import sys, hf_prune; print([m for m in {HEAVY} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", hf_prune.__all__)
def test_public_names_resolve(name):
    value = getattr(hf_prune, name)
    assert value.__name__ == name
    assert value.__doc__


def test_public_names_are_listed_once_and_unknown_ones_refused():
    assert hf_prune.__all__ == sorted(hf_prune.__all__)
    assert set(hf_prune._WHERE) == set(hf_prune.__all__)
    assert set(hf_prune.__all__) <= set(dir(hf_prune))
    with pytest.raises(AttributeError, match="no attribute 'Prune'"):
        _ = hf_prune.Prune
