"""A page: one file that loads nothing; the one script it may run is its own, named by digest.

Whatever a template is given is escaped, unless it is Markup.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

import jinja2
from markupsafe import Markup, escape

from launch.visible import JOINERS, visible
from store_schema.disk.location import open_location

_SEEN = {"\n": "↵\n", "\t": "→\t", "\r": "␍"}
"""White space that is marked; the first two keep their effect, too."""


def render(package: str, name: str, **values: Any) -> str:
    """A page from `name`.html of a package, which extends base.html of this one.

    Args:
        package: Dotted name.
        name: Of the template; `name`.css is put behind base.css, `name`.js runs where there is one.
        values: Of the template.
    """
    kit, own = files("launch.pages"), files(package)
    templates = {part: _read(kit, part) for part in ("base.html", "kit.html")}
    templates["page.html"] = _read(own, f"{name}.html")
    script = _read(own, f"{name}.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.DictLoader(templates)
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.get_template("page.html").render(
        values,
        css=Markup(_read(kit, "base.css") + _read(own, f"{name}.css")),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write_page(path: str, html: str) -> None:
    """Write a page to a path or URL that a person gave.

    Raises:
        StorageError: A file cannot be written.
    """
    folder, _, name = path.rpartition("/")
    location = open_location(folder or ("/" if path.startswith("/") else "."))
    location.write_atomic(name, html.encode())


def looks(package: str, name: str) -> list[str]:
    """The files that such a page is made of, as they are now."""
    kit, own = files("launch.pages"), files(package)
    parts = [_read(kit, part) for part in ("base.html", "kit.html", "base.css")]
    return [*parts, *(_read(own, f"{name}.{kind}") for kind in ("html", "css", "js"))]


def _read(folder: Traversable, name: str) -> str:
    path = folder.joinpath(name)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def text_html(text: str, *, kept: str = JOINERS, dots: bool = True) -> Markup:
    """Text with everything in it to be seen; nothing that a browser obeys.

    Args:
        text: Of unknown origin.
        kept: Characters left as they are though they are not printable.
        dots: Whether spaces are marked (class "w").
    """
    parts: list[str] = []
    for run in re.findall(r" +|[^ ]", text, re.DOTALL):
        if run[0] == " ":
            parts.append(f'<i class="w">{run}</i>' if dots else run)
        elif run in _SEEN:
            parts.append(f'<i class="e">{_SEEN[run][0]}</i>{_SEEN[run][1:]}')
        elif run in kept or run.isprintable():
            parts.append(escape(run))
        else:
            parts.append(f'<i class="e">{escape(visible(run))}</i>')
    return Markup("".join(parts))
