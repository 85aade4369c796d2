"""`logitfuse judge`: scores, votes, the corpus that comes out, and what is refused or counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from extract.corpus.corpus import corpus_location, iter_documents, open_corpus, read_documents
from store_schema.config import load_run
from store_schema.layout import Finish
from tests.command import ok
from tests.extract_runs import write_run
from tests.judge_runs import (
    PROMPTS,
    RIGHT,
    answered,
    authors,
    best_of,
    half_right,
    judged,
    judges,
    make_models,
    not_judged,
    right,
    say,
    scores_of,
    write_functions,
    wrong,
)

pytestmark = pytest.mark.usefixtures("quick_processes")

REPOSITORY = Path(__file__).resolve().parent.parent
EXACT = judges("exact_answer")


@pytest.fixture(scope="session")
def chat_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_models(tmp_path_factory.mktemp("chat_models"))


@pytest.fixture
def run(tmp_path: Path, chat_models: dict[str, Path]) -> Path:
    """coder is right on two prompts, writer on all."""
    return answered(tmp_path, chat_models, {"coder": half_right, "writer": right})


def test_the_best_answers_become_a_corpus(run: Path, chat_models: dict[str, Path]) -> None:
    said = judged(run, *EXACT)
    assert authors(run) == ["writer", "coder", "writer", "coder", "writer", "writer"]
    best = best_of(run)
    assert best["sum"].settled_by == "votes"
    assert best["half"].settled_by == "order"
    assert {name: row.response for name, row in best.items()} == RIGHT
    assert "prompts settled by: order 2, votes 4" in said
    assert "prompts that contain their answer, kept (judge.drop_held): 1 (held)" in said
    rows = scores_of(run)
    assert len(rows) == 2 * len(PROMPTS)
    assert {row.judge for row in rows} == {"exact_answer"}
    assert {(r.prompt, r.source) for r in rows if r.score == 1.0} == {
        *((name, "writer") for name in PROMPTS),
        *((name, "coder") for name in ("half", "far")),
    }
    assert sum(row.best for row in rows) == len(PROMPTS)
    assert judged(run, *EXACT) == "judge complete, nothing to do\n"
    # The corpus is an input as it is.
    again = run.parent / "again"
    again.mkdir()
    place = run.parent / "run/judged/best.parquet"
    second = write_run(again, chat_models, corpus={"inputs": [{"path": str(place)}]})
    ok("corpus", "build", second)
    location = corpus_location(load_run(second))
    found = {
        d.document_id: d for d in iter_documents(read_documents(location, open_corpus(location)))
    }
    assert set(found) == {row.id for row in best.values()}
    assert found["sum/writer/0"].text == "7"
    assert json.loads(found["sum/writer/0"].context or "") == {"prompt": "What is 3 + 4?"}
    assert found["far/coder/0"].split == "test"
    talk = found["talk/turn-0/writer/0"]
    assert (talk.text, talk.domain) == ("2", "chat")
    assert json.loads(talk.context or "") == {
        "messages": [{"role": "user", "content": "Hi, what is 5 - 3?"}]
    }
    ok("extract", "plan", second)


def test_a_least_score_drops_prompts_that_nobody_answers_rightly(
    tmp_path: Path, chat_models: dict[str, Path]
) -> None:
    path = answered(tmp_path, chat_models, {"coder": half_right, "writer": wrong})
    said = judged(path, *judges({"kind": "exact_answer", "min_score": 1}))
    assert sorted(best_of(path)) == ["far", "half"]
    assert {row.author for row in best_of(path).values()} == {"coder"}
    assert f"no answer scored as high as a judge's min_score: {len(PROMPTS) - 2}" in said
    # Their scores are kept, and taken again when the least score is another.
    assert {row.prompt for row in scores_of(path)} == set(PROMPTS)
    parts = sorted((path.parent / "run/judged/parts").rglob("*.json"))
    before = [part.stat().st_mtime_ns for part in parts]
    judged(path, *EXACT)
    assert sorted(best_of(path)) == sorted(PROMPTS)
    assert [part.stat().st_mtime_ns for part in parts] == before


def test_show(run: Path) -> None:
    assert "nothing is judged" in not_judged("show", run)
    judged(run, *EXACT)
    said = judged("show", run)
    assert said.count("best, of ") == len(PROMPTS)
    assert "user: Hi, what is 5 - 3?" in said
    said = judged("show", run, "--prompt", "sum")
    assert "1/1  sum  domain sums  split train" in said
    assert "best, of writer: 7" in said
    assert "writer 0 *" in said
    assert "1 (1)" in said
    assert judged("show", run, "--domain", "chat").count("best, of") == 1
    assert judged("show", run, "--author", "coder", "--limit", "1").count("best, of") == 1
    assert "no such prompt was judged" in not_judged("show", run, "--prompt", "other")
    length = {"kind": "python", "function": f"{write_functions(run.parent)}:length"}
    judged(run, *judges("exact_answer", length))
    disputed = judged("show", run, "--disputed")
    assert "sum" in disputed
    best = run.parent / "run/judged/best.parquet"
    best.write_bytes(best.read_bytes()[:-1])
    assert "a table was changed" in not_judged("show", run)
    assert "best answers by author" in judged(run, *judges("exact_answer", length))


def test_without_answers_or_judges(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    path = answered(tmp_path, chat_models, {"coder": right})
    assert "no judge is named" in not_judged(path)
    line = not_judged(path, *EXACT)
    assert "no store of answers of writer" in line
    assert "logitfuse extract generate" in line


def test_what_is_left_out_is_counted(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    def coder(document: str, number: int) -> Any:
        kinds = {
            "sum": ("3 + 4 is 7", Finish.LENGTH), "half": "", "word": "  \n", "far": "7\0",
            "held": ("", Finish.PROMPT_TOO_LONG),
        }  # fmt: skip
        return kinds.get(document, "2")

    def writer(document: str, number: int) -> Any:
        return {"sum": ("7", Finish.LENGTH), "half": "", "word": "1"}.get(document, "3")

    path = answered(tmp_path, chat_models, {"coder": coder, "writer": writer})
    said = judged(path, *EXACT)
    assert "answers of coder left out: NUL 1, cut 1, empty 2, prompt too long 1" in said
    assert "answers of writer left out: cut 1, empty 1" in said
    assert "no usable answer: 2, 1 of them with cut answers" in said
    assert set(best_of(path)) == {"word", "far", "held", "talk/turn-0"}
    said = judged(path, *judges("exact_answer", drop_cut=False, drop_held=True))
    assert set(best_of(path)) == {"sum", "word", "far", "talk/turn-0"}
    assert "no usable answer: 1\n" in said
    assert "prompts that contain their answer, dropped: 1 (held)" in said
    said = judged(path, *judges("exact_answer", min_answers=2))
    assert set(best_of(path)) == {"talk/turn-0"}
    assert "fewer answers than judge.min_answers: 3" in said
    line = not_judged(path, *judges("exact_answer", min_answers=9))
    assert "no prompt has an answer to judge" in line


def test_no_prompt_at_all(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    def silent(document: str, number: int) -> Any:
        return {"held": "4", "sum": ("7", Finish.LENGTH)}.get(document, "")

    path = answered(tmp_path, chat_models, {"coder": silent, "writer": silent})
    line = not_judged(path, *judges("exact_answer", drop_held=True))
    assert "got 6 prompts: 5 without a usable answer" in line
    assert "min_score, 1 that contain their answer; answers cut at generate.max_tokens" in line
    line = not_judged(path, *judges("exact_answer", drop_held=True, drop_cut=False, min_answers=3))
    assert line.endswith("1 that contain their answer")


def test_one_score_for_all_is_refused(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    path = answered(tmp_path, chat_models, {"coder": wrong, "writer": wrong})
    line = not_judged(path, *EXACT)
    assert "judge exact_answer has the same score for all 12 answers" in line
    assert not (tmp_path / "run/judged/judged.json").exists()


def test_other_answers_are_judged_again(run: Path) -> None:
    judged(run, *EXACT)
    parts = sorted((run.parent / "run/judged/parts/exact_answer").iterdir())
    assert len(parts) > 1
    say(run, "writer", wrong)
    assert "best answers by author" in judged(run, *EXACT)
    assert authors(run) == ["coder"] * len(PROMPTS)
    assert judged(run, *EXACT) == "judge complete, nothing to do\n"
    assert "mean_rank" in judged(run, *EXACT, "--set", "judge.vote=mean_rank")


def test_several_answers_of_a_source(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    def coder(document: str, number: int) -> str:
        return right(document, 0) if number == 1 else wrong(document, number)

    sections = {"generate": {"answers": 3, "max_tokens": 40}}
    path = answered(tmp_path, chat_models, {"coder": coder, "writer": wrong}, **sections)
    judged(path, *EXACT)
    assert {(row.author, row.answer) for row in best_of(path).values()} == {("coder", 1)}
    assert len(scores_of(path)) == 6 * len(PROMPTS)


def test_a_damaged_part_is_made_again(run: Path) -> None:
    judged(run, *EXACT)
    before = (run.parent / "run/judged/scores.parquet").read_bytes()
    (run.parent / "run/judged/judged.json").unlink()
    part = next((run.parent / "run/judged/parts/exact_answer").iterdir())
    part.write_bytes(part.read_bytes()[:-20])
    judged(run, *EXACT)
    assert (run.parent / "run/judged/scores.parquet").read_bytes() == before


@pytest.mark.parametrize("metric", ["chrf", "bleu", "rouge_l"])
def test_overlap_with_the_reference(run: Path, metric: str) -> None:
    pytest.importorskip({"rouge_l": "rouge_score"}.get(metric, "sacrebleu"))
    say(run, "writer", lambda document, number: "3 + 4 is 7" if document == "sum" else "x y")
    judged(run, *judges({"kind": "reference_overlap", "metric": metric}))
    assert best_of(run)["sum"].author == "writer"
    scores = {(row.prompt, row.source): row.score or 0.0 for row in scores_of(run)}
    assert scores["sum", "writer"] > 3 * scores["sum", "coder"]


def test_formulas_are_compared(tmp_path: Path, chat_models: dict[str, Path]) -> None:
    pytest.importorskip("math_verify")

    def writer(document: str, number: int) -> str:
        return r"\boxed{\sqrt{49}}" if document == "sum" else wrong(document, number)

    path = answered(tmp_path, chat_models, {"coder": wrong, "writer": writer})
    assert "the same score for all" in not_judged(path, *EXACT)
    judged(path, *judges({"kind": "exact_answer", "compare": "math_verify"}))
    assert [r.source for r in scores_of(path) if r.score == 1.0] == ["writer"]


def test_packages_that_are_not_there(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    for module in ("reference_overlap", "exact_answer"):
        monkeypatch.setattr(f"extract.judge_kinds.{module}.version", missing)
    line = not_judged(run, *judges("reference_overlap"))
    assert "needs the package sacrebleu" in line
    assert "logitfuse[judge]" in line
    line = not_judged(run, *judges({"kind": "exact_answer", "compare": "math_verify"}))
    assert "needs the package math-verify" in line


def test_the_run_file_holds_what_it_says(run: Path) -> None:
    content = yaml.safe_load(run.read_text())
    content["judge"] = {"judges": ["exact_answer"], "vote": "mean_z"}
    run.write_text(yaml.safe_dump(content))
    judged("--config", run)
    resolved = yaml.safe_load((run.parent / "run/judged/config.yaml").read_text())
    assert resolved["judge"]["judges"][0]["compare"] == "plain"
    assert judged("run", run.parent / "run/judged/config.yaml").startswith("judge complete")
