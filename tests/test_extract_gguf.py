"""GGUF files as sources and targets of the stages up to extraction."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from align.prepare import checked
from extract.scoring.sources import check_source
from store_schema.config import ModelRef, load_run
from store_schema.model.models import local_ref, resolve_model, resolve_tokenizer, with_folder
from store_schema.plan.plan import Plan
from store_schema.plan.run_plan import open_plan
from store_schema.text.tokenizer import SegmentTokenizer
from tests.command import ok
from tests.extract_runs import plan_run, write_run
from tests.tiny import tiny_model
from tests.tiny_gguf import write_gguf

# transformers reads numbers of a GGUF file through arrays of one element.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with q/m.gguf; the cache is tmp_path/cache."""
    monkeypatch.setenv("LOGITFUSE_CACHE", str(tmp_path / "cache"))
    model = tiny_model(tmp_path / "llama", "llama")
    (tmp_path / "files/q").mkdir(parents=True)
    write_gguf(model, tmp_path / "files/q/m.gguf", quantization="F32")
    return tmp_path / "files"


def forms(files: Path) -> dict[str, dict[str, str]]:
    """All that a run file may write for files/q/m.gguf."""
    return {
        "file": {"model": str(files / "q/m.gguf")},
        "folder": {"model": str(files / "q"), "gguf_file": "m.gguf"},
        "below": {"model": str(files), "gguf_file": "q/m.gguf"},
        "absolute": {"model": str(files), "gguf_file": str(files / "q/m.gguf")},
    }


def unpacked(tmp_path: Path) -> list[str]:
    return [p.name for p in (tmp_path / "cache/gguf").iterdir() if p.is_dir()]


def test_every_form_is_the_same_folder_however_often_it_is_resolved(
    files: Path, tmp_path: Path
) -> None:
    folder = resolve_model(ModelRef.model_validate(forms(files)["file"]))
    for form in forms(files).values():
        ref = ModelRef.model_validate(form | {"revision": "abc", "bos": "never"})
        once = local_ref(ref)
        assert (once.model, once.gguf_file, once.revision) == (str(folder), None, None)
        assert once.bos == "never"
        assert local_ref(once) == once == with_folder(ref, folder)
        assert (
            resolve_model(ref) == resolve_model(once) == resolve_tokenizer(once, name="m") == folder
        )
    assert unpacked(tmp_path) == [folder.name]


@pytest.mark.parametrize("form", ["file", "folder", "absolute"])
def test_a_source_and_a_target_are_extracted_from_a_file(
    files: Path, tmp_path: Path, form: str
) -> None:
    ref = forms(files)[form]
    path = write_run(
        tmp_path, {"target": files}, sources={"g": {**ref, "dtype": "float32"}}, target=ref
    )
    plan_run(path)
    run = load_run(path)
    plan = open_plan(run)
    assert run.sources["g"].gguf_file == ref.get("gguf_file")
    ok("extract", "run", path, "--dry-run")
    source = check_source(run, "g", plan)
    assert source.spec.model_vocab_size == source.tokenizer.vocab_size
    assert len(unpacked(tmp_path)) == 2  # as float32, and as the file has it


def test_alignment_knows_how_much_a_target_of_a_file_reads(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its config.json lies where the file was unpacked."""
    (files / "config.json").write_text('{"max_position_embeddings": 7}')  # of another model
    path = write_run(tmp_path, {"g": files, "target": files}, target=forms(files)["below"])
    run = load_run(path)
    given: list[object] = []
    monkeypatch.setattr(checked, "plan_for", lambda *_, **options: given.append(options))
    target = SegmentTokenizer.load(run.target, name="target")
    record = SimpleNamespace(tokenizers={"target": "another's"})
    plan = cast(Plan, SimpleNamespace(record=record, shards=()))
    checked.planned_for_target(run, plan, target, keep=False)
    [options] = given
    assert isinstance(options, dict)
    assert options["max_positions"] == 512
