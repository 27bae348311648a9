"""Hostile checkpoints × all loaders: refused by one type of error, or the same model, in bounded time and memory."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import make_plan, tiny_model
from pruned import pruned_llama
from safetensors.torch import load_file, save_file

from hf_prune.checkpoint.files import CODE_NAME, PLAN_NAME
from hf_prune.checkpoint.save_hook import install_save_hook
from hf_prune.format.per_layer import DIGESTS
from hf_prune.structure.inference import infer_structure
from hf_prune.surgery.pruning import apply_plan

if TYPE_CHECKING:
    from collections.abc import Iterator

REPOSITORY = Path(__file__).parents[1]
PER_BASE = 64
INDEX = "model.safetensors.index.json"
SECTIONS = ("pruning_config", "per_layer_config", DIGESTS)
OF_A_DENSE_MODEL = ("hidden_size", "n_embd", "n_head", "num_hidden_layers", "n_layer", "vocab_size", "rms_norm_eps")
OTHERS = ("auto_map", "architectures", "model_type", *OF_A_DENSE_MODEL)
GONE = object()
WRONG = (None, True, -1, 0, 10**12, 10**30, 1.5, math.nan, "x", "../x", [], {}, [0], {"x": 1}, [[[]]], GONE)
ATTRIBUTES: dict[str, Any] = {
    "forward": 5, "_hf_hook": 5, "use_kernels": True, "training": True, "config": {}, "__class__": 5, "__dict__": {},
    "_keys_to_ignore_on_load_missing": [".*"], "_tied_weights_keys": {"a": "b"}, "save_pretrained": 5, "scaling": 3.0,
    "_forward_pre_hooks": {}, "num_heads": 1, "split_size": 10**12, "head_dim": 1, "layer_idx": 0, "weight": 1,
    "hidden_size": 8, "is_causal": False, "_is_hf_initialized": True,
}  # fmt: skip


# --- bases ------------------------------------------------------------------------------------------------------------


def save_bases(root: Path) -> None:
    """Widths by `per_layer_config`; everything by surgery, ALiBi selected; attributes and a removed branch; shards."""
    install_save_hook()
    pruned_llama()[0].save_pretrained(root / "llama/good")
    pruned_llama(uniform=True)[0].save_pretrained(root / "sharded/good", max_shard_size=40_000)
    for family, kept in (
        ("bloom", {"layers.0.attention": (0, 2, 3), "layers.1.mlp": tuple(range(100)), "layers.attention": (0, 1)}),
        ("gpt2", {"layers.1.attention": (1, 2), "layers.0.mlp": tuple(range(7, 50)), "layers.mlp": (0, 1)}),
    ):
        dense = tiny_model(family, dtype=torch.float32)
        structure = infer_structure(dense)
        plan = make_plan(structure, kept)
        pruned = apply_plan(dense, structure, plan)
        pruned._pruning_plan = plan
        pruned.save_pretrained(root / family / "good")


# --- what is changed --------------------------------------------------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON value, inner ones too; of long lists the first and last entries."""
    found = [path] if path else []
    if isinstance(value, dict):
        children: list[Any] = list(value)
    else:
        children = sorted({0, 1, len(value) - 1} & set(range(len(value)))) if isinstance(value, list) else []
    return found + [leaf for child in children for leaf in leaves(value[child], (*path, child))]


def changed(document: Any, path: tuple[Any, ...], new: Any) -> Any:
    result = copy.deepcopy(document)
    owner = result
    for key in path[:-1]:
        owner = owner[key]
    if new is GONE:
        del owner[path[-1]]
    else:
        owner[path[-1]] = new
    return result


def replacements(value: Any, rng: random.Random) -> list[Any]:
    near = [value + 1, value - 1, value * 2] if type(value) is int else []
    if isinstance(value, list) and value:
        near += [value[::-1], value[:-1], [*value, value[-1]]]
    if isinstance(value, dict):
        near += [{**value, "x": 1}]
    return [new for new in (*rng.sample(near, min(2, len(near))), *rng.sample(WRONG, 3)) if new is not value]


def write(good: Path, case: Path, name: str, text: str | None) -> None:
    """A copy of `good` by links, with one file replaced (or gone)."""
    case.mkdir()
    for path in good.iterdir():
        if path.name != name:
            os.link(path, case / path.name)
    if text is not None:
        (case / name).write_text(text)


