"""Cost of one reward evaluation: exact eigenvalues and stochastic Lanczos against `torch.linalg.svdvals`.

    python tests/benchmarks/spectra.py                       # 11008 × 4096, minutes on one CPU thread
    python tests/benchmarks/spectra.py --scale 0.5           # 5504 × 2048

The baseline is the singular values of the slice that stays, float32. Also printed: the KS and Wasserstein distances
that each way gives.
"""

import time
from collections.abc import Callable

import torch
import typer

from hf_prune.scores.prunenet.spectra import Spectrum, gram, ks_statistic


def timed(run: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Seconds and result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def main(scale: float = 1.0, ratio: float = 0.3, threads: int = 1) -> None:
    """Print seconds, ratios to svdvals and distances."""
    torch.set_num_threads(threads)
    num_units, width = round(11008 * scale), round(4096 * scale)
    generator = torch.Generator().manual_seed(0)
    norms = (0.5 * torch.randn(num_units, 1, 1, generator=generator)).exp()
    rows = torch.randn(num_units, 1, width, generator=generator) * norms
    mask = torch.zeros(1, num_units, dtype=torch.bool)
    mask[0, torch.randperm(num_units, generator=generator)[: round(num_units * (1 - ratio))]] = True
    kept = rows[mask[0]].flatten(0, 1)
    print(f"{num_units} × {width}, {len(kept)} rows kept, {threads} thread(s)", flush=True)

    base, values = timed(lambda: torch.linalg.svdvals(kept))
    print(f"svdvals of the slice     {base:8.2f} s   ratio 1.00", flush=True)
    seconds, _ = timed(lambda: gram(rows))
    print(f"Gram matrix, once        {seconds:8.2f} s", flush=True)
    dense = torch.linalg.svdvals(rows.flatten(0, 1))
    expected = {"ks": ks_statistic(dense, values[None]).item(), "wasserstein": (1 - values.sum() / dense.sum()).item()}
    for name, limit in (("exact", width), ("Lanczos", 1)):
        for distance in ("ks", "wasserstein"):
            spectrum = Spectrum(rows, distance, exact_up_to=limit)
            seconds, loss = timed(lambda spectrum=spectrum: spectrum.losses(mask))
            print(
                f"{name + ', ' + distance:24} {seconds:8.2f} s   ratio {seconds / base:.3f}   svdvals/this "
                f"{base / seconds:.2f}   distance {loss.item():.6f}, by svdvals {expected[distance]:.6f}",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
