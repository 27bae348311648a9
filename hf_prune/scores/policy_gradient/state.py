"""The state of learning, on disk: an interrupted run goes on to the same result, bit for bit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState

from hf_prune.errors import CheckpointError
from hf_prune.layers.work import check_same_run, read_tensors, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hf_prune.config import PolicyGradientConfig

FILE = "policy.safetensors"
SPEED_ONLY = ("state_dir", "state_steps", "forward_rows")
"""Settings that may change when a run goes on."""


@dataclass(frozen=True)
class LearningState:
    """All that a step needs and changes. A new one is made by each step."""

    step: int
    """Steps done."""
    widths: Tensor
    """Kept fraction of each axis, float32 `[A]`."""
    keep_probs: Tensor
    """float32 `[N]`."""
    momentum: Tensor
    """Of the gradient by widths, `[A]`."""
    scale: Tensor
    """Moving mean square of the gradient, a scalar."""
    baseline: Tensor
    """Mean losses of the last steps, for the paper's estimator."""
    history: Tensor
    """Loss, kept fraction and entropy of every step, `[steps, 3]`."""
    generator_state: Tensor
    """Of the generator of masks, uint8, on the CPU."""


class StateFile:
    """One safetensors file with the tensors, and the step and the identity of the run as JSON in its header."""

    def __init__(self, config: PolicyGradientConfig, windows: Tensor, scores: Tensor, seed: int) -> None:
        self.path = None if config.state_dir is None else Path(config.state_dir) / FILE
        values = {name: value for name, value in config.to_dict().items() if name not in SPEED_ONLY}
        digest = hashlib.sha256(windows.cpu().numpy().tobytes() + scores.cpu().numpy().tobytes()).hexdigest()
        self.identity = json.loads(json.dumps({**values, "seed_drawn": seed, "windows_and_scores": digest}))

    def save(self, state: LearningState) -> None:
        """Write the state, by renaming: an interrupted write leaves the older one. The main process writes."""
        if self.path is not None and PartialState().is_main_process:
            tensors = {name: value for name, value in vars(state).items() if name != "step"}
            write_tensors(self.path, tensors, {"run": self.identity, "step": state.step})

    def load(self, device: torch.device) -> LearningState | None:
        """The state that was written, `None` if there is none.

        Raises:
            CheckpointError: it is damaged, or of another run.
        """
        if self.path is None or not self.path.exists():
            return None
        tensors, note = read_tensors(self.path)
        try:
            generator_state = tensors.pop("generator_state")
            on_device = {name: tensor.to(device) for name, tensor in tensors.items()}
            state = LearningState(step=int(note["step"]), generator_state=generator_state, **on_device)
            found = dict(note["run"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.path} is damaged ({error}); delete it to start anew.") from error
        check_same_run(self.path, found, self.identity, "state_dir")
        return state