def mutations(good: Path, rng: random.Random) -> list[tuple[str, str, str | None]]:
    """(what, file, its new text)."""
    config = json.loads((good / "config.json").read_text())
    found: list[tuple[str, str, str | None]] = []

    def add(what: str, name: str, document: Any) -> None:
        found.append((what, name, json.dumps(document)))

    for name in ("config.json", PLAN_NAME, INDEX):
        if not (good / name).exists():
            continue
        document = json.loads((good / name).read_text())
        for path in leaves(document):
            if name == "config.json" and (path[0] not in (*SECTIONS, *OTHERS) or path[1:2] == ("settings",)):
                continue
            value = document
            for key in path:
                value = value[key]
            for new in replacements(value, rng):
                what = f"{'.'.join(map(str, path))} = {'gone' if new is GONE else json.dumps(new)[:40]}"
                add(what, name, changed(document, path, new))
                if name == "config.json" and path[0] != DIGESTS and rng.random() < 0.8:  # as of an older checkpoint
                    old = changed(document, (DIGESTS,), GONE)
                    found[-1] = (f"old: {what}", name, json.dumps(changed(old, path, new)))
    rng.shuffle(found)
    found = found[:PER_BASE]
    plain = {key: value for key, value in config.items() if key != DIGESTS}
    attention = {"bloom": "transformer.h.0.self_attention", "gpt2": "transformer.h.1.attn"}
    for number, (attribute, value) in enumerate(ATTRIBUTES.items()):
        path = "" if number % 4 == 3 else attention.get(good.parent.name, "model.layers.0.self_attn")
        hostile = copy.deepcopy(plain)
        modules = hostile["pruning_config"].setdefault("surgery", {}).setdefault("modules", {})
        modules.setdefault(path, {}).setdefault("attributes", {})[attribute] = value
        add(f"old: {path!r}.{attribute} = {value!r}", "config.json", hostile)
    for path in leaves(plain):
        if path[-1] == "kept":  # as many units, but others
            add(f"old: {'.'.join(path)} = others", "config.json", changed(plain, path, [0, 1, 3]))
    for name in ("config.json", PLAN_NAME, INDEX, CODE_NAME):
        if (good / name).exists():
            text = (good / name).read_text()
            found += [(f"{what} {name}", name, new) for what, new in (
                ("no", None), ("empty", ""), ("cut", text[: len(text) // 2]), ("a list", "[]"), ("deep", "[" * 10**5),
            )]  # fmt: skip
    marker = good.parents[2] / "code_ran"
    found.append(("hostile code", CODE_NAME, f"open({str(marker)!r}, 'w')\n"))
    return found


def special_files(good: Path, case: Path, name: str, kind: str) -> None:
    write(good, case, name, None)
    if kind == "pipe":
        os.mkfifo(case / name)
    else:
        (case / name).symlink_to("/dev/zero")


def changed_tensors(good: Path, root: Path) -> Iterator[str]:
    """Copies of `good` without a tensor, with one more, with one of another shape, with half a file; their names."""
    name = sorted(path.name for path in good.glob("*.safetensors"))[0]
    tensors = load_file(good / name)
    chosen = next(key for key, tensor in tensors.items() if tensor.dim() == 2 and "mlp" in key)
    for what, new in (
        ("missing", {key: tensor for key, tensor in tensors.items() if key != chosen}),
        ("extra", tensors | {"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}),
        ("narrow", tensors | {chosen: tensors[chosen][:-1].contiguous()}),
    ):
        write(good, root / f"tensor_{what}", name, None)
        save_file(new, root / f"tensor_{what}" / name, {"format": "pt"})
        yield f"tensor_{what}"
    write(good, root / "tensor_cut", name, None)
    (root / "tensor_cut" / name).write_bytes((good / name).read_bytes()[:-100])
    yield "tensor_cut"


# --- what becomes of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """Bases and cases on disk, and what each loader made of each."""
    root = tmp_path_factory.mktemp("hostile")
    save_bases(root / "all")
    descriptions: dict[tuple[str, str], str] = {}
    for base in sorted((root / "all").iterdir()):
        good, rng = base / "good", random.Random(base.name)
        for number, (what, name, text) in enumerate(mutations(good, rng)):
            case = base / f"{number:03d}"
            write(good, case, name, text)
            descriptions[base.name, case.name] = f"{name}: {what}"
        for name in ("config.json", PLAN_NAME, INDEX, CODE_NAME):
            for kind in ("pipe", "device"):
                if (good / name).exists():
                    case = base / f"{kind}_{name}"
                    special_files(good, case, name, kind)
                    descriptions[base.name, case.name] = f"{kind} {name}"
        for name in changed_tensors(good, base):
            descriptions[base.name, name] = name
    processes = {mode: start(root, mode) for mode in ("own", "remote")}
    outputs = {}
    for mode, process in processes.items():
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
        outputs[mode] = json.loads(output.splitlines()[-1])
    return root, descriptions, outputs


def start(root: Path, mode: str) -> subprocess.Popen[str]:
    directory = root / "all"
    if mode == "remote":  # where the code is not what was saved it is the user's trust that counts
        directory = root / "remote"
        shutil.copytree(root / "all", directory, copy_function=os.link, ignore=_no_pipes, symlinks=True)
        for base in directory.iterdir():
            for case in base.iterdir():
                code, good = case / CODE_NAME, base / "good" / CODE_NAME
                if not good.exists() or not code.exists() or code.read_bytes() != good.read_bytes():
                    shutil.rmtree(case) if case.name != "good" else None
            if not any(case.name != "good" for case in base.iterdir()):
                shutil.rmtree(base)
    environment = os.environ | {
        "HF_HUB_CACHE": str(root / "hub"), "HF_MODULES_CACHE": str(root / f"modules_{mode}"), "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(REPOSITORY) if mode == "own" else "",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests/hostile.py"), str(directory), mode],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=root,
    )  # fmt: skip


def _no_pipes(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if name.startswith(("pipe_", "device_")) and not name.endswith("_config.json")]


@dataclass(frozen=True)
class Outcome:
    base: str
    what: str
    loader: str
    outcome: str
    detail: str

    @property
    def of_a_dense_model(self) -> bool:
        """A change that the config of a dense model could carry too: other logits may be what it asks for."""
        return any(f"config.json: {prefix}{key} =" in self.what for key in OF_A_DENSE_MODEL for prefix in ("", "old: "))

    @property
    def unreadable(self) -> bool:
        """transformers looks at these first, and refuses by errors of its own."""
        broken = ("no", "empty", "cut", "a list", "deep")
        keys = ("auto_map", "model_type")
        if self.what in ("pipe config.json", "device config.json"):  # it takes them for missing
            return True
        return any(self.what == f"config.json: {how} config.json" for how in broken) or any(
            f"{prefix}{key}" in self.what for key in keys for prefix in ("config.json: ", "old: ")
        )

    @property
    def unknowable(self) -> bool:
        """Units that an input is cut to: in an older checkpoint only the plan says which they were."""
        return "old: " in self.what and "select_inputs" in self.what


def outcomes(harness, mode):
    _, descriptions, outputs = harness
    for result in outputs[mode]["results"]:
        result = dict(result)
        base, case = result.pop("base"), result.pop("case")
        what = "good" if case == "good" else descriptions[base, case]
        for loader, (outcome, detail, _) in result.items():
            yield Outcome(base, what, loader, outcome, detail)


def report(wrong):
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(map(str, wrong[:40]))


def test_own_loaders_refuse_by_one_error_or_give_the_same_model(harness):
    found = list(outcomes(harness, "own"))
    allowed = [
        one.outcome == "refused"
        or (one.outcome, one.detail) == ("same", "")
        or (one.of_a_dense_model and one.outcome in ("same", "other"))
        or (one.unreadable and one.loader in ("auto", "hub") and one.outcome.startswith("load: "))
        for one in found
    ]
    report([one for one, fits in zip(found, allowed, strict=True) if not fits])
    assert len({(one.base, one.what) for one in found}) >= 400
    assert all(one.outcome == "same" for one in found if one.what == "good")
    report(
        [
            one
            for one in found
            if one.what.startswith("tensor_") and one.outcome != "refused" and "extra" not in one.what
        ]
    )
    assert sum(one.outcome == "refused" for one in found) > len(found) // 2


def test_the_remote_code_file_refuses_or_gives_the_same_model(harness):
    """transformers alone reads the config: what it cannot take it refuses by errors of its own."""
    found = list(outcomes(harness, "remote"))
    allowed = [
        one.outcome == "refused"
        or (one.outcome, one.detail) == ("same", "")
        or one.outcome.startswith("load: ")
        or (one.of_a_dense_model and one.outcome in ("same", "other"))
        or one.unknowable
        or ("old: " in one.what and one.outcome.startswith("forward: "))  # late, but not silent
        for one in found
    ]
    report([one for one, fits in zip(found, allowed, strict=True) if not fits])
    assert len(found) >= 150
    assert all(one.outcome == "same" for one in found if one.what == "good")
    assert sum(one.outcome == "refused" for one in found) > len(found) // 3


def test_no_code_is_run_and_memory_is_bounded(harness):
    root, _, outputs = harness
    assert not (root / "code_ran").exists()
    assert all(outputs[mode]["grown_mb"] < 600 for mode in ("own", "remote"))
    assert not [one for one in outcomes(harness, "own") if "TimeoutError" in one.outcome + one.detail]
