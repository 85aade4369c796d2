"""Log-probabilities of the sources' answers under the other sources, from stores of another run.

The corpus of that run is the answers: `extract answers` writes them as documents whose ids have the
author, and `extract run` scores these documents with every source.
"""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from extract.judge_kinds.kind import Answer
from store_schema.config import RunConfig
from store_schema.disk.location import open_location
from store_schema.errors import MismatchError, MissingError
from store_schema.fingerprint import fingerprint
from store_schema.layout import Arrays
from store_schema.plan.plan import Plan, Segment
from store_schema.plan.run_plan import plan_location
from store_schema.store.reader import MANIFEST_FILE, StoreReader
from store_schema.store.same_source import require_same_source
from store_schema.text.encoded import token_lengths

HOW = (
    "write the answers with `logitfuse extract answers RUN --out answers.jsonl`, score them with "
    "`logitfuse corpus build`, `extract plan` and `extract run` on a run file of the same sources with "
    "`corpus: {inputs: [{path: answers.jsonl}]}`, and give its folder as judge.scored_in"
)
_ARRAYS = ("segment_ids", "token_offsets", "token_ids", "byte_ends", "label_logprobs")


class Likelihoods:
    """Mean log-probability per byte of answers under each source."""

    def __init__(self, run: RunConfig, folder: str) -> None:
        """Open the stores of a run whose corpus is the answers.

        Args:
            run: The run that judges; the other run has sources of the same names.
            folder: Folder of the run that scored the answers.

        Raises:
            MissingError: A plan, a store or a shard is not there.
            MismatchError: A store is of another model than the source.
        """
        location = open_location(folder)
        plan = Plan.find(plan_location(folder))
        if plan is None:
            raise MissingError("the answers are not scored", where=location.url, hint=HOW)
        self._plan = plan
        self._readers = {}
        for name in run.sources:
            place = location.child(f"stores/{name}")
            if not place.exists(MANIFEST_FILE):
                raise MissingError(f"{name} has not scored the answers", where=place.url, hint=HOW)
            reader = StoreReader.open(place)
            reader.require_plan(self._plan)
            require_same_source(run, name, reader, self._plan)
            reader.require_shards(self._plan.shards)
            self._readers[name] = reader
        self._url = location.url
        self._scored: dict[str, tuple[str, dict[str, float]]] | None = None

    @property
    def digest(self) -> str:
        """Digest of the stores' content."""
        return fingerprint(
            [
                [shard.fingerprint, *(r.commits[shard.index].content_sha256 for r in readers)]
                for readers in [[self._readers[name] for name in sorted(self._readers)]]
                for shard in self._plan.shards
            ]
        )

    def by_other_sources(self, answer: Answer) -> float | None:
        """Log-probability per byte in nats, mean of all sources but its author.

        Returns:
            The mean; None where the answer was not scored, or there is no other source.

        Raises:
            MismatchError: Another text was scored under its id.
        """
        scored = self._read().get(answer.document_id)
        if scored is None:
            return None
        digest, by_source = scored
        if digest not in set(_digests(answer.text)):
            raise MismatchError(
                f"answer {answer.document_id} was scored with another text",
                where=self._url,
                hint="the sources have answered again since: " + HOW,
            )
        values = [value for name, value in by_source.items() if name != answer.source]
        return math.fsum(values) / len(values) if values else None

    def _read(self) -> dict[str, tuple[str, dict[str, float]]]:
        """By document id the SHA-256 of its text, and its nats per byte by source."""
        if self._scored is not None:
            return self._scored
        hashes: dict[str, hashlib._Hash] = {}
        sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for shard in self._plan.shards:
            segments = self._plan.segments(shard)
            for segment in segments:  # those of a document follow each other
                text = segment.text.encode()
                hashes.setdefault(segment.document_id, hashlib.sha256()).update(text)
            for name, reader in self._readers.items():
                arrays = reader.read(shard.index, _ARRAYS)
                special = reader.vocabulary.special
                for segment, nats, num_bytes in _segment_sums(arrays, segments, special):
                    total = sums[segment.document_id, name]
                    total[0] += nats
                    total[1] += num_bytes
        self._scored = {
            document: (
                digest.hexdigest(),
                {
                    name: sums[document, name][0] / sums[document, name][1]
                    for name in self._readers
                    if sums[document, name][1] > 0
                },
            )
            for document, digest in hashes.items()
        }
        return self._scored


def open_likelihoods(run: RunConfig, folder: str | None) -> Likelihoods:
    """Open the stores of `judge.scored_in`.

    Raises:
        MissingError: It is not set, or there are no stores; the hint has the commands that make them.
    """
    if folder is None:
        raise MissingError("judge.scored_in is not set", where="judge.scored_in", hint=HOW)
    return Likelihoods(run, folder)


def _segment_sums(
    arrays: Arrays, segments: list[Segment], special: np.ndarray
) -> Iterator[tuple[Segment, float, int]]:
    """Each segment with the sum of its tokens' known log-probabilities and the bytes of these tokens;
    the token that ends a turn is not counted."""
    offsets = arrays["token_offsets"]
    first = segments[0].index if segments else 0
    for row, start, stop in zip(arrays["segment_ids"], offsets, offsets[1:], strict=False):
        segment = segments[int(row) - first]
        lengths = token_lengths(arrays["byte_ends"][start:stop])
        labels = arrays["label_logprobs"][start:stop].astype(np.float64)
        counted = ~np.isnan(labels)
        if len(lengths) and lengths[-1] == 0 and special[int(arrays["token_ids"][stop - 1])]:
            counted[-1] = False
        yield segment, float(labels[counted].sum()), int(lengths[counted].sum())


def _digests(text: str) -> Iterator[str]:
    """Digests of the forms in which a corpus may have an answer: stripped or not, in NFC or not."""
    for form in (text, text.strip()):
        for data in (form, unicodedata.normalize("NFC", form)):
            yield hashlib.sha256(data.encode()).hexdigest()
