"""What pruning costs and gains: perplexity, tasks, generation, size and speed."""

from hf_prune.evaluation.estimates import Estimate, flat
from hf_prune.evaluation.generation import GenerationReport, check_generation, read_prompts
from hf_prune.evaluation.perplexity import PerplexityReport, perplexity
from hf_prune.evaluation.quality import Quality, TextQuality, evaluate, read_texts
from hf_prune.evaluation.speed import (
    PrefillComparison,
    SpeedReport,
    compare_prefill,
    measure_speed,
    num_bytes,
    num_parameters,
    usual_request,
)
from hf_prune.evaluation.zero_shot import ZeroShotReport, zero_shot

__all__ = [
    "Estimate",
    "GenerationReport",
    "PerplexityReport",
    "PrefillComparison",
    "Quality",
    "SpeedReport",
    "TextQuality",
    "ZeroShotReport",
    "check_generation",
    "compare_prefill",
    "evaluate",
    "flat",
    "measure_speed",
    "num_bytes",
    "num_parameters",
    "perplexity",
    "read_prompts",
    "read_texts",
    "usual_request",
    "zero_shot",
]
