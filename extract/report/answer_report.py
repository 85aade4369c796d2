"""The report of `extract generate`: prompts, answers, why they ended, speed and size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from extract.generation.answers import (
    ANSWERS,
    INVALID_UTF8,
    LATER_SEGMENTS,
    NO_PROMPT,
    PROMPT_TOKENS,
    PROMPTS,
    finish_key,
)
from extract.scoring.score import BYTES, TOKENS
from launch.quantities import size_text
from launch.visible import table
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.layout import Finish
from store_schema.plan.run_plan import open_plan
from store_schema.store.reader import StoreReader

_SUMMED = (PROMPTS, ANSWERS, PROMPT_TOKENS, TOKENS, BYTES, INVALID_UTF8, NO_PROMPT, LATER_SEGMENTS)


@dataclass(frozen=True, slots=True)
class AnswerFigures:
    """Figures of a source's generated store, summed over its commits.

    Args:
        name: The source.
        num_shards: (Finished shards, all shards).
        total: Sums of the shards' figures (`extract.generation.answers.answer_stats`).
        seconds: Time of generation.
        size_bytes: On disk.
    """

    name: str
    num_shards: tuple[int, int]
    total: dict[str, int]
    seconds: float
    size_bytes: int

    @classmethod
    def read(cls, run: RunConfig, name: str) -> AnswerFigures:
        """Read the commits of a source's generated store."""
        plan = open_plan(run)
        reader = StoreReader.open(open_location(run.generated_url(name)))
        commits = {index: reader.commits[index] for index in reader.committed(plan.shards)}
        total: Counter[str] = Counter()
        seconds = 0.0
        for commit in commits.values():
            for key in (*_SUMMED, *map(finish_key, Finish)):
                total[key] += int(commit.stats[key])
            seconds += commit.stats["seconds"]
        return cls(
            name=name,
            num_shards=(len(commits), len(plan.shards)),
            total=dict(total),
            seconds=seconds,
            size_bytes=sum(f.size for c in commits.values() for f in c.files.values()),
        )

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second."""
        return self.total[TOKENS] / max(self.seconds, 1e-9)

    def figures(self) -> dict[str, Any]:
        """All of it for JSON."""
        done, total = self.num_shards
        shards = {"shards": total, "shards_done": done, "tokens_per_s": self.tokens_per_s}
        return {k: v for k, v in asdict(self).items() if k != "num_shards"} | shards


def answer_report(sources: Sequence[AnswerFigures]) -> str:
    """Answers, speed and bytes of each source, and why its answers ended, as text."""
    headers = ["source", "shards", "prompts", "answers"]
    headers += ["tokens", "tokens/answer", "tokens/s", "on disk"]
    rows = [
        [
            source.name,
            "{}/{}".format(*source.num_shards),
            source.total[PROMPTS],
            source.total[ANSWERS],
            source.total[TOKENS],
            source.total[TOKENS] / max(source.total[ANSWERS], 1),
            round(source.tokens_per_s),
            size_text(source.size_bytes),
        ]
        for source in sources
    ]
    reasons = ["source", *(finish.name.lower().replace("_", " ") for finish in Finish)]
    ends = [
        [source.name, *(source.total[finish_key(finish)] for finish in Finish)]
        for source in sources
    ]
    lines = [*table(headers, rows), "", "answers by how they ended:", *table(reasons, ends)]
    for source in sources:
        if source.total[INVALID_UTF8]:
            number = source.total[INVALID_UTF8]
            lines.append(f"{source.name}: {number:,} answers are not valid UTF-8 (kept unchanged)")
    skipped = sources[0].total
    if skipped[NO_PROMPT] or skipped[LATER_SEGMENTS]:
        lines.append(
            f"not answered: {skipped[NO_PROMPT]:,} documents without a prompt, "
            f"{skipped[LATER_SEGMENTS]:,} later segments of long documents"
        )
    return "\n".join(lines)
