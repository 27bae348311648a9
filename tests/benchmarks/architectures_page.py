"""docs/architectures.md and docs/architectures.json from the results of architectures.py."""

from __future__ import annotations

import json
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

LAWS = ("identity", "masked", "count", "reload", "tokens")

_HEAD = """# Architectures

Every causal LM type that transformers registers, checked on a small random model (hidden size 48, 4 layers) by
[`tests/benchmarks/architectures.py`](../tests/benchmarks/architectures.py), which writes this page:

    python tests/benchmarks/architectures.py                   # everything
    python tests/benchmarks/architectures.py --coinciding      # the last column: sizes that coincide
    python tests/benchmarks/architectures.py --only llama opt  # some; printed, nothing written

transformers {transformers}, torch {torch}, Python {python}, {minutes:.0f} minutes of one core.

| | model types |
|---|---|
| registered | {total} |
| MLP and attention axes inferred and prunable | {inferred} |
| of these, every law holds | {passed} |
| of these, no axis is inexact, so that masked = sliced was checked on all | {exact} |
| only one kind of axis, or only one that the code lets go, and every law holds | {one_kind} |
| of these, there is no attention to prune: no softmax in a forward pass | {no_attention} |
| cannot be pruned, or a law is broken: the last column says what is in the way | {others} |
| of {alike} that were run with sizes that coincide too (64 and 8): every law holds | {coinciding} |
| of {inspected} with `inspect --verify` on saved weights: it ended cleanly, no difference, no traceback | {clean} |
| of these, at least one kind of axes was proved, the others refused with their cause | {proved} |

Laws, on two random plans over all attention, MLP and expert axes (weights and biases random, none zero):

1. **identity**: a plan that keeps all units changes no bit of any tensor or logit;
2. **masked**: the dense model with units masked has the logits of the sliced one: in float64, within 1e-9 of the
   largest logit, while the plan changes the logits by more than 1e-6 of it. Axes that a norm mixes are left out
   (*inexact*: removing differs from masking); for them the other laws hold. "–": there are only inexact axes;
3. **count**: predicted parameters = actual ones;
4. **reload**: `save_pretrained`, then `AutoModelForCausalLM.from_pretrained`: equal tensors, logits within 1e-5;
5. **tokens**: the same 8 greedy tokens after reloading, with and without cache.

*Widths* says how config.json holds them: attributes found by probing, or `surgery` where no attribute can (the layer
is built, then resized by the loader). Axes that the code does not let go are found by taking one unit of each family
away: they count as not prunable, with the cause. *Removal* tells whether a whole layer (L), only its attention (A) or
only its MLP (M) was removed from the small model, with masked = sliced; it is not needed for passing. *Alike*: the laws
on sizes that coincide ("–": not run, or no such model can be built). *Verify*: how many kinds of axes `hf-prune inspect
MODEL --verify` proved on the model in files ("–": none; refusals are among the remarks).
"""

_ONE_KIND = """Types with one kind of axes only:

| model type | what it lacks, and why |
|---|---|"""

_COLUMNS = (
    "| model type | attention | MLP | experts | widths | identity | masked | count | reload | tokens | removal "
    "| alike | verify | remarks |"
)


