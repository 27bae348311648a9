"""What docs/results.md compares: sections of rows; a row is a configuration, measured at several ratios and seeds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RATIOS = (0.2, 0.3, 0.5, 0.7)
CALIBRATION = {"num_samples": 128, "seq_len": 256}
SHORT = {"num_samples": 10, "seq_len": 64}
"""What the released LLM-Pruner calibrates with."""


RECOMMENDED = {"num_samples": 512, "seq_len": 64, "num_steps": 4}
CRITERIA_NAMES = ("vector", "first_order", "second_order", "mixed", "fisher")


@dataclass(frozen=True)
class Row:
    """One line of a table. `config` has the fields of a `PruningConfig` that matter, without ratio and seed."""

    label: str
    config: dict[str, Any]
    seeds: tuple[int, ...] = (0,)
    ratios: tuple[float, ...] = RATIOS

    def cells(self, ratio: float) -> list[dict[str, Any]]:
        """Complete configurations, one per seed; none if the row is not measured at this ratio."""
        if ratio not in self.ratios:
            return []
        return [{"pruning_ratio": ratio, "seed": seed, **CALIBRATION, **self.config} for seed in self.seeds]


@dataclass(frozen=True)
class Section:
    """One table per text."""

    title: str
    rows: tuple[Row, ...]
    note: str = ""
    published: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    """Other people's code on the same model and test text (WikiText-2 only): label → perplexity at 20, 30, 50 %."""


def _llm_pruner(label: str, criterion: str, allocation: str, **more: Any) -> Row:
    ratios = more.pop("ratios", RATIOS)
    config = {"method": "llm_pruner", "criterion": criterion, "allocation": allocation, **more}
    return Row(label, config, ratios=ratios)


BASELINES = Section(
    "All methods, no repair, nothing retrained",
    (
        Row("random, uniform", {"method": "random", "allocation": "uniform"}, seeds=(0, 1, 2)),
        Row("magnitude, uniform", {"method": "magnitude", "allocation": "uniform"}),
        Row("magnitude, global", {"method": "magnitude", "allocation": "global"}),
        Row("magnitude, global, raw", {"method": "magnitude", "allocation": "global", "standardise": "none"}),
        Row("Wanda-type, uniform", {"method": "wanda", "allocation": "uniform"}),
        Row("Wanda-type, global", {"method": "wanda", "allocation": "global"}),
        Row("Wanda-type, global, raw", {"method": "wanda", "allocation": "global", "standardise": "none"}),
        _llm_pruner("LLM-Pruner (Fisher), uniform", "fisher", "uniform"),
        _llm_pruner("LLM-Pruner (Fisher), global", "fisher", "global"),
    ),
    note="random: mean of the seeds 0, 1, 2 (smallest–largest). raw: scores compete per parameter as they are; for "
    "norms that is worse than random.",
)

CRITERIA = Section(
    "LLM-Pruner: every criterion",
    (
        *(
            _llm_pruner(f"{criterion}, {allocation}", criterion, allocation, ratios=RATIOS[:3])
            for allocation in ("uniform", "global")
            for criterion in CRITERIA_NAMES
        ),
        _llm_pruner("fisher, global: the recommended preset", "fisher", "global", **RECOMMENDED, ratios=RATIOS[:3]),
        _llm_pruner("first_order, global, 4 steps", "first_order", "global", num_steps=4, ratios=(0.5,)),
        *(
            _llm_pruner(f"{criterion}, {allocation}, 10 × 64 tokens", criterion, allocation, **SHORT, ratios=RATIOS[:3])
            for criterion, allocation in (
                ("vector", "uniform"),
                ("first_order", "uniform"),
                ("second_order", "uniform"),
                ("first_order", "global"),
            )
        ),
    ),
    note="Uniform is the released code's local ranking. 128 × 256 calibration tokens in one step unless said; the "
    "recommended preset takes 512 × 64 tokens and 4 steps.",
    published={
        "released code: vector, local": (43.16, 55.34, 169.0),
        "released code: first order, local, 10 × 64 tokens": (42.10, 62.56, 165.8),
        "the same with its head folding corrected": (None, 52.53, 165.3),
        "released code: second order, local": (42.09, 62.53, 155.6),
        "released code: first order, global, 10 × 64 tokens": (41.95, 43.41, 59.24),
        "released code: first order, global": (41.91, 43.14, 56.40),
    },
)

