"""What the site needs beside `docs/`: pages that lie elsewhere in the repository, and links to them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
ELSEWHERE = {"README.md": "index.md", "SECURITY.md": "security.md", "hf_prune/texts/README.md": "bundled_texts.md"}
ELSEWHERE |= {f"examples/{path.name}": f"{path.stem}_notebook.md" for path in (ROOT / "examples").glob("*.ipynb")}
"""Pages outside `docs/`, and what they are called on the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie elsewhere."""
    for source, name in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        text = notebook_page(text, Path(source).name) if source.endswith(".ipynb") else text
        files.append(File.generated(config, name, content=with_site_links(text, (ROOT / source).parent)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to such pages to where they are on the site."""
    return with_site_links(markdown, ROOT / "docs") if page.file.generated_by is None else markdown


def notebook_page(text: str, name: str) -> str:
    """A notebook as Markdown: its texts, its code, and what it printed."""
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        if printed := "".join("".join(output["text"]) for output in cell.get("outputs", ())):
            parts.append(f"```text\n{printed}```")
    return "\n\n".join([*parts, f"This page is `examples/{name}`; it runs in the tests."])


def with_site_links(text: str, folder: Path) -> str:
    """Markdown whose links to files, seen from `folder`, lead to pages of the site; what is no page loses its link."""

    def led(match: re.Match[str]) -> str:
        path = folder / match["path"]
        if "://" in match["path"] or not path.is_file():
            return match[0]
        inside = path.resolve().relative_to(ROOT).as_posix()
        if inside not in ELSEWHERE and not inside.startswith("docs/"):
            return match["text"]
        return f"[{match['text']}]({ELSEWHERE.get(inside, inside.removeprefix('docs/'))}{match['anchor']})"

    return re.sub(r"\[(?P<text>[^\]]*)\]\((?P<path>[^)\s#]+)(?P<anchor>[^)\s]*)\)", led, text)
