"""HTML pages: one file that loads nothing and may run only its own script, allowed by digest.

All values of a template are escaped, unless they are Markup.
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
"""White space that is shown by a sign; newline and tab keep their effect, too."""


def render(package: str, name: str, *, style: str | None = None, **values: Any) -> str:
    """Render the template `name`.html of a package, which extends base.html of this one.

    Args:
        package: Dotted name of the package.
        name: Name of the template; `name`.css is appended to base.css, `name`.js runs if it exists.
        style: Name of another page of the package, whose style sheet it has.
        values: Values of the template.
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
        css=Markup(_read(kit, "base.css") + _read(own, f"{style or name}.css")),
        script=Markup(script),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def write_page(path: str, html: str) -> None:
    """Write a page to a path or URL.

    Raises:
        StorageError: A file cannot be written.
    """
    folder, _, name = path.rpartition("/")
    location = open_location(folder or ("/" if path.startswith("/") else "."))
    location.write_atomic(name, html.encode())


def template_files(package: str, name: str) -> list[str]:
    """Contents of the template files of such a page, to notice when they change."""
    kit, own = files("launch.pages"), files(package)
    parts = [_read(kit, part) for part in ("base.html", "kit.html", "base.css")]
    return [*parts, *(_read(own, f"{name}.{kind}") for kind in ("html", "css", "js"))]


def _read(folder: Traversable, name: str) -> str:
    path = folder.joinpath(name)
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def text_html(text: str, *, kept: str = JOINERS, dots: bool = True) -> Markup:
    """Text as escaped HTML in which white space and characters that are not printable are visible.

    Args:
        text: Text of unknown origin.
        kept: Characters left as they are although they are not printable.
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