METHODS = {
    "random": {"method": "random"},
    "magnitude": {"method": "magnitude"},
    "Wanda-type": {"method": "wanda"},
    "LLM-Pruner (Fisher)": {"method": "llm_pruner", "criterion": "fisher"},
    "OBS": {"method": "obs", "repair": "none"},
}
LEARNED = {"PruneNet": {"method": "prunenet"}, "policy gradient": {"method": "policy_gradient"}}
"""Methods that decide the widths themselves."""
ALLOCATIONS = {
    "uniform": {"allocation": "uniform"},
    "global": {"allocation": "global"},
    "spectral": {"allocation": "spectral"},
    "search": {"allocation": "search", "search_evaluations": 150, "search_samples": 8},
}
REPAIRS = {"": {}, " + repair": {"repair": "least_squares"}}

REPAIR = Section(
    "Repair and allocation: every method",
    tuple(
        Row(f"{name}, {allocation}{suffix}", {**method, **how, **repair}, ratios=RATIOS[:3])
        for allocation, how in ALLOCATIONS.items()
        for suffix, repair in REPAIRS.items()
        for name, method in METHODS.items()
    )
    + tuple(
        Row(f"{name}, its own widths{suffix}", {**method, **repair}, ratios=RATIOS[:3])
        for name, method in LEARNED.items()
        for suffix, repair in REPAIRS.items()
    ),
    note="Repair is least squares towards the dense residual stream on WikiText-2 train; why novels can lose by it: "
    "[repair.md](repair.md). random and the learned: seed 0. OBS scores count on repair. PruneNet prunes MLP channels "
    "only. With search repair changes the widths too: plans are judged as repair leaves them.",
    published={
        "FLAP (WIFV, AL-AM) with its bias": (44.58, 46.48, 76.04),
        "FLAP without": (46.49, 49.20, 106.1),
        "SliceGPT": (47.55, 51.90, 71.65),
        "LLM-Pruner, released code, first order, global": (41.91, 43.14, 56.40),
    },
)

SELECTION = {"selection": "obs", "repair": "least_squares"}
LONG = {"num_samples": 512, "repair": "least_squares"}
FISHER = {**METHODS["LLM-Pruner (Fisher)"], "allocation": "global"}
OBS = {"method": "obs", "allocation": "global"}
BEST = Section(
    "The best combinations",
    (
        Row("LLM-Pruner (Fisher), global, OBS selection + repair", {**FISHER, **SELECTION}),
        Row(
            "LLM-Pruner (Fisher), search, OBS selection + repair",
            {**FISHER, **ALLOCATIONS["search"], **SELECTION},
            ratios=(0.5,),
        ),
        Row("LLM-Pruner, recommended preset, OBS selection + repair", {**FISHER, **RECOMMENDED, **SELECTION}),
        Row("OBS, global + repair", {**OBS, "repair": "least_squares"}),
        Row("OBS, global + repair, 512 × 256 tokens", {**OBS, **LONG}),
    ),
    note='OBS selection (`selection="obs"`) chooses the units inside each axis anew, once the widths are known. '
    "128 × 256 calibration tokens, 512 × 64 in the recommended preset, unless said.",
)

SECTIONS = (BASELINES, CRITERIA, REPAIR, BEST)
README_SECTION = Section(BASELINES.title, (*(row for row in BASELINES.rows if "raw" not in row.label), *BEST.rows[-2:]))

ZERO_SHOT_QUESTIONS = 200
"""The first questions of each task."""
ZERO_SHOT = tuple(
    Row(f"{name}{suffix}", {**METHODS[method], "allocation": allocation, **repair}, ratios=(0.3, 0.5))
    for name, method, allocation in (
        ("random, uniform", "random", "uniform"),
        ("magnitude, uniform", "magnitude", "uniform"),
        ("LLM-Pruner (Fisher), global", "LLM-Pruner (Fisher)", "global"),
        ("OBS, global", "OBS", "global"),
    )
    for suffix, repair in REPAIRS.items()
)
"""Models whose zero-shot accuracy is measured, beside the dense one."""
