"""The errors hf_prune raises. Each message says what was found, what was expected, and what to do."""

from __future__ import annotations


class HFPruneError(ValueError):
    """Base class of every error that hf_prune raises on bad input."""


class ConfigError(HFPruneError):
    """A pruning configuration has an unknown key, a wrong type or a value out of range."""


class StructureError(HFPruneError):
    """An architecture, or one of its operations, keeps something from being pruned."""


class CalibrationError(HFPruneError):
    """Calibration or evaluation text is missing, empty or too short."""


class ScoreError(HFPruneError):
    """Scores are missing, not finite, or of the wrong shape."""


class BudgetError(HFPruneError):
    """A budget cannot be met, or would remove nothing although asked to."""


class PlanError(HFPruneError):
    """A pruning plan does not fit the model it is applied to, or is damaged."""


class CheckpointError(HFPruneError):
    """A checkpoint is damaged, incomplete, or could not be written."""


class DivergenceError(HFPruneError):
    """Training gave numbers that are not finite."""


def check_whole_numbers(**numbers: tuple[object, int]) -> None:
    """Raise `ConfigError` unless each of these, given by name as `(value, lowest)`, is an `int` from `lowest`."""
    for name, (value, lowest) in numbers.items():
        if type(value) is not int or value < lowest:
            raise ConfigError(f"{name}: found {value!r}, expected a whole number from {lowest}.")
