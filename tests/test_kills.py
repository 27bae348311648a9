"""A kill, SIGTERM or a full disk at any moment: nothing is lost, nothing half written stays, the command goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
from killing import FORKS, command, hold
from served import save as save_served
from served import tiny_served_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_prune import MagnitudeConfig, prune
from hf_prune.atomic import replaced_directory, replaced_file, reserved
from hf_prune.checkpoint.saving import save_pruned, verify_checkpoint
from hf_prune.errors import CheckpointError

KILLS = int(os.environ.get("HF_PRUNE_KILLS", "3"))
"""Of each command; `make kills` does 20."""
TEXT = ["--calibration", "../text.txt", "--num-samples", 6, "--seq-len", 16]
WORK = ["--work-dir", "work"]
PRUNE = ["prune", "../dense", "out", "--pruning-ratio", 0.3]
SELECTED = ["--method", "llm_pruner", "--set", "selection=obs", "--repair", "least_squares", "--layers-on", "disk"]
SEARCH = ["--method", "wanda", "--allocation", "search", "--set", "search_evaluations=8", "--set", "search_samples=4"]
LEARN = ["--method", "policy_gradient"]
LEARN += [
    word for text in ("policy_steps=4", "num_masks=2", "init_samples=3", "state_steps=1") for word in ("--set", text)
]
ROWS = ["--methods", "magnitude,wanda", "--ratios", 0.3, "--text", "../text.txt", "--window", 32]
TRAIN = [
    "--train",
    "../text.txt",
    "--preset",
    "full",
    "--steps",
    6,
    "--save-steps",
    2,
    "--per-device-train-batch-size",
    4,
]
COMMANDS = {
    "prune": [*PRUNE, *SELECTED, *TEXT, *WORK],
    "prune, nothing kept": [*PRUNE, "--method", "wanda", *TEXT],
    "search": [*PRUNE, *SEARCH, *TEXT, *WORK],
    "policy gradient": [*PRUNE, *LEARN, *TEXT, *WORK],
    "sweep": ["sweep", "../dense", "out", *ROWS, *TEXT],
    "recover": ["recover", "../pruned", "out", *TRAIN, "--seq-len", 16, "--use-cpu", "--disable-tqdm", 1, "--resume"],
}
WRITERS = {
    "export, plain": ["export", "../pruned", "out", "--format", "plain"],
    "export, gguf": ["export", "../served", "out", "--format", "gguf"],
    "export, onnx": ["export", "../pruned", "out", "--format", "onnx"],
    "quantise": ["quantise", "../pruned", "out"],
    "demo": ["demo", "--output", "out"],
}
"""What is short: nothing is kept on the way."""
READERS = {
    "eval": ["eval", "../pruned", "--text", "../text.txt", "--window", 32],
    "inspect": ["inspect", "../dense", "--verify"],
}
writers = pytest.mark.parametrize(
    "name",
    [
        *COMMANDS,
        "export, plain",
        "export, gguf",
        pytest.param("export, onnx", marks=pytest.mark.skipif(KILLS <= 3, reason="slow: one of `make kills`")),
        "quantise",
        "demo",
    ],
)


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    tiny.write_demo_model(folder / "demo")
    save_served(folder / "served", tiny_served_model("llama", "different"))
    tiny.write_checkpoint(folder / "dense", num_layers=3)
    tiny.write_text(folder / "text.txt", 1000, seed=1)
    dense = AutoModelForCausalLM.from_pretrained(folder / "dense")
    result = prune(dense, MagnitudeConfig(0.2))
    save_pruned(result.model, folder / "pruned", tokenizer=AutoTokenizer.from_pretrained(folder / "dense"))
    return folder


@pytest.fixture(scope="module")
def whole(material):
    """Each command without disturbance, once: its folder, and how it ended."""
    known = {}

    def run(name):
        if name not in known:
            folder = material / f"whole {name}"
            folder.mkdir()
            known[name] = folder, command(folder, (COMMANDS | WRITERS | READERS)[name])
            assert known[name][1].code == 0, known[name][1].output
        return known[name]

    return run


def bits(output):
    """What a command made; of a sweep what does not depend on the clock."""
    if output.is_file():
        return output.read_bytes()
    if not (output / "results.json").exists():
        return {path.name: path.read_bytes() for path in output.iterdir()}
    found = json.loads((output / "results.json").read_text())
    rows = [{name: value for name, value in row.items() if not name.endswith(("_s", "_ms"))} for row in found["rows"]]
    files = sorted(str(path.relative_to(output)) for path in output.rglob("*"))
    return {"rows": rows, "circumstances": found["circumstances"], "files": files}


def leftovers(folder):
    found = (path.name for path in folder.rglob("*"))
    return [name for name in found if ".new-" in name or name.endswith(".lock") or name.startswith(".tmp")]


@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_stopped_command_ends_with_the_same_bits(material, whole, name):
    """SIGTERM cleans up and says how to go on; SIGKILL comes at a random write or at a random time."""
    (complete, reference), draw = whole(name), random.Random(name)
    folder = material / f"stopped {name}"
    folder.mkdir()
    ended = command(folder, COMMANDS[name], at=draw.randint(2, reference.writes // 2), what="terminate")
    assert ended.code == 143, ended.output
    said = "interrupted; runs with --work-dir go on." if name == "prune, nothing kept" else "the same command goes on."
    assert ended.output.splitlines()[-1].endswith(said)
    assert "Traceback" not in ended.output
    assert leftovers(folder) == []
    for kill in range(KILLS + 1):  # the last one is not killed
        if (folder / "out" / "config.json").exists():  # it had been through
            verify_checkpoint(folder / "out")
            assert bits(folder / "out") == bits(complete / "out")
            shutil.rmtree(folder / "out")
        at = draw.randint(1, reference.writes) if kill < KILLS and kill % 2 == 0 else None
        after_s = draw.uniform(0.3, 0.95) * reference.seconds if kill < KILLS and kill % 2 else None
        ended = command(folder, COMMANDS[name], at=at, after_s=after_s)
        assert ended.code in (-9, 0), ended.output
    assert bits(folder / "out") == bits(complete / "out")
    assert leftovers(folder) == []
    assert {path.name for path in folder.iterdir()} == {path.name for path in complete.iterdir()}


@writers
def test_a_full_disk_changes_nothing(material, whole, name):
    """From some write on nothing more can be written."""
    draw = random.Random(name)
    for number in range(max(1, KILLS // 3)):
        folder = material / f"full {name} {number}"
        old = fill(material, folder, name)
        writes = whole(name)[1].writes
        at = draw.randint(1, writes * 3 // 4 if writes > 9 else writes // 2)  # the last ones take no room
        words = [*(COMMANDS | WRITERS)[name], *overwriting(name)]
        check_refusal(command(folder, words, at=at, what="full"), folder, old)


@pytest.mark.parametrize("name", list(READERS))
def test_what_only_reads_needs_no_disk(material, whole, name):
    folder = material / f"full {name}"
    folder.mkdir()
    ended = command(folder, READERS[name], at=1, what="full")
    assert ended.code == 0, ended.output
    assert ended.writes == whole(name)[1].writes == 0
    assert list(folder.iterdir()) == []


@writers
def test_a_small_disk_changes_nothing(material, whole, name):
    folder, draw = material / f"small {name}", random.Random(name)
    folder.mkdir()
    written = sum(path.stat().st_size for path in whole(name)[0].rglob("*") if path.is_file())
    size = 2**14 + int(draw.uniform(0.1, 0.5) * written)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        inner = folder / "inner"
        (folder / "text.txt").symlink_to(material / "text.txt")
        for model in ("dense", "pruned", "served", "demo"):
            (folder / model).symlink_to(material / model)
        inner.mkdir()
        check_refusal(command(inner, (COMMANDS | WRITERS)[name]), inner, {})
    finally:
        subprocess.run(["umount", folder], check=True)


def overwriting(name):
    return [] if name in ("sweep", "demo") else ["--overwrite"]


def fill(material, folder, name):
    """An older checkpoint in place of the output, where a command may replace one."""
    folder.mkdir()
    if name in ("sweep", "demo"):
        return {}
    if name == "export, gguf":
        (folder / "out").write_bytes(b"GGUF of an earlier export")
        return bits(folder / "out")
    shutil.copytree(material / "pruned", folder / "out")
    return bits(folder / "out")


def check_refusal(ended, folder, old):
    assert ended.code == 2, ended.output
    assert "Traceback" not in ended.output
    (said,) = [line for line in ended.output.splitlines() if line.startswith("Error: ")]
    assert "space" in said
    assert leftovers(folder) == []
    assert not old or bits(folder / "out") == old
    if not old and (folder / "out").exists():  # a sweep or a demo that had begun
        assert not (folder / "out" / "config.json").exists()
        assert not (folder / "out" / "pruned").exists() or not verify_checkpoint(folder / "out" / "pruned")


# --- one run at a time ------------------------------------------------------------------------------------------------


def test_one_process_at_a_time(tmp_path):
    taken, done = FORKS.Event(), FORKS.Event()
    other = FORKS.Process(target=hold, args=(str(tmp_path / "out"), taken, done))
    other.start()
    assert taken.wait(60)
    said = rf"out is being written to by process {other.pid} on "
    with pytest.raises(CheckpointError, match=said), reserved(tmp_path / "out"):
        pass
    with pytest.raises(CheckpointError, match=said), replaced_directory(tmp_path / "out"):
        pass
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(CheckpointError, match=said), reserved(tmp_path / "link" / "out"):
        pass
    with replaced_file(tmp_path / "out") as new:  # what a living process has under way stays
        new.write_text("another")
    (tmp_path / "out").unlink()
    (half,) = tmp_path.rglob("half")
    other.kill()
    other.join()
    assert half.exists()
    with reserved(tmp_path / "out"):  # the lock died with its process
        assert not half.exists()
        with reserved(tmp_path / "out"), replaced_directory(tmp_path / "out") as new:  # this one may go on
            (new / "file").write_text("whole")
        with pytest.raises(AssertionError):
            assert leftovers(tmp_path) == []
    assert leftovers(tmp_path) == []
    assert (tmp_path / "out" / "file").read_text() == "whole"


def test_a_second_run_into_one_place_is_refused(material, tmp_path):
    taken, done = FORKS.Event(), FORKS.Event()
    for place in ("out", "work"):
        folder = tmp_path / place
        folder.mkdir()
        (tmp_path / "dense").exists() or (tmp_path / "dense").symlink_to(material / "dense")
        (tmp_path / "text.txt").exists() or (tmp_path / "text.txt").symlink_to(material / "text.txt")
        other = FORKS.Process(target=hold, args=(str(folder / place), taken, done))
        other.start()
        assert taken.wait(60)
        ended = command(folder, COMMANDS["search"])
        assert ended.code == 2
        assert f"process {other.pid} on " in ended.output
        other.kill()
        other.join()
        taken.clear()


def test_missing_parents_are_not_left_behind(tmp_path):
    with pytest.raises(RuntimeError), reserved(tmp_path / "a" / "b" / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_removes_meanwhile_is_no_error(tmp_path, monkeypatch):
    """Two processes share a work directory: one begins the next run while the other removes what it had."""
    going, scandir = tmp_path / "out" / "converted-1-of-2", os.scandir
    going.mkdir(parents=True)

    def removed(path):
        if Path(path) == going:
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", removed)
    with reserved(tmp_path / "out"):
        pass
