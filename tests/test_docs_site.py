"""The site of `make docs`: every key explained, and nothing fetched from elsewhere by who reads it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import pytest
from pydantic import Field

from fuse_train.selectors import SELECTORS
from logitfuse import STAGES
from store_schema.paths import PathText
from tests import docs_blocks
from tests.browser import browse, needs_browser

REPOSITORY = Path(__file__).resolve().parent.parent
OUTSIDE = re.compile(
    r"<(?:script|link|img|iframe|source)[^>]*\s(?:src|href)=\"?(?:https?:)?//[^>]*>"
)
CSS_OUTSIDE = re.compile(r"(?:url\(|@import\s)['\"]?(?:https?:)?//")


def _loaded(name: str) -> ModuleType:
    path = REPOSITORY / f"docs/hooks/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


configuration = _loaded("configuration")


def built(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    """As `make docs` builds, into a folder of its own. --quiet would hide warnings from --strict."""
    pytest.importorskip("material", reason="needs the extra `docs`")
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder, *map(str, options)],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = built(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("link", ["other.md", "index.md#no-such", "/index.html"])
def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path, link: str) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text(f"# Page\n\n[link]({link})\n")
    config = tmp_path / "mkdocs.yml"
    inherited = f"INHERIT: {REPOSITORY / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: []\nextra_css: []\n"
    config.write_text(inherited + "nav: [index.md]\nexclude_docs: ''\nnot_in_nav: ''\n")
    done = built(tmp_path / "site", "--config-file", config)
    assert done.returncode == 1
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert len(warnings) == 1
    assert f"'{link}'" in warnings[0]


def test_every_key_of_the_run_file_is_explained() -> None:
    texts = configuration.documented_fields()
    assert len(texts) > 200
    assert not [place for place, text in texts.items() if not text.strip()]
    assert texts["train.lr"] == "Peak learning rate."
    assert "Exponential weights" in texts["train.hedge"]


def test_keys_that_the_pages_name_exist() -> None:
    keys = {re.sub(r"\[\]", "", place) for place in configuration.documented_fields()}
    named = re.compile(rf"`((?:{'|'.join(configuration.SECTIONS)})\.[a-z_][\w.\[\]]*\w)[`:= ]")
    found = [
        (page.name, key)
        for page in docs_blocks.PAGES
        for key in named.findall(page.read_text(encoding="utf-8"))
        if not key.endswith((".py", ".json", ".jsonl", ".html", ".yaml"))
    ]
    assert len(found) > 60
    assert not [(page, key) for page, key in found if key.replace("[]", "") not in keys]


@pytest.mark.parametrize(
    ("annotation", "metadata", "text"),
    [
        (bool, (), "true or false"),
        (int | None, tuple(Field(ge=1, lt=2000).metadata), "integer, ≥ 1, < 2,000 or null"),
        (PathText, (), "path or URL"),
        (Literal["a", "b"], (), "`a` or `b`"),
        (tuple[float, ...], (), "list of number"),
        (dict[str, Annotated[int, Field(gt=0)]], (), "mapping of text to integer, > 0"),
        (str, (SELECTORS.choice,), " or ".join(f"`{name}`" for name in SELECTORS.table)),
    ],
)
def test_types_are_in_words(annotation: object, metadata: tuple[object, ...], text: str) -> None:
    assert configuration.type_text(annotation, metadata) == text


def test_the_site_has_all_commands_and_keys(site: Path) -> None:
    commands = (site / "reference/cli.html").read_text(encoding="utf-8")
    found = set(re.findall(r"<h[34] [^>]*>logitfuse ([^<]+)<", commands))
    assert {name.split()[0] for name in found} == set(STAGES)
    assert {"store tune", "eval pool", "train run"} <= found
    assert "Sentinel" not in commands
    assert "Default: <code>4096</code>." in commands  # of store tune --positions
    assert "<td><code>--help</code></td>" not in commands
    page = (site / "reference/configuration.html").read_text(encoding="utf-8")
    for place in configuration.documented_fields():
        assert f'id="{place}"' in page, place
    assert "Fuse several language models into one" in (site / "index.html").read_text()


def test_who_reads_the_site_asks_nobody_else_for_anything(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        assert not OUTSIDE.findall(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not CSS_OUTSIDE.findall(sheet.read_text(encoding="utf-8")), sheet
    assert OUTSIDE.search('<link rel="stylesheet" href="https://fonts.example/x.css">')
    assert CSS_OUTSIDE.search("@import 'https://fonts.example/x.css'")


@needs_browser
def test_search_works_in_a_folder_without_a_server(site: Path, tmp_path: Path) -> None:
    page = site / "reference/cli.html?q=hedge"
    dom, errors = browse(tmp_path, page, "--virtual-time-budget=20000")
    assert re.search(r"[1-9]\d* matching documents", dom), errors[-2000:]
    assert "CONSOLE" not in errors, errors[-2000:]
