"""`judge show`: prompts with their best answer, and all scores and votes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from extract.judging.records import BestRow, ScoreRow, open_judged, read_best, read_scores
from launch.visible import table, visible
from store_schema.config import RunConfig
from store_schema.errors import ConfigError

_RULE = "-" * 72


@dataclass(frozen=True, slots=True)
class ChosenPrompts:
    """Prompts to show.

    Args:
        judges: Titles of all judges.
        prompts: For each prompt its best answer, and the scores of all its answers.
    """

    judges: tuple[str, ...]
    prompts: tuple[tuple[BestRow, tuple[ScoreRow, ...]], ...]


def chosen_prompts(
    run: RunConfig,
    *,
    prompts: Sequence[str] = (),
    authors: Sequence[str] = (),
    domains: Sequence[str] = (),
    disputed: bool = False,
    limit: int | None = None,
) -> ChosenPrompts:
    """Prompts with their best answer.

    Args:
        run: The run file.
        prompts: Only these documents; empty for all.
        authors: Only prompts whose best answer is by one of these sources; empty for all.
        domains: Only these domains; empty for all.
        disputed: Only prompts for which the judges have different best answers.
        limit: Prompts, at most.

    Raises:
        MissingError: Nothing is judged yet.
        ConfigError: There is no such prompt, source or domain.
    """
    record, location = open_judged(run)
    best = read_best(location)
    _require("prompt", prompts, {row.prompt_id for row in best})
    _require("source", authors, set(record.answers))
    _require("domain", domains, set(record.best))
    scores: defaultdict[str, list[ScoreRow]] = defaultdict(list)
    for row in read_scores(location):
        scores[row.prompt].append(row)
    chosen = [
        row
        for row in best
        if (not prompts or row.prompt_id in prompts)
        and (not authors or row.author in authors)
        and (not domains or row.domain in domains)
        and (not disputed or _disputed(scores[row.prompt_id]))
    ][:limit]
    return ChosenPrompts(
        tuple(record.judges), tuple((row, tuple(scores[row.prompt_id])) for row in chosen)
    )


def shown_prompts(chosen: ChosenPrompts) -> Iterator[str]:
    """Yield each prompt as text."""
    for number, (row, scores) in enumerate(chosen.prompts, 1):
        yield _shown(row, scores, chosen.judges, f"{number}/{len(chosen.prompts)}")


def prompt_objects(chosen: ChosenPrompts) -> Iterator[dict[str, Any]]:
    """Yield each prompt for JSON: best.parquet's row, the turns as lists, and all its scores."""
    for row, scores in chosen.prompts:
        best = asdict(row)
        turns = [{"role": role, "content": content} for role, content in row.turns]
        del best["prompt"], best["messages"], best["tools"]
        yield best | {"turns": turns, "scores": [asdict(score) for score in scores]}


def _require(what: str, names: Sequence[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            few = ", ".join(sorted(known)[:8]) + (", ..." if len(known) > 8 else "")
            raise ConfigError(f"no such {what} was judged", got=name, expected=few)


def _disputed(rows: Sequence[ScoreRow]) -> bool:
    """Whether no answer has the highest score of every judge."""
    by_judge: defaultdict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    for row in rows:
        if row.score is not None:
            by_judge[row.judge][row.source, row.answer] = row.score
    firsts = [
        {answer for answer, score in own.items() if score == max(own.values())}
        for own in by_judge.values()
    ]
    return bool(firsts) and not set.intersection(*firsts)


def _shown(row: BestRow, scores: Sequence[ScoreRow], judges: Sequence[str], place: str) -> str:
    lines = [_RULE, f"{place}  {row.prompt_id}  domain {row.domain}  split {row.split}"]
    for role, content in row.turns:
        lines += _labelled(role, content)
    how = {"votes": "", "likelihood": ", a tie settled by likelihood", "order": ", a tie"}
    lines += _labelled(f"best, of {row.author}{how[row.settled_by]}", row.response)
    by_answer: defaultdict[tuple[str, int], dict[str, ScoreRow]] = defaultdict(dict)
    for one in scores:
        by_answer[one.source, one.answer][one.judge] = one
    cells = [
        [
            f"{source} {number}" + " *" * any(one.best for one in own.values()),
            *(_cell(own[judge]) for judge in judges),
        ]
        for (source, number), own in by_answer.items()
    ]
    lines += table(["answer", *(f"{judge} (vote)" for judge in judges)], cells)
    return "\n".join(lines) + "\n"


def _labelled(label: str, text: str) -> list[str]:
    first, *rest = visible(text, keep="\n\t", backslash="\\").split("\n")
    return [f"{visible(label)}: {first}", *(f"    {line}" for line in rest)]


def _cell(row: ScoreRow) -> str:
    if row.score is None:
        return row.failure or "-"
    vote = "-" if row.vote is None else f"{row.vote:.3g}"
    return f"{row.score:.4g} ({vote})"
