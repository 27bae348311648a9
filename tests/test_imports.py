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

# docs/design.md: a folder or file imports only from itself and from those before it.
ORDER = (
    "errors",
    "atomic",
    "reading",
    "format",
    "structure",
    "config",
    "plan",
    "data",
    "latency",
    "layers",
    "memory",
    "gate",
    "calibration",
    "scores",
    "allocation",
    "surgery",
    "vocabulary",
    "repair",
    "report",
    "checkpoint",
    "evaluation",
    "loading",
    "pipeline",
    "modeling",
    "recovery",
    "exporting",
    "cli",
    "vllm",
    "__main__",
)


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


def place(name: str) -> int:
    return ORDER.index(name.partition(".")[0])


def test_imports_go_one_way():
    wrong = [
        f"{name} imports {target}"
        for name, path in modules().items()
        if name
        for target in imports_of(name, path)
        if place(target) > place(name)
    ]
    assert not wrong


def test_the_order_is_of_what_there_is():
    """Nothing in it that is gone, and the parser above finds imports at all."""
    assert set(ORDER) <= {name.partition(".")[0] for name in modules()}
    assert {"errors", "scores", "surgery.pruning"} <= imports_of("pipeline", PACKAGE / "pipeline.py")


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
