"""`report.html`: a Markdown page (a model card, the table of a sweep) and its pictures in one file, for any browser."""

from __future__ import annotations

import base64
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #22252a; --paper: #fff; --line: #e5e7eb; --soft: #f5f6f8; --link: #3b6fb6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #dfe2e7; --paper: #16181c; --line: #343840; --soft: #22252b; --link: #8ab4f0; }}
}}
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.55 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: anywhere; }}
h1, h2 {{ line-height: 1.25; }} h2 {{ margin-top: 2.2rem; }} a {{ color: var(--link); }}
img {{ display: block; max-width: 100%; margin: 1.2rem 0; background: #fff; border-radius: 4px; }}
table {{ border-collapse: collapse; display: block; overflow-x: auto; margin: 1rem 0; overflow-wrap: normal; }}
th, td {{ border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: left; vertical-align: top; }}
th, [style*="right"] {{ white-space: nowrap; }} [style*="right"] {{ text-align: right; }}
code, pre {{ background: var(--soft); border-radius: 4px; font: 13px/1.5 ui-monospace, monospace; }}
code {{ padding: .1rem .3rem; }} pre code {{ padding: 0; }}
pre {{ padding: .8rem; max-height: 24rem; overflow: auto; overflow-wrap: normal; }}
pre code.language-bash {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
</style></head><body>
{body}</body></html>
"""
_HEADER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_PICTURE = re.compile(r'<img src="([^"/]+\.(?:png|svg))"')
_TYPES = {".png": "image/png", ".svg": "image/svg+xml"}


def html_page(markdown: str, title: str, folder: Path) -> str:
    """One self-contained page of `markdown`: its pictures in `folder` are put into it, its own HTML is shown as text.

    Args:
        markdown: the text; the metadata of a card and comments are left out.
        title: of the page.
        folder: where its pictures lie.
    """
    from html import escape

    from markdown_it import MarkdownIt

    text = re.sub(r"<!--.*?-->\n?", "", _HEADER.sub("", markdown), flags=re.DOTALL)
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)

    def put_in(found: re.Match[str]) -> str:
        path = folder / found[1]
        if not path.is_file():
            return found[0]
        return f'<img src="data:{_TYPES[path.suffix]};base64,{base64.b64encode(path.read_bytes()).decode()}"'

    return _PAGE.format(title=escape(title), body=_PICTURE.sub(put_in, body))
