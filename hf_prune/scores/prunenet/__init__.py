"""PruneNet (arXiv 2501.15296): a small policy learns which rows to keep so that the spectrum of a layer stays.

`unit_matrix.py` reads the matrix of a layer, `spectra.py` compares spectra, `policy.py` is what is learned,
`training.py` learns it by REINFORCE, `layer_importance.py` says what a layer counts, and `scoring.py` turns a policy
into scores.
"""

from hf_prune.scores.prunenet.policy import Policy
from hf_prune.scores.prunenet.scoring import prunenet_scores, train_policy

__all__ = ["Policy", "prunenet_scores", "train_policy"]
