"""Pages in a real browser: what a script finds of them, and what the browser complains of."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed")

_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
    "--dump-dom",
)


def browse(folder: Path, path: Path, *options: str) -> tuple[str, str]:
    """The page's document after its script ran, and what the browser complained of."""
    done = subprocess.run(
        [
            str(CHROMIUM),
            *_OPTIONS,
            *options,
            f"--user-data-dir={folder / 'profile'}",
            f"file://{path}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout, done.stderr


def framed(folder: Path, page: str, probe: str, *options: str) -> list[dict[str, object]]:
    """What a probe, which posts it as JSON, reports of a page at phone and desk width."""
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    assert probed != page
    (folder / "probed.html").write_text(probed.replace("</body>", probe + "</body>"))
    frames = "".join(
        f"<iframe src=probed.html width={w} height=900></iframe>" for w in (320, 390, 1280)
    )
    (folder / "frames.html").write_text(
        "<!doctype html><meta charset=utf-8><pre id=out></pre><script>addEventListener('message',"
        "e => out.append(e.data + '\\n'))</script>" + frames
    )
    dom, errors = browse(folder, folder / "frames.html", *options)
    found = re.search(r'<pre id="out">(.*?)</pre>', dom, re.DOTALL)
    assert found is not None, errors[-2000:]
    assert "CONSOLE" not in errors, errors[-2000:]
    return [json.loads(html.unescape(line)) for line in found[1].split("\n") if line]