def write_page(found: list[dict[str, Any]], docs: Path, *, coinciding: bool) -> None:
    """Join what was found with what is in `docs`, and write both files there."""
    import torch
    import transformers

    path = docs / "architectures.json"
    known = {r["model_type"]: r for r in json.loads(path.read_text(encoding="utf-8"))["model_types"]}
    for result in found:
        name = result["model_type"]
        before = {key: value for key, value in known.get(name, {}).items() if key != "error"}
        if coinciding:
            known[name] = {**before, "alike": {**(before.get("alike") or {}), **result}}
        else:
            known[name] = {**({} if "laws" in result else before), **result, "alike": before.get("alike")}
    results = [known[name] for name in sorted(known)]
    both = [r for r in results if _prunable(r, "attention") and _prunable(r, "mlp")]
    one = [r for r in results if r not in both and (_prunable(r, "attention") or _prunable(r, "mlp"))]
    summary = {
        "total": len(results),
        "inferred": len(both),
        "passed": sum(passes(r) for r in both),
        "exact": sum(passes(r) and not r["attention"]["inexact"] + r["mlp"]["inexact"] for r in both),
        "one_kind": sum(passes(r) for r in one),
        "no_attention": sum(passes(r) and not r.get("attends", True) for r in one),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "minutes": sum(r["seconds"] for r in results) / 60,
        "alike": sum(bool(r.get("alike")) for r in results),
        "coinciding": sum(bool(r.get("alike")) and passes(r["alike"]) for r in results),
        "inspected": sum("verify" in r for r in results),
        "clean": sum("proved" in r.get("verify", ()) for r in results),
        "proved": sum(bool(r.get("verify", {}).get("proved")) for r in results),
    }
    summary["others"] = summary["total"] - summary["passed"] - summary["one_kind"]
    causes = [f"| {r['model_type']} | {_missing(r)} |" for r in one]
    lines = [_HEAD.format(**summary), _ONE_KIND, *causes, "", _COLUMNS, "|" + "---|" * (_COLUMNS.count("|") - 1)]
    lines += [_row(result) for result in sorted(results, key=lambda r: str(r["model_type"]))]
    (docs / "architectures.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = json.dumps({"summary": summary, "model_types": results}, indent=1, ensure_ascii=False)
    (docs / "architectures.json").write_text(data + "\n", encoding="utf-8")


def _missing(result: dict[str, Any]) -> str:
    """Why a type has only one kind of axis."""
    kind = "MLP" if _prunable(result, "attention") else "attention"
    if kind == "attention" and not result.get("attends", True):
        return "has no attention to prune"
    return _cell(f"{kind}: {'; '.join(result[kind.lower()]['blockers'][:1]) or 'none found'}")


def passes(result: dict[str, Any]) -> bool:
    """Whether every law that applies holds."""
    laws = result["laws"]
    return "error" not in result and all(
        laws.get(name, "missing" if name != "masked" else "ok").startswith(("ok", "none")) for name in LAWS
    )


def _prunable(result: dict[str, Any], kind: str) -> int:
    return int(result.get(kind, {}).get("prunable", 0))


def _row(result: dict[str, Any]) -> str:
    laws = [_law(result, name) for name in LAWS]
    axes = [_axes(result, kind) for kind in ("attention", "mlp", "expert")]
    cells = [str(result["model_type"]), *axes, _widths(result), *laws]
    return "| " + " | ".join([*cells, _removal(result), _alike(result), _verify(result), _remarks(result)]) + " |"


def _alike(result: dict[str, Any]) -> str:
    alike = result.get("alike")
    return "–" if not alike or "error" in alike else "✓" if passes(alike) else "✗"


def _verify(result: dict[str, Any]) -> str:
    found = result.get("verify", {})
    return "✗" if "failed" in found else str(len(found.get("proved", ())) or "–")


def _axes(result: dict[str, Any], kind: str) -> str:
    found = result.get(kind)
    if not found or not found["axes"]:
        return "–"
    names = ", ".join(f"`{name}`" for name in found["families"]) if found["families"] != [kind] else ""
    count = f"{found['prunable']}" if found["prunable"] == found["axes"] else f"{found['prunable']} of {found['axes']}"
    inexact = f", {found['inexact']} inexact" if found["inexact"] else ""
    return f"{count}{inexact} {names}".strip()


def _widths(result: dict[str, Any]) -> str:
    knobs = [f"`{knob}`" for knob in dict.fromkeys(result.get("knobs", {}).values())]
    return ", ".join([*knobs, *(["surgery"] if result.get("surgery") else [])]) or "–"


def _law(result: dict[str, Any], name: str) -> str:
    outcome = result["laws"].get(name)
    return "–" if outcome is None or outcome.startswith("none") else "✓" if outcome == "ok" else "✗"


def _removal(result: dict[str, Any]) -> str:
    names = {"layers": "L", "layers.attention": "A", "layers.mlp": "M"}
    return (
        " ".join(f"{short}{'✓' if result['removal'].get(name) == 'ok' else '✗'}" for name, short in names.items())
        if result.get("removal")
        else "–"
    )


def _remarks(result: dict[str, Any]) -> str:
    remarks = [result["error"]] if "error" in result else []
    alike = result.get("alike") or {"laws": {}}
    remarks += [f"{name}: {outcome}" for name, outcome in result["laws"].items() if outcome != "ok"]
    remarks += [
        f"alike: {name}: {outcome}"
        for name, outcome in alike["laws"].items()
        if outcome != "ok" and not outcome.startswith("none")
    ]
    verify = result.get("verify", {})
    remarks += [f"verify: {kind}: {why}" for kind, why in verify.get("refused", {}).items()]
    remarks += [f"verify: {verify['failed']}"] if "failed" in verify else []
    for kind in ("attention", "mlp", "expert"):
        remarks += [f"{kind}: {why}" for why in result.get(kind, {}).get("blockers", [])]
    if unsupported_ops := result.get("unsupported_ops"):
        remarks.append("without rule: " + ", ".join(f"`{name}`" for name in unsupported_ops))
    return "; ".join(map(_cell, remarks))


def _cell(text: str) -> str:
    return " ".join(text.split())[:240].replace("|", "\\|")
