"""What mkdocs does with these pages, which also serve readers of the repository.

The front page is the README, the configuration reference is made from the run file's models, and linked
files of the repository become pages.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import configuration
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLE = re.compile(r"\]\((?:\.\./)?(examples/[\w./-]+\.(?:yaml|sh|py))\)")
LANGUAGES = {".yaml": "yaml", ".sh": "bash", ".py": "python"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are no files of docs/."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_from_readme(readme)))
    files.append(
        File.generated(
            config,
            "reference/configuration.md",
            content=(ROOT / "docs/hooks/configuration.md").read_text(encoding="utf-8")
            + configuration.reference(),
        )
    )
    pages = [file.content_string for file in files.documentation_pages()]
    for name in sorted({name for page in [readme, *pages] for name in EXAMPLE.findall(page)}):
        files.append(File.generated(config, name + ".md", content=_example(name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links, comments and titles of code as this Markdown has them."""
    here = posixpath.dirname(page.file.src_uri)

    def example(found: re.Match[str]) -> str:
        return f"]({posixpath.relpath(found[1] + '.md', here or '.')})"

    markdown = EXAMPLE.sub(example, markdown)
    markdown = markdown.replace("](../README.md", "](index.md")
    markdown = re.sub(r"^<!-- .*? -->$", "", markdown, flags=re.MULTILINE)
    return re.sub(r"^```python (\S+\.py)$", r'```python title="\1"', markdown, flags=re.MULTILINE)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Tables of options without `--help`, and a default, if there is one, behind the description."""
    if page.file.src_uri != "reference/cli.md":
        return html
    html = re.sub(r"<tr>\s*<td><code>--help</code></td>.*?</tr>\s*", "", html, flags=re.DOTALL)
    html = html.replace("<code>Sentinel.UNSET</code>", "").replace("<th>Default</th>", "")

    def default(found: re.Match[str]) -> str:
        return f" Default: {found[1]}.</td></tr>" if found[1] else "</td></tr>"

    html = re.sub(r"</td>\s*<td>(<code>[^<]*</code>)?</td>\s*</tr>", default, html)
    empty = (
        r"<p><strong>Options:</strong></p>\s*<table>\s*<thead>(?:(?!</thead>).)*</thead>\s*"
        r"<tbody>\s*</tbody>\s*</table>"
    )
    return re.sub(empty, "", html, flags=re.DOTALL)


def _from_readme(text: str) -> str:
    """The README, its links seen from docs/, without a list of pages beside it."""
    return "---\nhide: [navigation]\n---\n\n" + re.sub(r"\]\(docs/", "](", text)


def _example(name: str) -> str:
    text = (ROOT / name).read_text(encoding="utf-8")
    return f"# {name}\n\n```{LANGUAGES[Path(name).suffix]}\n{text}```\n"
