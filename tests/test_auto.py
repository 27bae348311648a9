"""`hf-prune auto`: what it advises is what its command does; and the page that it, and all others, leave."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess

import pytest
import tiny
from typer.testing import CliRunner

from hf_prune.cli.auto import RECOVERY_TOKENS, WORTH_RECOVERING, advise
from hf_prune.cli.main import app
from hf_prune.errors import BudgetError, HFPruneError
from hf_prune.plan import PruningPlan

AUTO = "hf_prune.cli.auto"
CHROMIUM = shutil.which("chromium")


def run(*words, columns=80):
    return CliRunner(env={"COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns)}).invoke(app, list(map(str, words)))


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    tiny.write_checkpoint(folder / "dense")
    tiny.write_text(folder / "text.txt", 1200, seed=0)
    tiny.write_text(folder / "our words.txt", 8 * 128, seed=1)
    return folder


@pytest.fixture(scope="module")
def advised(material):
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(material)
        patched.setattr(f"{AUTO}.WORTH_RECOVERING", 0.5)  # random weights lose nothing, and would not be trained
        patched.setattr(f"{AUTO}.FEWEST_TOKENS", 1)
        patched.setattr(f"{AUTO}.RECOVERY_TOKENS", 2048)
        patched.setattr(f"{AUTO}.METHODS", ("llm_pruner", "magnitude"))
        words = ["auto", "dense", "--pruning-ratio", 0.3, "--text", "text.txt", "--calibration", "our words.txt"]
        return run(*words)


def test_the_command_that_is_printed_does_what_was_advised(advised, material, monkeypatch):
    assert advised.exit_code == 0, advised.output
    assert max(map(len, advised.stdout.splitlines()[:-1])) <= 80
    assert "minutes" in advised.stderr
    command = shlex.split(advised.stdout.splitlines()[-1])
    assert command[:4] == ["hf-prune", "prune", "dense", "dense-pruned"]
    assert command[-2:] == ["--recover", "2048"]
    found = json.loads((material / "dense-auto" / "results.json").read_text())
    row = next(row for row in found["rows"] if row["method"] == command[command.index("--method") + 1])
    best = min(
        (row for row in found["rows"] if row["pruning_ratio"] == 0.3), key=lambda row: (row["perplexity"], row["plan"])
    )
    assert row["method"] == best["method"]
    assert f"{best['times_dense']:.3f}" in advised.stdout
    monkeypatch.chdir(material)
    result = run(*command[1:])
    assert result.exit_code == 0, result.output
    made = PruningPlan.load(material / "dense-pruned" / "pruning_plan.json")
    assert made.kept_indices == PruningPlan.load(material / "dense-auto" / best["plan"]).kept_indices
    for name in ("dense-pruned", "dense-pruned-pruned"):
        assert "## What it writes" in (material / name / "README.md").read_text()


def test_an_interrupted_run_goes_on_and_a_second_one_measures_nothing(advised, material, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_prune.cli.sweep.score", None)  # nothing is scored again
    shutil.copytree(material / "dense-auto", tmp_path / "dense-auto")
    monkeypatch.chdir(material)
    monkeypatch.setattr(f"{AUTO}.METHODS", ("llm_pruner", "magnitude"))
    words = ["auto", "dense", tmp_path / "dense-auto", "--pruning-ratio", 0.3, "--text", "text.txt"]
    again = run(*words, "--calibration", "our words.txt", "--json")
    assert again.exit_code == 0, again.output
    values = json.loads(again.stdout)
    assert values["rows"] == json.loads((material / "dense-auto" / "results.json").read_text())["rows"]
    assert values["command"][1] == "prune"


def test_no_time_gives_what_was_measured_and_says_what_was_not(material, tmp_path):
    with pytest.raises(BudgetError, match="give more --minutes"):
        advise(str(material / "dense"), tmp_path / "out", pruning_ratio=0.3, minutes=1e-9)


@pytest.mark.slow
def test_a_size_to_fit_into(material, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{AUTO}.METHODS", ("magnitude",))
    text = str(material / "text.txt")
    advice = advise(str(material / "dense"), tmp_path / "out", fit="445KB", text=text, calibration=text)
    assert "--fit" in advice.command
    assert advice.plan.achieved["memory"] == pytest.approx(advice.row["pruning_ratio"], abs=0.1)
    assert advice.recovery_tokens == 0
    assert advice.row["times_dense"] < WORTH_RECOVERING < math.e
    assert RECOVERY_TOKENS == 2_000_000


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "give either --pruning-ratio"),
        ({"pruning_ratio": 0.3, "fit": "1GB"}, "give either --pruning-ratio"),
        ({"pruning_ratio": 1.5}, "pruning_ratio: found 1.5"),
        ({"pruning_ratio": 0.3, "minutes": 0}, "minutes: found 0"),
        ({"fit": "a lot"}, "fit: found 'a lot'"),
        ({"fit": "10GB"}, "nothing has to go"),
        ({"pruning_ratio": 0.3, "text": "none.txt"}, "no file at"),
        ({"pruning_ratio": 0.3, "calibration": ["none.txt"]}, "no file at"),
        ({"pruning_ratio": 0.3, "calibration": ["short.txt"]}, "windows of 128 need"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_the_model_is_loaded(values, message, material, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write_text(tmp_path / "short.txt", 40, seed=0)
    monkeypatch.setattr(f"{AUTO}.load_model", None)
    with pytest.raises(HFPruneError, match=message):
        advise(str(material / "dense"), tmp_path / "out", **values)
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_is_refused_with_what_to_do(material, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{AUTO}.free_memory", lambda _: 100_000)
    with pytest.raises(HFPruneError, match="--layers-on disk"):
        advise(str(material / "dense"), tmp_path / "out", pruning_ratio=0.3)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_report_holds_everything(advised, material):
    page = (material / "dense-auto" / "report.html").read_text(encoding="utf-8")
    for part in ("advised", "expected", "not sure", "hf-prune prune dense", "× dense", "What it writes", "num_samples"):
        assert part in page
    assert page.count('src="data:image/png;base64,') == 2  # widths, trade-off
    assert page.count("The lighthouse keeper") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("dense-auto", 500),
        ("dense-pruned-pruned", 1000),
        pytest.param("dense-auto", 1000, marks=pytest.mark.slow),
        pytest.param("dense-pruned-pruned", 500, marks=pytest.mark.slow),
    ],
)
def test_a_browser_shows_the_report_without_overflow(advised, material, tmp_path_factory, name, width):
    """The pictures stay among the test's files: look at them."""
    page = material / name / "report.html"
    if not page.exists():
        pytest.skip("the test of the command did not run")
    folder = tmp_path_factory.mktemp(f"{name}-{width}")
    probe = folder / "probe.html"
    script = "<script>document.title = document.documentElement.scrollWidth + ' of ' + innerWidth</script></body>"
    probe.write_text(page.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    common = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    common += [
        "--disable-background-networking",
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width},2400",
    ]
    picture = folder / "report.png"
    subprocess.run([*common, f"--screenshot={picture}", page.as_uri()], check=True, capture_output=True, timeout=120)
    shown = subprocess.run(
        [*common, "--dump-dom", probe.as_uri()], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    wide, inner = map(int, shown.split("<title>")[1].split("</title>")[0].split(" of "))
    assert wide <= inner == width
    from matplotlib.image import imread

    assert imread(picture).std() > 0.05  # not blank
