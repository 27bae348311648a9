"""Scores that were learned, with the record of learning them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

Step = Mapping[str, float | int | str]


class LearnedScores(dict[str, Tensor]):
    """Scores, axis → `[num_units]`, that know how they were learned: what a method may return in place of a dict.

    Copied and pickled without the history, as an ordinary dictionary: `torch.load` reads that and no class of ours.
    """

    def __init__(self, scores: Mapping[str, Tensor], history: Sequence[Step]) -> None:
        super().__init__(scores)
        self.history = list(history)
        """The learning curve: per step `step`, `phase`, `loss`, `entropy`, `token_forwards`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())
