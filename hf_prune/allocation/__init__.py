"""From scores to a plan: `allocate`, its ladders, sequences and budgets, the spectral weights and the search."""

from hf_prune.allocation.ladders import rounding
from hf_prune.allocation.planning import allocate
from hf_prune.allocation.spectral import hill_exponents, spectral_weights

__all__ = ["allocate", "hill_exponents", "rounding", "spectral_weights"]
