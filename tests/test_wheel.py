"""The wheel holds all of the package, and nothing else."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_is_the_package(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True
    )
    (wheel,) = tmp_path.glob("hf_prune-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_prune").rglob("*") if path.is_file()}
    assert {name for name in package if "__pycache__" not in name} == {
        name for name in names if ".dist-info/" not in name
    }
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "hf-prune = hf_prune.cli" in zipfile.ZipFile(wheel).read(entry_points).decode()
