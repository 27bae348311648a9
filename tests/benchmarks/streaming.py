"""Peak memory of pruning from file to file: a random Llama shaped like TinyLlama 1.1B, in bfloat16 (2.2 GB).

    python tests/benchmarks/streaming.py magnitude
    python tests/benchmarks/streaming.py prunenet --episodes 1

The checkpoint is made in a temporary directory and deleted afterwards. With --check the model is then pruned in memory
too, and all tensors are compared.
"""

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_prune import MagnitudeConfig, PruneNetConfig, RandomConfig, infer_structure, prune
from hf_prune.streaming import INDEX_NAME, stream_prune

SIZES: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def write_random(directory: Path, layers: int) -> int:
    """One shard per decoder layer, so that making it needs no memory either; returns its bytes."""
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    config.save_pretrained(directory)
    structure, generator = infer_structure(config), torch.Generator().manual_seed(0)
    by_layer: dict[int, list[str]] = {}
    for name in structure.layouts:
        owner = structure.owners.get(name)
        by_layer.setdefault(-1 if owner is None else owner.layer, []).append(name)
    weight_map, size = {}, 0
    for layer, names in by_layer.items():
        scales = {name: (0.5 * torch.randn(structure.shape(name)[0], generator=generator)).exp() for name in names}
        tensors = {}
        for name in names:
            shape = structure.shape(name)
            values = torch.ones(shape) if len(shape) == 1 else 0.02 * torch.randn(shape, generator=generator)
            tensors[name] = (values * scales[name].view(-1, *[1] * (len(shape) - 1))).bfloat16()
        file = f"model-{layer + 2:05}-of-{len(by_layer):05}.safetensors"
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.nbytes for tensor in tensors.values())
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    return size


def main(
    method: Annotated[str, typer.Argument(help="magnitude, random or prunenet")] = "magnitude",
    layers: int = 22,
    episodes: int = 1,
    distance: str = "wasserstein",
    check: Annotated[bool, typer.Option("--check", help="Compare with pruning in memory (afterwards).")] = False,
) -> None:
    """Print peak resident memory, before and after."""
    torch.set_num_threads(1)
    config: Any = {
        "magnitude": MagnitudeConfig(0.3),
        "random": RandomConfig(0.3),
        "prunenet": PruneNetConfig(0.3, num_episodes=episodes, num_rollouts=2, distance=distance),  # type: ignore[arg-type]
    }[method]
    with tempfile.TemporaryDirectory() as root:
        source, output = Path(root, "dense"), Path(root, "pruned")
        source.mkdir()
        made = write_random_elsewhere(source, layers)
        before = peak()
        start = time.perf_counter()
        stream_prune(source, output, config)
        seconds = time.perf_counter() - start
        print(
            f"{method}: checkpoint {made / 1e9:.2f} GB; peak resident {peak():.2f} GB ({before:.2f} GB before, the "
            f"libraries); {seconds:.0f} s",
            flush=True,
        )
        if check:
            whole = prune(AutoModelForCausalLM.from_pretrained(source, dtype="auto"), config).model.state_dict()
            found = {k: v for path in output.glob("*.safetensors") for k, v in load_file(path).items()}
            same = found.keys() == whole.keys() and all(torch.equal(found[k], whole[k]) for k in found)
            print(f"all {len(found)} tensors equal to those pruned in memory: {same}")


def write_random_elsewhere(directory: Path, layers: int) -> int:
    """`write_random` in a process of its own: its memory must not count."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(write_random, directory, layers).result()


def peak() -> float:
    """Peak resident memory of this process, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    typer.run(main)
