"""What docs/extending.md adds, in one file and one line each, goes through its stage."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from fuse_train.divergences.classes import Classes
from fuse_train.selectors.rule import RuleSelector
from store_schema.config import load_run
from store_schema.disk.location import open_location
from store_schema.layout import Arrays
from store_schema.store.reader import StoreReader
from tests import added_kinds, docs_tables
from tests.aligned_factory import make_run
from tests.extract_runs import write_run
from tests.judge_runs import answered, make_models
from tests.test_align_run import make_run as make_source
from tests.test_fuse_train_selectors import view
from tests.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_bare_processes")

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "extending.md"
PACKAGES = {
    "selectors": "fuse_train",
    "divergences": "fuse_train",
    "methods": "align",
    "engine_kinds": "extract",
    "judge_kinds": "extract",
    "merge": "fuse_train",
}
MOST_LINES = 30


@dataclass(frozen=True)
class Example:
    """One thing of the page: its file, and its line in the registry."""

    place: str
    code: str
    registry: str
    line: str

    @property
    def entry(self) -> tuple[str, str]:
        """Name and place of the line."""
        found = re.fullmatch(r'\s*"(\w+)": "([\w.:]+)",\s*', self.line)
        assert found, self.line
        return found[1], found[2]


def examples() -> dict[str, Example]:
    """By the folder that each adds to."""
    blocks = re.findall(r"```python (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    found = {}
    for (place, code), (registry, line) in zip(blocks[::2], blocks[1::2], strict=True):
        folder = registry.partition("/")[0]
        found[folder] = Example(place, code, registry, line)
    return found


EXAMPLES = examples()


def written(folder: Path, kind: str) -> Path:
    """The example's file and line in a folder for `PYTHONPATH`; returns the file."""
    example, top = EXAMPLES[kind], PACKAGES[kind]
    package = ".".join([top, *example.registry.split("/")[:-1]])
    path = f"{top}/{example.place}"
    return added_kinds.write(folder, path, example.code, package, *example.entry)


