"""Keeping the segments of an existing plan if they fit the run file as it is now.

Stores are tied to the segments of their shards, not to the models of a run. So sources can be added or
removed, the target changed and splits added without scoring anything again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from extract.config import PlanSection
from extract.corpus.corpus import document_digest, iter_documents
from launch.progress import Progress
from launch.work import some_shards
from store_schema.config import RunConfig
from store_schema.disk.location import Location, open_location
from store_schema.errors import MismatchError, StoreError
from store_schema.fingerprint import fingerprint
from store_schema.plan.plan import Plan, ShardRecord
from store_schema.store.reader import MANIFEST_FILE, StoreReader, commit_key
from store_schema.text.plan_tokens import PlanTokens, plan_tokens
from store_schema.text.tokenizer import SegmentTokenizer

RECUT = (
    "`logitfuse extract plan --recut` cuts all documents again and uncommits the shards whose "
    "segments change"
)
KINDS = ("stores", "generated", "aligned")


@dataclass(frozen=True, slots=True)
class KeptPlan:
    """What is kept of an existing plan.

    Args:
        plan: The same shards, with their numbers of tokens by model brought up to date.
        tokenizers: Tokenizer fingerprint of each of these models.
        context_tokens: Context tokens that each model reads over the whole plan.
        documents: Digest of each split's documents, the new splits included.
        new_splits: Splits whose documents are still to be cut, into shards after the kept ones.
    """

    plan: Plan
    tokenizers: dict[str, str]
    context_tokens: dict[str, int]
    documents: dict[str, str]
    new_splits: tuple[str, ...]


def split_digests(table: pa.Table) -> dict[str, str]:
    """Digest of the documents of each split, whatever their order."""
    by_split: dict[str, list[str]] = {}
    for document in iter_documents(table):
        by_split.setdefault(document.split, []).append(document_digest(document))
    return {split: fingerprint(sorted(digests)) for split, digests in by_split.items()}


def documents_of(table: pa.Table, splits: tuple[str, ...]) -> pa.Table:
    """The documents of some splits."""
    return table.filter(pc.is_in(table["split"], value_set=pa.array(splits, pa.string())))


def existing_stores(run: RunConfig) -> dict[str, Location]:
    """Locations of the stores in the run's data folder, keyed `<kind>/<name>`."""
    root = open_location(run.data_folder)
    return {
        f"{kind}/{name}": root.child(f"{kind}/{name}")
        for kind in KINDS
        for name in root.names(kind)
        if root.exists(f"{kind}/{name}/{MANIFEST_FILE}")
    }


def keep_plan(
    plan: Plan,
    corpus_fingerprint: str,
    digests: Mapping[str, str],
    tokenizers: Mapping[str, SegmentTokenizer],
    section: PlanSection,
    stores: Mapping[str, Location],
) -> KeptPlan:
    """Check that the segments of an existing plan fit the run file, and update their figures.

    Args:
        plan: The existing plan.
        corpus_fingerprint: Of the corpus as it is now.
        digests: Digest of the corpus's documents, by split.
        tokenizers: Of all models of the run.
        section: How documents are to be cut.
        stores: Stores made from the plan, by name.

    Raises:
        MismatchError: Documents of a split changed, a segment is too long for a model, or a store
            cannot be read, so that it may need the plan unchanged.
        TokenizerError: A tokenizer cannot represent a segment.
    """
    _require_readable(plan, stores)
    record = plan.record
    before = dict(record.documents)
    changed = [name for name in before if name in digests and before[name] != digests[name]]
    if changed or not before:
        raise MismatchError(
            f"documents were changed after extraction began: split {', '.join(changed) or 'any'}",
            where=f"{plan.location.url} ({', '.join(stores)} were made from it)",
            expected=f"corpus {record.corpus_fingerprint} (more splits are no change)",
            got=f"corpus {corpus_fingerprint}",
            hint=f"undo the change, give the run another name, or consent: {RECUT}",
        )
    new_splits = tuple(name for name in digests if name not in before)
    shorter = section.max_tokens < record.settings["max_tokens"]
    counted = _count(plan, tokenizers, everything=shorter)
    _require_fit(plan, counted, section.max_tokens)
    known = {} if shorter or new_splits else record.tokenizers
    asked = {name: tokenizer.fingerprint for name, tokenizer in tokenizers.items()}
    shards = tuple(_with_tokens(s, counted, {**known, **asked}) for s in plan.shards)
    context = record.settings.get("context_tokens", {})
    return KeptPlan(
        Plan(plan.location, record.model_copy(update={"shards": shards})),
        {**known, **asked},
        context | {name: tokens.context_tokens for name, tokens in counted.items()},
        {**before, **digests},
        new_splits,
    )


