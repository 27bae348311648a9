"""What pruning costs and gains: perplexity, size, speed, tables and pictures."""

from hf_prune.evaluation.perplexity import PerplexityReport, perplexity
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
    "PerplexityReport",
    "PrefillComparison",
    "SpeedReport",
    "ZeroShotReport",
    "compare_prefill",
    "comparison_table",
    "learning_curve_picture",
    "markdown_table",
    "measure_speed",
    "num_bytes",
    "num_parameters",
    "perplexity",
    "perplexity_picture",
    "usual_request",
    "widths_picture",
    "zero_shot",
]
