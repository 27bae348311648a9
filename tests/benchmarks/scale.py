"""Memory and time of pruning with the layers of a model on disk, against in memory; and what large models would cost.

    python tests/benchmarks/scale.py --shape 1b                   # llm_pruner and obs, disk against memory: minutes
    python tests/benchmarks/scale.py --shape 7b --directory /big  # 13.5 GB and the pruned model are written there
    python tests/benchmarks/scale.py --shape 7b --obs-layers 2    # and how long obs takes for a layer of this width
    python tests/benchmarks/scale.py --count                      # counted: Llama-3-70B, and a mixture of 235B

Weights are random: time and memory do not depend on their values. Every run is a process of its own, which first prunes
a tiny model both ways, so that all imports are done; memory is what it holds above that (Linux: /proc/self/status).
Numbers go to docs/scale.json (`--out`), the page beside it is made from them.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from safetensors.torch import save_file
from scale_page import write_page
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

import hf_prune.scores.obs as obs
from hf_prune import LLMPrunerConfig, OBSConfig, PruningConfig, infer_structure
from hf_prune.checkpoint.saving import save_pruned
from hf_prune.checkpoint.verifying import verify_checkpoint
from hf_prune.gate import check_model
from hf_prune.layers.boundaries import MEMORY_BYTES
from hf_prune.layers.price import count_price
from hf_prune.layers.statistics import Statistics
from hf_prune.loading import open_model
from hf_prune.pipeline import apply_and_repair, decide
from hf_prune.scores import score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

OUT = Path(__file__).parents[2] / "docs" / "scale.json"
RATIO = 0.3
METHODS: dict[str, type[PruningConfig]] = {"llm_pruner": LLMPrunerConfig, "obs": OBSConfig}
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
SHAPES["7b1"] = SHAPES["7b"] | {"num_hidden_layers": 1}
COUNTED: dict[str, PreTrainedConfig] = {
    "Llama-3-70B": LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
    ),
}
COUNTED_TOKENS = (128, 2048)
RATES = {"disk": 2e9, "passes": 100e12, "gram": 30e12, "solving": 1e12}
"""Bytes per second of a disk; operations per second of a card in bfloat16, in float32, in float64: assumptions."""
INTERVAL = 0.01
"""Seconds between two looks at the memory."""


# --- one run, in a process of its own ---------------------------------------------------------------------------------


@dataclass
class Phase:
    """What one part of a run took: seconds, and bytes above what the process held before."""

    wall: float = 0.0
    cpu: float = 0.0
    peak: int = 0
    anonymous: int = 0
    """Largest part that no file backs."""
    file_backed: int = 0
    """Largest part that is pages of files: the system may drop them."""


@dataclass
class Meter:
    """Watches the memory of this process, and its time, phase by phase."""

    before: dict[str, int] = field(default_factory=dict)
    phases: dict[str, Phase] = field(default_factory=dict)
    peak: Phase = field(default_factory=Phase)
    _now: str = ""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """A thread looks at the memory meanwhile; the system keeps the exact peak."""
        self.before, done = status(), threading.Event()

        def look() -> None:
            while not done.wait(INTERVAL):
                self._look()

        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
        self.peak.peak = max(self.peak.peak, status()["VmHWM"] - self.before["VmRSS"])

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, time and memory count for this phase."""
        self._now, wall, cpu = name, time.perf_counter(), time.process_time()
        found = self.phases.setdefault(name, Phase())
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.wall += time.perf_counter() - wall
        found.cpu += time.process_time() - cpu
        self._look()

    def _look(self) -> None:
        if not self.before:
            return
        now = status()
        for found in (self.peak, self.phases.get(self._now)):
            if found is not None:
                found.peak = max(found.peak, now["VmRSS"] - self.before["VmRSS"])
                found.anonymous = max(found.anonymous, now["RssAnon"] - self.before["RssAnon"])
                found.file_backed = max(found.file_backed, now["RssFile"] - self.before["RssFile"])


