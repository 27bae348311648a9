"""Check every causal LM type that transformers registers; write docs/architectures.md and docs/architectures.json.

python tests/benchmarks/architectures.py                  # all types, about 20 minutes on one core
python tests/benchmarks/architectures.py --only llama opt # some, printed; the documents stay as they are
python tests/benchmarks/architectures.py --only llama opt --write # some, anew in the documents
python tests/benchmarks/architectures.py --verify         # axes and `inspect --verify` only, the laws as they are known
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import signal
import sys
import tempfile
import time
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from small_configs import coincide, small_config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from typer.testing import CliRunner

from hf_prune.checkpoint.save_hook import install_save_hook
from hf_prune.cli.main import app
from hf_prune.config import RandomConfig
from hf_prune.errors import HFPruneError
from hf_prune.format import per_layer
from hf_prune.format.building import auto_class
from hf_prune.layers.masking import masked
from hf_prune.plan import PruningPlan, counted_units
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruned_config import unresizable
from hf_prune.surgery.pruning import apply_plan
from hf_prune.surgery.width_attributes import family, find_width_attributes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hf_prune.structure.axes import Axis, Structure

DOCS = Path(__file__).parents[2] / "docs"
TIME_CAP_S = 120
SEEDS = (0, 1)
TOLERANCE = 1e-9  # of the largest logit, in float64
LAWS = ("identity", "masked", "count", "reload", "tokens")
NUM_NEW_TOKENS = 8


class BrokenLawError(Exception):
    """A law that does not hold, and the numbers that show it."""


def main() -> None:
    """Check, print and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="check these model types, print, write nothing")
    parser.add_argument("--write", action="store_true", help="write those of --only into the documents")
    parser.add_argument("--coinciding", action="store_true", help="sizes that coincide: joined with what is known")
    parser.add_argument("--verify", action="store_true", help="axes and inspect --verify only; the laws as known")
    parser.add_argument("--part", default="0/1", help="every n-th type from the k-th: k/n; joined with what is known")
    arguments = parser.parse_args()
    only, (part, parts) = arguments.only, map(int, arguments.part.split("/"))
    quiet()
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[part::parts]
    coincide(arguments.coinciding)
    results = []
    for name in tqdm(names, disable=only is not None):
        results.append(check(name, laws=not arguments.verify))
        if only:
            print(json.dumps(results[-1], indent=None, ensure_ascii=False), flush=True)
    if not only or arguments.write:
        from architectures_page import write_page

        write_page(results, DOCS, coinciding=arguments.coinciding)


def quiet() -> None:
    """One thread, no warnings: the page shows what matters."""
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    per_layer.install()
    install_save_hook()


def check(model_type: str, *, laws: bool = True) -> dict[str, Any]:
    """All that the page says of one model type; without the laws, what has to be written over what is known."""
    result: dict[str, Any] = {"model_type": model_type, **({"laws": {}} if laws else {})}
    start = time.perf_counter()
    try:
        with time_cap(TIME_CAP_S):
            model = small_model(model_type)
            structure = infer_structure(model)
            refused = unresizable(model.config, structure, type(model))
            axes = {n: replace(a, blocker=a.blocker or refused.get(family(a), "")) for n, a in structure.axes.items()}
            structure = replace(structure, axes=axes)
            describe(result, model, structure)
            result["verify"] = inspected(model)
            if laws:
                check_laws(result, model, structure)
    except HFPruneError as error:
        result["error"] = str(error)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    if laws:
        result["seconds"] = round(time.perf_counter() - start, 1)
    return result