def _require_readable(plan: Plan, stores: Mapping[str, Location]) -> None:
    """Refuse if a store cannot be read: it may need the plan unchanged."""
    tied = []
    for name, location in stores.items():
        try:
            StoreReader.open(location)
        except StoreError:
            tied.append(name)
    if tied:
        raise MismatchError(
            "the plan was changed after extraction began",
            where=f"{plan.location.url} ({', '.join(tied)} were made from it)",
            expected="stores that can be read: those can be extended with the plan",
            got="stores of an earlier version, or damaged ones",
            hint="undo the change, give the run another name, or delete these stores to plan again",
        )


def _count(
    plan: Plan, tokenizers: Mapping[str, SegmentTokenizer], *, everything: bool
) -> dict[str, PlanTokens]:
    """Token counts of the segments for the models whose tokenizer the plan does not know."""
    unknown = {
        name: tokenizer
        for name, tokenizer in tokenizers.items()
        if everything or plan.record.tokenizers.get(name) != tokenizer.fingerprint
    }
    total = sum(shard.num_bytes for shard in plan.shards) * len(unknown)
    if not unknown:
        return {}
    with Progress("fit segments", total, unit="B") as progress:
        return {
            name: plan_tokens(plan, tokenizer, keep=False, on_shard=progress.add)
            for name, tokenizer in unknown.items()
        }


def _require_fit(plan: Plan, counted: Mapping[str, PlanTokens], max_tokens: int) -> None:
    long = {name: tokens for name, tokens in counted.items() if tokens.longest > max_tokens}
    if not long:
        return
    worst = max(tokens.longest for tokens in long.values())
    shown = ", ".join(
        f"{name} {tokens.longest} (segment {tokens.longest_segment})"
        for name, tokens in long.items()
    )
    raise MismatchError(
        "segments of the plan are too long",
        where=f"{plan.location.url}, in tokens of {', '.join(long)}",
        expected=f"at most {max_tokens} (plan.max_tokens) with their context",
        got=f"up to {shown}",
        hint=f"set plan.max_tokens to {worst} or more, which keeps all segments and stores, leave "
        f"{' and '.join(long)} out, or consent: {RECUT}",
    )


def _with_tokens(
    shard: ShardRecord, counted: Mapping[str, PlanTokens], names: Mapping[str, str]
) -> ShardRecord:
    own = {name: tokens for name, tokens in shard.num_tokens.items() if name in names}
    own |= {name: tokens.num_tokens[shard.index] for name, tokens in counted.items()}
    return shard.model_copy(update={"num_tokens": own})


def uncommit_changed(plan: Plan, stores: Mapping[str, Location]) -> list[str]:
    """Delete the commits of shards whose segments are not those of the plan.

    An aligned store loses all its commits if one is stale: its counts are over the text of all shards.
    Data files stay until `store gc` finds them old enough.

    Returns:
        One line for each store that lost commits.
    """
    shards = {shard.index: shard for shard in plan.shards}
    lines = []
    for name, location in stores.items():
        reader = StoreReader.open(location)
        commits, _ = reader.scan()
        stale = [i for i, c in commits.items() if i not in shards or not c.matches(shards[i])]
        if stale and name.startswith("aligned/"):
            stale = sorted(commits)
        for shard in stale:
            location.delete(commit_key(shard))
        if stale:
            lines.append(f"{name}: {len(stale)} shards uncommitted ({some_shards(stale)})")
    return lines