def status() -> dict[str, int]:
    """Bytes of memory of this process, by the names of Linux."""
    lines = [line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines()]
    return {line[0][:-1]: int(line[1]) << 10 for line in lines if line[0].startswith(("Vm", "Rss"))}


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Prune one model, save it, and say what that took."""
    torch.set_num_threads(job["threads"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        write_model(SHAPES["tiny"], path / "dense")
        for layers_on in ("disk", "memory"):
            tiny = job | {"model": str(path / "dense"), "pruned": str(path / layers_on), "layers_on": layers_on}
            prune_once(tiny | {"samples": 2, "tokens": 8}, Meter())
    meter = Meter()
    with meter.watching():
        facts = time_obs(job, meter) if job.get("obs_layers") else prune_once(job, meter)
    timed = [phase for name, phase in meter.phases.items() if name in ("score", "prune and repair", "save")]
    return {
        "layers_on": job["layers_on"],
        "method": job["method"],
        **facts,
        "seconds": sum(phase.wall for phase in timed),
        "cpu_seconds": sum(phase.cpu for phase in timed),
        "peak": vars(meter.peak),
        "phases": {name: vars(phase) for name, phase in meter.phases.items()},
        "card_peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
    }


def prune_once(job: dict[str, Any], meter: Meter) -> dict[str, Any]:
    """Load, score, prune and repair, save, load again; what must hold of the result is checked."""
    config = METHODS[job["method"]](RATIO, repair="least_squares")
    with meter.phase("load"):
        model = open_model(job["model"], layers_on=job["layers_on"], device=job["device"])
        structure = infer_structure(model)
    batches = calibration(model, job)
    with meter.phase("score"):
        check_model(model, structure, config, batches)
        plan, _ = decide(model, structure, config, batches)
    with meter.phase("prune and repair"):
        pruned = apply_and_repair(model, structure, plan, config, batches)
    allowed = allowance(model, structure, batches)
    with meter.phase("save"):  # a file is in memory as a whole while it is written
        save_pruned(pruned, job["pruned"], max_shard_size=allowed["layer"])
    del model, pruned
    with meter.phase("load again"):
        verify_checkpoint(job["pruned"])
        again = open_model(job["pruned"], layers_on="disk", device=job["device"])
        with torch.no_grad():
            finite = bool(again(batches[0]["input_ids"][:1].to(job["device"] or "cpu")).logits.isfinite().all())
    assert finite, "the pruned model gives logits that are not finite"
    assert abs(plan.achieved["decoder"] - RATIO) < 0.05, plan.achieved
    size = sum(path.stat().st_size for path in Path(job["pruned"]).glob("*.safetensors"))
    return {"removed": plan.achieved["decoder"], "pruned_bytes": size, "allowance": allowed}


def time_obs(job: dict[str, Any], meter: Meter) -> dict[str, Any]:
    """Score some layers by `obs`: seconds of its sums and eliminations for each."""
    model = open_model(job["model"], layers_on=job["layers_on"], device=job["device"])
    structure = infer_structure(model)
    seconds = [0.0]

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = call(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[0] += time.perf_counter() - start
            return result

        return inner

    obs.costs_of, Statistics.add = timed(obs.costs_of), timed(Statistics.add)  # type: ignore[method-assign]
    layers = tuple(range(job["obs_layers"]))
    batches = calibration(model, job)
    with meter.phase("score"):
        score(model, structure, OBSConfig(RATIO, layers=layers), batches)
    each, number = seconds[0] / len(layers), len(structure.layer_paths)
    total = meter.phases["score"].wall + each * (number - len(layers))
    allowed = allowance(model, structure, batches)
    return {"obs_layers": len(layers), "seconds_each": each, "extrapolated_seconds": total, "allowance": allowed}


def calibration(model: PreTrainedModel, job: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Random tokens, four windows in a batch."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (job["samples"], job["tokens"]), generator=generator)
    return [{"input_ids": own} for own in ids.split(4)]


def allowance(model: PreTrainedModel, structure: Any, batches: list[dict[str, torch.Tensor]]) -> dict[str, int]:
    """Bytes that pruning from disk may take: 2.5 layers, what is outside of them, and hidden states."""
    itemsize = model.get_input_embeddings().weight.element_size()
    layers = [0] * len(structure.layer_paths)
    outside = 0
    for name, parameter in model.named_parameters():
        owner = structure.owners.get(name)
        if owner is None:
            outside += parameter.numel() * itemsize
        else:
            layers[owner.layer] += parameter.numel() * itemsize
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    boundaries = tokens * model.config.hidden_size * itemsize * (len(layers) + 1)
    boundaries = boundaries if boundaries <= MEMORY_BYTES else 0
    total = round(2.5 * max(layers)) + outside + boundaries
    return {"layer": max(layers), "embeddings": outside, "boundaries": boundaries, "total": total}


def write_model(shape: dict[str, int], path: Path) -> None:
    """A random bfloat16 Llama as a checkpoint of one file per layer: never more than one layer in memory."""
    config = LlamaConfig(**shape, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    path.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: tuple(x.shape) for name, x in AutoModelForCausalLM.from_config(config).state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        layer = name.split(".")[2] if ".layers." in name else "outside"
        files.setdefault(f"model-{layer}.safetensors", []).append(name)
    generator, size = torch.Generator().manual_seed(0), 0
    for file, names in files.items():
        tensors = {}
        for name in names:
            values = torch.ones(shapes[name], dtype=torch.bfloat16)
            if values.dim() > 1:
                values.normal_(0, 0.02, generator=generator)
            tensors[name] = values
        size += sum(values.nbytes for values in tensors.values())
        save_file(tensors, path / file, metadata={"format": "pt"})
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: file for file, own in files.items() for name in own},
    }
    (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(path)


# --- all runs ---------------------------------------------------------------------------------------------------------


def in_process(job: dict[str, Any]) -> dict[str, Any]:
    """`run_job` in a process of its own."""
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "OMP_NUM_THREADS": str(job["threads"]),
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, str(Path(__file__)), "--job", json.dumps(job)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    peak, allowed = found["peak"]["peak"] / 1e9, found["allowance"]["total"] / 1e9
    print(
        f"{found['method']:10} {found['layers_on']:6} {found['seconds']:7.0f} s, {found['cpu_seconds']:7.0f} s of CPU, "
        f"peak {peak:.2f} GB, allowance {allowed:.2f} GB"
        + (f"; {found['seconds_each']:.1f} s a layer for obs" if "obs_layers" in found else ""),
        flush=True,
    )
    return found


def circumstances(threads: int, device: str | None) -> dict[str, str]:
    """Where and with what this was measured."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "safetensors"))
    card = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return {
        "machine": f"{cpu}, {os.cpu_count()} cores{card}; {threads} thread(s)",
        "load": f"{os.getloadavg()[0]:.1f} processes wanted a core when the runs began",
        "versions": f"Python {platform.python_version()}, {packages}",
        "date": time.strftime("%Y-%m-%d"),
    }


