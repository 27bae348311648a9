"""PruneNet (arXiv 2501.15296): a small policy learns which rows to keep so that the spectrum of a layer stays.

`rows.py` reads the matrix of a layer, `spectra.py` compares spectra, `policy.py` is what is learned, `training.py`
learns it by REINFORCE, `updates.py` says what a layer counts, and `scoring.py` turns a policy into scores.
"""

from hf_prune.methods.prunenet.policy import Policy
from hf_prune.methods.prunenet.scoring import prunenet_scores, train_policy

__all__ = ["Policy", "prunenet_scores", "train_policy"]