def loaded(path: Path) -> ModuleType:
    """The example as a module of its own."""
    spec = importlib.util.spec_from_file_location("example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def python(folder: Path, *words: str) -> str:
    """Output of Python with the example of `folder` added."""
    path = os.pathsep.join((str(folder), str(REPOSITORY)))
    done = subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def logitfuse(folder: Path, *words: str) -> str:
    """Output of `logitfuse` with the example of `folder` added."""
    return python(folder, "-m", "logitfuse", *words)


def settings(**values: str) -> list[str]:
    """`--set` words."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


@pytest.mark.parametrize("kind", PACKAGES)
def test_an_example_is_one_short_file_and_one_line(kind: str) -> None:
    example = EXAMPLES[kind]
    assert len(example.code.splitlines()) <= MOST_LINES
    assert len(example.line.strip().splitlines()) == 1
    name, place = example.entry
    module = f"{PACKAGES[kind]}/{example.place}".removesuffix(".py").replace("/", ".")
    assert place.startswith(f"{module}:")
    assert name == Path(example.place).stem
    assert (REPOSITORY / PACKAGES[kind] / example.registry).exists()


@pytest.mark.parametrize("mark", docs_tables.TABLES)
def test_tables_of_the_docs_are_those_of_the_registries(mark: str) -> None:
    before, after = docs_tables.written(mark)
    assert before == after, "run: python -m tests.docs_tables"


def test_the_selector_trains_and_is_compared(tmp_path: Path) -> None:
    path = written(tmp_path, "selectors")
    make_run(tmp_path / "made", train={"control": False, "max_steps": 2, "selector": "uniform"})
    run_file = str(tmp_path / "made" / "run.yaml")
    logitfuse(
        tmp_path, "train", "run", run_file,
        *settings(**{"train.selector": "recent", "train.recent.sharpness": "2"}),
    )  # fmt: skip
    log = tmp_path / "made/run/logs/train_steps.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    weights = steps[-1]["weights"]
    assert sum(weights.values()) == pytest.approx(1.0, abs=1e-5)
    assert max(weights.values()) - min(weights.values()) > 0.01
    shown = logitfuse(
        tmp_path, "train", "selector", run_file,
        *settings(**{"train.selector": "asn", "train.asn.pretrain_steps": "2"}),
    )  # fmt: skip
    assert re.search(r"^recent +\d", shown, re.MULTILINE), shown
    example = loaded(path)
    seen = view()
    got = RuleSelector(example.Recent("recent"), example.RecentSection(sharpness=2.0))(seen)
    logits = torch.where(seen.covered_BTM, 2.0 * seen.past_logprobs_BTM.nan_to_num(0.0), -torch.inf)
    torch.testing.assert_close(got, logits.softmax(-1).nan_to_num(0.0))


def test_the_divergence_trains_and_its_slope_is_right(tmp_path: Path) -> None:
    path = written(tmp_path, "divergences")
    make_run(tmp_path / "made", train={"control": False, "max_steps": 2, "selector": "uniform"})
    logitfuse(
        tmp_path, "train", "run", str(tmp_path / "made" / "run.yaml"),
        *settings(**{"train.loss.divergence": "squared"}),
    )  # fmt: skip
    log = tmp_path / "made/run/logs/train_steps.jsonl"
    steps = [json.loads(line) for line in log.read_text().splitlines()]
    assert 0 < steps[-1]["fusion"] < 1  # a cross-entropy would be some nats
    p, q = torch.rand(2, 5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    logq = q[..., :-1].log().requires_grad_()
    own = (logq.exp(), 1 - logq.exp().sum(-1))
    expected = 0.5 * ((own[0] - p[..., :-1]) ** 2).sum(-1) + 0.5 * (own[1] - p[..., -1]) ** 2
    (slope,) = torch.autograd.grad(expected.sum(), logq)
    classes = Classes(p[..., :-1], p[..., -1], q[..., :-1], logq.detach(), q[..., -1])
    value, got = loaded(path).Squared("squared").value_and_slope(classes, None)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(got, slope)


def test_the_method_aligns_and_keeps_the_labels(tmp_path: Path) -> None:
    written(tmp_path, "methods")
    run_file = make_source(tmp_path / "made")
    shown = logitfuse(
        tmp_path, "align", "run", str(run_file),
        *settings(**{"align.method": "labels", "store.preset": "exact"}),
    )  # fmt: skip
    assert "one" in shown
    run = load_run(run_file)
    source = StoreReader.open(open_location(run.store_url("one"))).read(0)
    aligned = StoreReader.open(open_location(f"{run.folder}/aligned/one"))
    assert aligned.manifest.settings["method"] == "labels"
    got = aligned.read(0)
    expected = dict(zip(places(source), source["label_logprobs"], strict=True))
    same = [expected.get(place, np.nan) for place in places(got)]
    known = ~np.isnan(same)
    assert 0.1 < known.mean() < 0.9
    np.testing.assert_allclose(got["label_logprobs"], same, rtol=1e-6)
    np.testing.assert_array_equal(np.diff(got["entry_offsets"]), known)
    np.testing.assert_array_equal(got["entry_ids"], got["token_ids"][known])
    np.testing.assert_allclose(got["tail_mass"], np.where(known, 1 - np.exp(same), 1), atol=1e-6)


def places(arrays: Arrays) -> list[tuple[int, int, int]]:
    """Segment, first byte and end of each token."""
    found, offsets = [], arrays["token_offsets"]
    for segment in range(len(offsets) - 1):
        start = 0
        for end in arrays["byte_ends"][offsets[segment] : offsets[segment + 1]].tolist():
            found.append((segment, start, end))
            start = end
    return found


def test_the_engine_scores(tmp_path: Path) -> None:
    written(tmp_path, "engine_kinds")
    models = {"one": "llama", "target": "llama"}
    folders = {
        name: tiny_model(tmp_path / "models" / name, arch, tiny_tokenizer("byte_level"))
        for name, arch in models.items()
    }
    (tmp_path / "made").mkdir()
    run_file = write_run(tmp_path / "made", folders, extract={"engine": "flat", "top_k": 5})
    for words in (("corpus", "build"), ("extract", "plan"), ("extract", "run")):
        logitfuse(tmp_path, *words, str(run_file))
    run = load_run(run_file, ("extract.engine=auto",))
    reader = StoreReader.open(open_location(run.store_url("one")))
    assert reader.manifest.settings["engine"] == "flat"
    got = reader.read(0)
    nats = np.log(len(reader.vocabulary))
    known = ~np.isnan(got["label_logprobs"])
    assert known.mean() > 0.9
    np.testing.assert_allclose(got["label_logprobs"][known], -nats, rtol=1e-5)
    np.testing.assert_array_equal(np.diff(got["entry_offsets"]), 5 * known)
    np.testing.assert_allclose(got["tail_mass"][known], 1 - 5 * np.exp(-nats), rtol=1e-5)


def test_the_judge_judges(tmp_path: Path) -> None:
    written(tmp_path, "judge_kinds")
    (tmp_path / "made").mkdir()
    models = make_models(tmp_path / "models")
    said = {"coder": lambda *_: "3 + 4 is 7?", "writer": lambda *_: "no"}
    run_file = str(answered(tmp_path / "made", models, said))
    judges = json.dumps([{"kind": "length", "cost": 2}])
    shown = logitfuse(tmp_path, "judge", run_file, *settings(**{"judge.judges": judges}))
    assert "length" in shown
    best = {row["prompt_id"]: row for row in rows_of(tmp_path / "made/run/judged/best.parquet")}
    assert (best["sum"]["author"], best["held"]["author"]) == ("coder", "writer")
    scores = rows_of(tmp_path / "made/run/judged/scores.parquet")
    assert {row["score"] for row in scores if row["prompt"] == "sum"} == {0.0, -18.0}


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Of a Parquet file."""
    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows


def test_the_method_of_merging_merges(tmp_path: Path) -> None:
    written(tmp_path, "merge")
    tokenizer = tiny_tokenizer()
    models = [tiny_model(tmp_path / str(i), "llama", tokenizer, seed=i) for i in range(3)]
    out = tmp_path / "out"
    shown = logitfuse(tmp_path, "merge", str(out), "--method", "median", *map(str, models))
    assert shown.startswith("merged by median: ")
    each = [load_file(model / "model.safetensors") for model in models]
    for name, tensor in load_file(out / "model.safetensors").items():
        expected = torch.stack([weights[name] for weights in each]).median(0).values
        assert torch.equal(tensor, expected)


CONTENTS = """
from fuse_train.config import TrainSection
from store_schema.fingerprint import fingerprint
for given in {given!r}:
    print(fingerprint(TrainSection.model_validate(given).content()))
"""


def test_what_is_added_changes_the_fingerprint_of_no_run_but_its_own(tmp_path: Path) -> None:
    from fuse_train.config import TrainSection
    from store_schema.fingerprint import fingerprint

    written(tmp_path, "selectors")
    chosen = {"selector": "recent"}
    given = [{}, {"selector": "hedge"}, chosen, chosen | {"recent": {"sharpness": 3.0}}]
    shown = python(tmp_path, "-c", CONTENTS.format(given=given))
    plain, hedge, own, other = shown.split()
    assert plain == fingerprint(TrainSection().content())
    assert hedge == fingerprint(TrainSection(selector="hedge").content())
    assert len({plain, hedge, own, other}) == 4