def counted() -> list[dict[str, Any]]:
    """What pruning large shapes would read, write and compute."""
    rows = []
    samples, length = COUNTED_TOKENS
    for name, config in COUNTED.items():
        structure = infer_structure(config)
        for method, kind in METHODS.items():
            asked = kind(RATIO, repair="least_squares", num_samples=samples, seq_len=length)
            price = count_price(structure, asked, [length] * samples, config.hidden_size, 2)
            layers = [0] * len(structure.layer_paths)
            for tensor, owner in structure.owners.items():
                layers[owner.layer] += structure.numel(tensor)
            inputs = [
                structure.shape(member.parameter)[member.dim]
                for axis in structure.axes.values()
                if axis.kind in ("mlp", "attention")
                for member in structure.members[axis.name]
                if member.role == "consumer"
            ]
            rows.append(
                {
                    "model": name,
                    "method": method,
                    "parameters": structure.num_parameters(),
                    "largest_layer_bytes": 2 * max(layers),
                    "largest_gram_bytes": 8 * max(inputs) ** 2,
                    **vars(price),
                    "bytes_written": price.bytes_written,
                    "disk_hours": (price.bytes_read + price.pruned_bytes_read + price.bytes_written)
                    / RATES["disk"]
                    / 3600,
                    "pass_hours": price.operations / RATES["passes"] / 3600,
                    "gram_hours": price.gram_operations / RATES["gram"] / 3600,
                    "solving_hours": price.solving_operations / RATES["solving"] / 3600,
                }
            )
    return rows


def main(
    shape: Annotated[Literal["tiny", "1b", "7b", "7b1"] | None, typer.Option()] = None,
    count: bool = False,
    directory: Annotated[Path | None, typer.Option(help="where models are written, and deleted again")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda")] = None,
    threads: int = 1,
    samples: int = 8,
    tokens: int = 128,
    obs_layers: Annotated[int, typer.Option(help="score so many layers by obs, from disk")] = 0,
    method: Annotated[list[str] | None, typer.Option(help="default: both; llm_pruner for 7b")] = None,
    layers_on: Annotated[list[str] | None, typer.Option(help="default: disk and memory; disk for 7b")] = None,
    out: Path = OUT,
    job: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, and write the numbers and the page."""
    if job is not None:
        print(json.dumps(run_job(json.loads(job))))
        return
    results: dict[str, Any] = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    if count:
        results["counted"] = {
            "samples": COUNTED_TOKENS[0],
            "tokens": COUNTED_TOKENS[1],
            "rates": RATES,
            "ratio": RATIO,
            "rows": counted(),
        }
    if shape is not None:
        folder = Path(tempfile.mkdtemp(prefix="scale-", dir=directory))
        try:
            facts = circumstances(threads, device)
            write_model(SHAPES[shape], folder / "dense")
            size = sum(path.stat().st_size for path in (folder / "dense").glob("*.safetensors"))
            common = {"model": str(folder / "dense"), "device": device, "threads": threads}
            common |= {"samples": samples, "tokens": tokens}
            measured = {"bytes": size, "samples": samples, "tokens": tokens, "device": device or "cpu"}
            rows: list[dict[str, Any]] = []
            results[shape] = {**SHAPES[shape], **measured, "circumstances": facts, "rows": rows}
            large = shape == "7b"
            jobs: list[dict[str, Any]] = [
                {"method": name, "layers_on": where, "pruned": str(folder / "pruned")}
                for name in method or (["llm_pruner"] if large else list(METHODS))
                for where in layers_on or (["disk"] if large else ["disk", "memory"])
            ]
            if obs_layers:
                jobs.append({"method": "obs", "layers_on": "disk", "obs_layers": obs_layers})
            for own in jobs:
                rows.append(in_process(common | own))
                shutil.rmtree(folder / "pruned", ignore_errors=True)
                write(results, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    write(results, out)


def write(results: dict[str, Any], out: Path) -> None:
    """The numbers, and the page beside them."""
    out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    write_page(results, out.with_suffix(".md"))


if __name__ == "__main__":
    typer.run(main)
