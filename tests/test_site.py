"""The documents build into a site without a warning; it fetches nothing from elsewhere and names all that is public."""

import logging
import re
import sys
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

import hf_prune

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from recipes import RECIPES, section

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder, messages = tmp_path_factory.mktemp("site"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    logging.getLogger("mkdocs").removeHandler(handler)
    assert not messages
    return folder


def test_nothing_is_fetched_from_elsewhere(site):
    pages = [path.read_text(encoding="utf-8") for path in site.rglob("*.html")]
    assert len(pages) > 25
    fetched = r"<(?:script|img|iframe|source)[^>]* src=\"(https?:)?//|<link[^>]* href=\"(https?:)?//"
    assert not [found for page in pages for found in re.findall(fetched, page)]


def test_public_names_are_in_the_reference(site):
    reference = (site / "api.html").read_text(encoding="utf-8")
    documented = set(re.findall(r'<h3 id="(hf_prune\.\w+)"', reference))
    assert documented == {f"hf_prune.{name}" for name in hf_prune.__all__}


def test_notebooks_and_pages_of_the_repository_are_pages(site):
    assert 'class="language-python' in (site / "first_pruning_notebook.html").read_text(encoding="utf-8")
    assert 'href="security.html' in (site / "cli.html").read_text(encoding="utf-8")


def test_recipes_are_what_the_script_writes():
    page = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    titles = re.findall("^## (.*)", page, re.M)
    assert titles == [recipe.title for recipe in RECIPES]
    for recipe in (RECIPES[0], RECIPES[-1]):
        assert section(recipe) in page


def test_lists_are_lists(site):
    for path in site.glob("*.html"):
        text = re.sub(r"<pre.*?</pre>", "", path.read_text(encoding="utf-8"), flags=re.S)
        for paragraph in re.findall(r"<p>(.*?)</p>", text, flags=re.S):
            assert not re.search(r"\n\s*([-*|]|\d+\.) ", paragraph), (path.name, paragraph)
