"""What is compared on a real model: what goes, whether that is repaired, and by how much calibration text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RATIOS = (0.3, 0.5, 0.2)
"""Fractions of the decoder's parameters, the most wanted first."""


@dataclass(frozen=True)
class Row:
    """A method with its settings, at every ratio, not repaired and repaired."""

    name: str
    config: dict[str, Any]
    group: str
    num_samples: int = 128
    """Calibration windows of 256 tokens for everything but scores that say their own number."""
    ratios: tuple[float, ...] = RATIOS
    repairs: tuple[bool, ...] = (False, True)
    repair: dict[str, Any] = field(default_factory=dict)
    """Settings of repair other than the defaults."""


OBS = {"method": "obs", "allocation": "global"}
FISHER = {"method": "llm_pruner", "criterion": "fisher", "allocation": "global"}
CURVES = {**FISHER, "allocation": "curves", "search_samples": 9, "repair": "least_squares"}
"""Plans are judged as repair will leave them, by three windows of each text that the preview is not fitted to."""
END = {"repair": "end_to_end"}
ALL = {"repair": "all"}
SHORT = {"num_samples": 512, "seq_len": 64, "num_steps": 4}
REPAIRED = (True,)

ROWS = (
    Row("OBS, global", OBS, "obs", repairs=(True, False)),
    Row("OBS, global, 1,024 × 256 tokens", OBS, "long", num_samples=1024, repairs=REPAIRED),
    Row("OBS, global, 512 × 256 tokens", OBS, "long", num_samples=512, repairs=REPAIRED),
    Row("OBS, global, layers trained", OBS, "train", repairs=REPAIRED, repair={"repair": "train"}),
    Row("LLM-Pruner (Fisher), global", FISHER, "fisher", repairs=(True, False)),
    Row("LLM-Pruner (Fisher), global, end to end", FISHER, "end", repairs=REPAIRED, repair=END),
    Row("LLM-Pruner (Fisher), curves, end to end", CURVES, "end", repairs=REPAIRED, repair=END),
    Row("LLM-Pruner (Fisher), curves, trained, end to end", CURVES, "end", repairs=REPAIRED, repair=ALL),
    *(
        Row(
            f"LLM-Pruner (Fisher), {name}, end to end, 1,024 × 256 tokens",
            {**config, "num_samples": 128},
            "long",
            num_samples=1024,
            repairs=REPAIRED,
            repair=END,
        )
        for name, config in (("global", FISHER), ("curves", CURVES))
    ),
    Row("LLM-Pruner, paper's block preset", {"preset": "paper_block"}, "fisher"),
    Row("LLM-Pruner (Fisher), global, 512 × 64 tokens, 4 steps", {**FISHER, **SHORT}, "fisher"),
    Row("Wanda-type, global", {"method": "wanda", "allocation": "global"}, "simple"),
    Row("magnitude, global", {"method": "magnitude", "allocation": "global"}, "simple"),
    Row("random, uniform", {"method": "random", "allocation": "uniform"}, "simple"),
    Row("magnitude, uniform", {"method": "magnitude", "allocation": "uniform"}, "simple"),
    Row("Wanda-type, uniform", {"method": "wanda", "allocation": "uniform"}, "simple"),
    Row("policy gradient", {"method": "policy_gradient", "policy_steps": 200, "num_samples": 256}, "learned"),
    Row("PruneNet", {"method": "prunenet", "train_ratio": 0.3}, "prunenet"),
    # settings of what is best, on validation text
    Row("OBS, uniform", {**OBS, "allocation": "uniform"}, "widths", repairs=REPAIRED),
    Row("OBS, global, 4 steps", {**OBS, "num_steps": 4}, "widths", repairs=REPAIRED),
    Row("OBS, spectral", {**OBS, "allocation": "spectral"}, "widths", repairs=REPAIRED),
    Row("Fisher, OBS selection", {**FISHER, "selection": "obs"}, "widths", repairs=REPAIRED),
    Row("OBS, shrinkage 0.25", {**OBS, "shrinkage": 0.25}, "settings", repairs=REPAIRED),
    Row("OBS, shrinkage 0.75", {**OBS, "shrinkage": 0.75}, "settings", repairs=REPAIRED),
    Row("OBS, ridge 0.1", OBS, "settings", repairs=REPAIRED, repair={"repair_ridge": 0.1}),
    Row("OBS, ridge 0.003", OBS, "settings", repairs=REPAIRED, repair={"repair_ridge": 0.003}),
    Row("OBS, target own", OBS, "settings", repairs=REPAIRED, repair={"repair_target": "own"}),
    Row("OBS, target asymmetric", OBS, "settings", repairs=REPAIRED, repair={"repair_target": "asymmetric"}),
)