@contextmanager
def time_cap(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in the block after `seconds`."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"took more than {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def small_model(model_type: str) -> Any:
    """A small random model; noise on every parameter, so that no bias is zero and no norm weight one."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = small_config(model_type)
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.generation_config.eos_token_id = None
    return model


def describe(result: dict[str, Any], model: Any, structure: Structure) -> None:
    """Axes and where their widths are written."""
    result["class"] = type(model).__name__
    result["layers"] = len(structure.layer_paths)
    result["unsupported_ops"] = structure.unsupported_ops
    inner = {axis.block: axis for axis in structure.axes_of("query_heads") if axis.prunable}
    for kind in ("attention", "mlp", "expert"):
        axes = [inner.get(axis.name, axis) if axis.blocker else axis for axis in structure.axes_of(kind)]
        result[kind] = {
            "axes": len(axes),
            "prunable": sum(axis.prunable for axis in axes),
            "inexact": sum(axis.prunable and not axis.exact for axis in axes),
            "families": sorted({family(axis) for axis in axes}),
            "blockers": sorted({axis.blocker for axis in axes if axis.blocker})[:3],
        }
    result["attends"] = bool(result["attention"]["axes"]) or attends(model)
    hidden = structure.axes.get("hidden")
    result["hidden"] = "none" if hidden is None else hidden.blocker or "yes"
    knobs = find_width_attributes(model.config, structure, type(model))
    result["knobs"] = {name: str(knob) for name, knob in knobs.items()}


def attends(model: Any) -> bool:
    """Whether a forward pass weighs by a softmax: models without it have no attention to prune."""
    with Operations() as seen:
        logits(model, torch.arange(2, 11)[None])
    return any("softmax" in name or "logsumexp" in name for name in seen.names)


class Operations(TorchDispatchMode):
    """Names of the operations that ran."""

    names: frozenset[str] = frozenset()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note the name, and run it."""
        self.names |= {str(func)}
        return func(*args, **(kwargs or {}))


def inspected(model: Any) -> dict[str, Any]:
    """What `hf-prune inspect --verify` says of the model in files: kinds that it proves, and its refusals by kind.

    Neither of these is a failure: a difference, or a traceback.
    """
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        done = CliRunner().invoke(app, ["inspect", directory, "--verify", "--json"])
    if done.exit_code == 0:
        rows = json.loads(done.stdout)["verification"]
        refused = {row["kind"]: row["refused"] for row in rows if row["refused"]}
        return {"proved": [row["kind"] for row in rows if row["equal"]], "refused": refused}
    if done.exit_code == 2:
        return {"proved": [], "refused": {"all": " ".join(done.output.split()).replace(directory, "MODEL")}}
    return {"failed": f"exit code {done.exit_code}: {done.exception!r} {done.output[-300:]}"}


# --- laws -----------------------------------------------------------------------------------------------------------


def check_laws(result: dict[str, Any], model: Any, structure: Structure) -> None:
    """Each law that holds is "ok"; otherwise what is in the way."""
    laws = result["laws"]
    ids = torch.randint(2, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    noted(laws, "identity", lambda: identity(model, structure, ids))
    plans = [random_plan(structure, seed) for seed in SEEDS]
    if not any(plan.kept_indices for plan in plans):
        return
    pruned: list[Any] = []
    for plan in plans:
        noted(laws, "count", lambda plan=plan: pruned.append(counted(model, structure, plan)))
    result["surgery"] = any("surgery" in small.config.pruning_config for small in pruned)
    for small in pruned:
        noted(laws, "reload", lambda small=small: reloaded(small, ids, laws))
    if laws.get("tokens", "ok") != "ok" and not generates(model, ids):
        laws["tokens"] = "none: the dense model does not generate either"
    if laws.get("count") != "ok":
        return
    double = model.double()
    errors: list[float] = []
    for seed, small in zip(SEEDS, pruned, strict=True):
        plan = random_plan(structure, seed, exact=True)
        if plan.kept_indices:
            sliced = small.double() if plan == plans[seed] else None
            noted(
                laws, "masked", lambda p=plan, s=sliced: errors.append(masked_is_sliced(double, structure, p, ids, s))
            )
    result["masked_error"] = max(errors, default=None)
    removal: dict[str, str] = {}
    for axis in ("layers", "layers.attention", "layers.mlp"):
        plan = removal_plan(structure, axis)
        if plan is None:
            removal[axis] = structure.axes[axis].blocker or "-"
        else:
            noted(removal, axis, lambda plan=plan: masked_is_sliced(double, structure, plan, ids))
    result["removal"] = removal


def noted(laws: dict[str, str], name: str, law: Any) -> None:
    """Run a law; a failure stays noted although a later run passes."""
    try:
        law()
    except TimeoutError:
        raise
    except Exception as error:
        laws[name] = f"{type(error).__name__}: {error}"[:300]
    else:
        laws.setdefault(name, "ok")


def random_plan(structure: Structure, seed: int, exact: bool = False) -> PruningPlan:
    """Random units of every axis of a layer; only of the exact ones if `exact`."""
    rng = random.Random(seed)
    kept: dict[str, tuple[int, ...]] = {}
    for name, axis in structure.axes.items():
        units = random_units(axis, rng)
        fits = axis.branch is not None and axis.prunable and axis.tied not in kept
        if fits and len(units) < axis.num_units and (axis.exact or not exact):
            kept[name] = units
    return plan_of(structure, kept)


def random_units(axis: Axis, rng: random.Random) -> tuple[int, ...]:
    """Random units of an axis, equally many of each of its blocks."""
    each = axis.num_units // axis.num_blocks
    width = max(min(axis.least, each), rng.randint(1, each))
    starts = range(0, axis.num_units, each)
    return tuple(start + unit for start in starts for unit in sorted(rng.sample(range(each), width)))


def removal_plan(structure: Structure, axis: str) -> PruningPlan | None:
    """Remove the last but one layer, or one branch of it."""
    if not structure.axes[axis].prunable:
        return None
    count = structure.axes[axis].num_units
    gone = max(0, count - 2)
    return plan_of(structure, {axis: tuple(i for i in range(count) if i != gone)})


def plan_of(structure: Structure, kept: dict[str, tuple[int, ...]]) -> PruningPlan:
    """A plan with made-up bookkeeping."""
    achieved = {"decoder": 0.1, "model": 0.1, "units": 0.1}
    return PruningPlan(structure.model_type, None, counted_units(structure, kept), kept, RandomConfig(0.3), achieved)


def identity(model: Any, structure: Structure, ids: torch.Tensor) -> None:
    """A plan that keeps all changes not one bit."""
    same = apply_plan(model, structure, plan_of(structure, {}))
    before, after = model.state_dict(), same.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise BrokenLawError("a plan that keeps all units changed a tensor")
    if not torch.equal(logits(model, ids), logits(same, ids)):
        raise BrokenLawError("a plan that keeps all units changed the logits")


def counted(model: Any, structure: Structure, plan: PruningPlan) -> Any:
    """Predicted parameters = actual ones; the model runs."""
    small = apply_plan(model, structure, plan)
    actual, predicted = sum(p.numel() for p in small.parameters()), plan.num_parameters(structure)
    if actual != predicted:
        raise BrokenLawError(f"{actual:,} parameters, predicted {predicted:,}")
    return small


def masked_is_sliced(
    model: Any, structure: Structure, plan: PruningPlan, ids: torch.Tensor, small: Any = None
) -> float:
    """Logits of the dense model with units masked = logits of the sliced model, and unlike those of the dense one."""
    small = small or counted(model, structure, plan)
    with Float64():
        with masked(model, structure, plan):
            of_masked = logits(model, ids)
        of_sliced, of_dense = logits(small, ids), logits(model, ids)
    scale = of_dense.abs().max().item()
    error = (of_masked - of_sliced).abs().max().item() / scale
    change = (of_dense - of_sliced).abs().max().item() / scale
    if not error <= TOLERANCE:
        raise BrokenLawError(f"masked and sliced logits differ by {error:.1e} of the largest")
    if not change > 1e3 * TOLERANCE:
        raise BrokenLawError(f"the plan changes the logits by {change:.1e} of the largest: this shows nothing")
    return error


def reloaded(small: Any, ids: torch.Tensor, laws: dict[str, str]) -> None:
    """Saved and loaded, the model has the same logits and greedy tokens."""
    auto = auto_class(small.config)
    known = type(small.config) in auto._model_mapping  # the text decoders of mllama and emu3 are their own class only
    with tempfile.TemporaryDirectory() as directory:
        small.save_pretrained(directory)
        again = (
            (auto if known else type(small))
            .from_pretrained(directory, attn_implementation="eager", experts_implementation="batched_mm")
            .eval()
        )
    again.generation_config.eos_token_id = None
    if type(again) is not type(small):
        raise BrokenLawError(f"loaded as {type(again).__name__}")
    before, after = small.state_dict(), again.state_dict()
    if before.keys() != after.keys() or not all(torch.equal(before[name], after[name]) for name in before):
        raise BrokenLawError("tensors differ after loading")
    expected = logits(small, ids)
    # Not bit for bit: where the loaded weights lie in memory decides how matrix products are vectorised.
    if not (error := (expected - logits(again, ids)).abs().max().item()) <= 1e-5 * expected.abs().max().item():
        raise BrokenLawError(f"logits differ by {error:.1e} after loading")
    noted(laws, "tokens", lambda: same_tokens(small, again, ids))


def same_tokens(small: Any, again: Any, ids: torch.Tensor) -> None:
    """Greedy tokens before saving and after loading, with and without cache."""
    for use_cache in (True, False):
        if not torch.equal(greedy(small, ids, use_cache), greedy(again, ids, use_cache)):
            raise BrokenLawError(f"greedy tokens differ after loading with use_cache={use_cache}")


def generates(model: Any, ids: torch.Tensor) -> bool:
    """Whether a model generates at all, with and without cache."""
    try:
        return all(greedy(model, ids, use_cache) is not None for use_cache in (True, False))
    except Exception:
        return False


def greedy(model: Any, ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
    """`NUM_NEW_TOKENS` greedy tokens."""
    mask = torch.ones_like(ids)
    tokens: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=NUM_NEW_TOKENS, do_sample=False, use_cache=use_cache
    )
    return tokens


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """`[B, T, V]`."""
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return result


class Float64(TorchFunctionMode):
    """Norms and softmax that ask for float32 get float64, so that rounding does not hide an error."""

    def __enter__(self) -> Float64:
        """Tensors made from numbers are float64 too."""
        torch.set_default_dtype(torch.float64)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """As before."""
        super().__exit__(*error)
        torch.set_default_dtype(torch.float32)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the dtype in arguments."""
        swap = {torch.float32: torch.float64}
        args = tuple(swap.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: swap.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return torch.Tensor.double(*args, **kwargs) if func is torch.Tensor.float else func(*args, **kwargs)


if __name__ == "__main__":
    sys.exit(main())
