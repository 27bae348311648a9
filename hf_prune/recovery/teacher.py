"""What a teacher predicts, written once: its most likely tokens, so that teacher and student never share a device."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from hf_prune.checkpoint.save_hook import tokens_in_dense
from hf_prune.gate import check_windows
from hf_prune.layers.processes import of_main_process
from hf_prune.layers.walk import Walk
from hf_prune.layers.weights import fingerprint, inference, is_on_disk
from hf_prune.layers.work import WorkDir, write_tensors
from hf_prune.loading import open_model
from hf_prune.structure.inference import infer_structure

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel

TOP_K = 64
"""Tokens kept at each position; what all others have together is one more number."""
WINDOWS = 8
"""Of each file."""
_BLOCK = 256
"""Files written by one reading of a teacher on disk: 2,048 windows."""
TOKENS, LOG_PROBS, REST = "teacher_tokens", "teacher_log_probs", "teacher_rest"
"""Columns of the rows: `[T, k]`, `[T, k]`, `[T]`."""
LEAST = -30.0
"""Log-probabilities below are taken as this: no mass that matters, and finite."""


class TaughtRows(Dataset):  # type: ignore[type-arg]
    """Rows for `DistillationTrainer` with what the teacher predicts at each position.

    Args:
        rows: `input_ids` and `labels` `[T]` of each.
        order: which window each row is.
        directory: what `write_predictions` has written for these windows.
    """

    def __init__(self, rows: Sequence[dict[str, Tensor]], order: Sequence[int], directory: Path) -> None:
        self.rows, self.order, self.directory = rows, order, directory

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.order[index]
        with safe_open(_path(self.directory, window // WINDOWS), "pt") as file:
            taught = {name: file.get_slice(name)[window % WINDOWS] for name in (TOKENS, LOG_PROBS, REST)}
        return {**self.rows[index], **taught}


def write_predictions(
    teacher: PreTrainedModel | str | Path,
    windows: Tensor,
    directory: Path,
    *,
    temperature: float = 1.0,
    top_k: int = TOP_K,
    student: PreTrainedModel | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Write what a teacher predicts after every token of every window; what is there already is kept.

    A killed run goes on where it stopped. Once all is there, a teacher given by name is not loaded. One that does not
    fit into memory is read a layer at a time. Of several processes each writes its share. A position takes
    6·`top_k` + 4 bytes: 388.

    Args:
        teacher: the dense model, in memory, or its directory or Hub id.
        windows: int64 `[N, T]`.
        directory: made if it is not there.
        temperature: of the distributions, above 0.
        top_k: the most likely tokens to keep, 1 or more; all, if the vocabulary is smaller.
        student: tells the teacher's id of each token, where tokens of the vocabulary went; windows have the student's.
        device: where the teacher runs, if it is given by name; default: the CPU.
        trust_remote_code: whether code that comes with the teacher's checkpoint may run, likewise.

    Raises:
        CheckpointError: `directory` is of other windows or another teacher, in use, or on a full disk.
        CalibrationError: the windows have tokens that the teacher does not embed.
    """
    work = WorkDir(directory)
    own: Any = teacher
    in_memory = isinstance(own, torch.nn.Module)
    digest = hashlib.sha256(windows.to("cpu", torch.int64).numpy().tobytes()).hexdigest()
    name = fingerprint(own) if in_memory else str(own)
    work.claim({"teacher": name, "text": digest, "shape": list(windows.shape), "temperature": temperature, "k": top_k})
    files = range(-(-len(windows) // WINDOWS))
    missing = of_main_process([number for number in files if not _path(directory, number).exists()])
    if not missing:
        return
    model = own if in_memory else open_model(str(own), device=device, trust_remote_code=trust_remote_code)
    kept = None if student is None else tokens_in_dense(student, model)
    windows = windows if kept is None else kept[windows]
    check_windows(model, [{"input_ids": windows}])
    paths = infer_structure(model).layer_paths
    protocol = None
    block = _BLOCK if is_on_disk(model) else PartialState().num_processes
    with inference(model):
        for start in range(0, len(missing), block):
            numbers = missing[start : start + block]
            batches = [windows[number * WINDOWS : (number + 1) * WINDOWS] for number in numbers]
            walk = Walk(model, paths, batches, protocol=protocol)
            protocol = walk.protocol
            mine = numbers[PartialState().process_index :: PartialState().num_processes]
            for number, output in zip(mine, walk.outputs(), strict=True):
                rows: dict[int, list[tuple[Tensor, ...]]] = {}
                for row, _, logits in output.chunks():
                    rows.setdefault(row, []).append(
                        _most_likely(logits if kept is None else logits[:, kept], temperature, top_k)
                    )
                columns = [[torch.cat(parts) for parts in zip(*chunks, strict=True)] for chunks in rows.values()]
                tensors = map(torch.stack, zip(*columns, strict=True))
                write_tensors(_path(directory, number), dict(zip((TOKENS, LOG_PROBS, REST), tensors, strict=True)))
    PartialState().wait_for_everyone()


def top_k_divergence(student: Tensor, tokens: Tensor, log_probs: Tensor, rest: Tensor, *, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) summed over positions, all tokens but the teacher's most likely ones taken as one.

    That is at most the divergence over the whole vocabulary, and equal to it where the others' shares among themselves
    are equal.

    Args:
        student: logits `[N, V]`.
        tokens: the teacher's most likely ones, `[N, k]`.
        log_probs: of them, at temperature T, `[N, k]`.
        rest: logarithm of what all others have, `[N]`; ignored where there are none.
        temperature: T, above 0.
    """
    tokens = tokens.to(student.device, torch.int64)
    log_p, log_rest = log_probs.to(student.device).float(), rest.to(student.device).float().clamp_min(LEAST)
    log_q = (student.float() / temperature).log_softmax(-1)
    total = (log_p.exp() * (log_p - log_q.gather(-1, tokens))).sum()
    if tokens.shape[-1] < log_q.shape[-1]:
        others = log_q.scatter(-1, tokens, -torch.inf).logsumexp(-1)
        total = total + (log_rest.exp() * (log_rest - others)).sum()
    return temperature**2 * total


def _most_likely(logits: Tensor, temperature: float, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    log_p = (logits.float() / temperature).log_softmax(-1)
    values, tokens = log_p.topk(min(top_k, log_p.shape[-1]), dim=-1)
    rest = log_p.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return tokens.to("cpu", torch.int32), values.clamp_min(LEAST).to("cpu", torch.float16), rest.clamp_min(LEAST).cpu()


def _path(directory: Path, number: int) -> Path:
    return directory / f"{number:06}.safetensors"
