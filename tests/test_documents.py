"""The documents: every command line in them is one that the program takes, and every link leads somewhere."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from hf_prune.cli.flags import read_flags
from hf_prune.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands


def commands(text):
    """Whole command lines: those of code blocks, without what stands for something else (`...`)."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [line.strip() for line in lines if line.strip().startswith("hf-prune ")]
    return [line.split(" #")[0] for line in found if "..." not in line and "|" not in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_taken(page):
    for line in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(line)[1:]
        if words[0].startswith("-"):
            continue
        context = COMMANDS[words[0]].make_context(words[0], words[1:])  # parses, and runs nothing
        read_flags({"settings": context.params.get("settings") or ()})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found.read_text(encoding="utf-8")), f"{page.name}: {target}"


def anchors(text):
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_a_command_that_is_none_is_found():
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["prune"].make_context("prune", ["model", "out", "--norm", "l1"])
    assert commands("    hf-prune eval a \\\n  --text b  # why\nhf-prune x | y") == ["hf-prune eval a --text b "]
