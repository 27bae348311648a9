"""What pruning costs and gains: perplexity, size, speed, tables and pictures."""

from hf_prune.evaluation.estimates import Estimate, flat
from hf_prune.evaluation.generation import GenerationReport, check_generation, read_prompts
from hf_prune.evaluation.perplexity import PerplexityReport, perplexity
from hf_prune.evaluation.quality import Quality, TextQuality, evaluate, read_texts
from hf_prune.evaluation.report import (
    comparison_table,
    learning_curve_picture,
    markdown_table,
    perplexity_picture,
    widths_picture,
)
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
    "comparison_table",
    "evaluate",
    "flat",
    "learning_curve_picture",
    "markdown_table",
    "measure_speed",
    "num_bytes",
    "num_parameters",
    "perplexity",
    "perplexity_picture",
    "read_prompts",
    "read_texts",
    "usual_request",
    "widths_picture",
    "zero_shot",
]
