"""How many tokens a plan's segments have for a model that the plan was not cut for.

A plan fits every model whose tokenizer represents its text and that reads its longest segment. What
that takes is counted once for a tokenizer and kept beside the plan, in `plan/tokens/`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from pydantic import Field

from store_schema import SCHEMA_VERSION
from store_schema.config import StrictModel
from store_schema.disk.sealed import seal, unseal
from store_schema.errors import MismatchError, StorageError, StoreError
from store_schema.plan.plan import Plan
from store_schema.text.tokenizer import SegmentTokenizer


class PlanTokens(StrictModel):
    """tokens/<tokenizer>.json: a plan's segments as one tokenizer reads them."""

    schema_version: int = SCHEMA_VERSION
    plan_fingerprint: str
    tokenizer_fingerprint: str
    num_tokens: tuple[int, ...]
    """Rows of each shard."""
    context_tokens: int = Field(ge=0)
    """Tokens before the texts, of all segments together."""
    longest: int = Field(ge=0)
    """Tokens of the longest segment, its context included."""
    longest_segment: str
    """Its id."""


def count_plan_tokens(
    plan: Plan, tokenizer: SegmentTokenizer, on_shard: Callable[[int], None] = lambda size: None
) -> PlanTokens:
    """Read all segments with a tokenizer, every text proved.

    Args:
        plan: Whose segments.
        tokenizer: Of any model.
        on_shard: Called with the bytes of each shard that is done; may raise to stop.

    Raises:
        TokenizerError: It cannot represent a segment; names it.
    """
    num_tokens, context_tokens, longest = [], 0, (0, "")
    for shard in plan.shards:
        segments = plan.segments(shard)
        rows = 0
        for segment, encoded in zip(segments, tokenizer.encode(segments), strict=True):
            before, tokens = len(encoded.context_ids), len(encoded.token_ids)
            rows, context_tokens = rows + tokens, context_tokens + before
            longest = max(longest, (before + tokens, segment.segment_id), key=lambda item: item[0])
        num_tokens.append(rows)
        on_shard(shard.num_bytes)
    return PlanTokens(
        plan_fingerprint=plan.fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        num_tokens=tuple(num_tokens),
        context_tokens=context_tokens,
        longest=longest[0],
        longest_segment=longest[1],
    )


def plan_tokens(
    plan: Plan,
    tokenizer: SegmentTokenizer,
    *,
    keep: bool,
    on_shard: Callable[[int], None] = lambda size: None,
) -> PlanTokens:
    """The counts that are kept, or counted and, where asked and allowed, kept."""
    key = f"tokens/{tokenizer.fingerprint}.json"
    if plan.location.exists(key):
        with contextlib.suppress(StoreError):  # damaged, or of a newer version: counted again
            data = plan.location.read_bytes(key)
            found = unseal(PlanTokens, data, where=f"{plan.location.url}/{key}")
            if found.plan_fingerprint == plan.fingerprint:
                return found
    found = count_plan_tokens(plan, tokenizer, on_shard)
    if keep:
        with contextlib.suppress(StorageError):  # another's plan may be there to read only
            plan.location.write_atomic(key, seal(found))
    return found


def plan_for(
    plan: Plan,
    name: str,
    tokenizer: SegmentTokenizer,
    *,
    keep: bool = True,
    max_positions: int | None = None,
    on_shard: Callable[[int], None] = lambda size: None,
) -> Plan:
    """The same plan with the tokens of one model, whether it was cut for it or not.

    Args:
        plan: Cut for some models.
        name: What the model is called: a source or "target".
        tokenizer: The model's.
        keep: Whether what had to be counted is kept beside the plan.
        max_positions: Most tokens the model reads; None where nobody knows.
        on_shard: As in `count_plan_tokens`.

    Raises:
        MismatchError: A segment is longer than the model reads.
        TokenizerError: The tokenizer cannot represent a segment.
    """
    record = plan.record
    if record.tokenizers.get(name) == tokenizer.fingerprint:
        return plan
    counted = plan_tokens(plan, tokenizer, keep=keep, on_shard=on_shard)
    if max_positions is not None and counted.longest > max_positions:
        raise MismatchError(
            f"a segment of the plan is longer than {name} can read",
            where=f"{plan.location.url}, segment {counted.longest_segment}",
            expected=f"at most {max_positions} tokens with its context",
            got=counted.longest,
            hint="plan with a smaller plan.max_tokens under another run name",
        )
    shards = tuple(
        shard.model_copy(update={"num_tokens": {**shard.num_tokens, name: tokens}})
        for shard, tokens in zip(plan.shards, counted.num_tokens, strict=True)
    )
    update = {
        "shards": shards,
        "tokenizers": {**record.tokenizers, name: tokenizer.fingerprint},
        "settings": {
            **record.settings,
            "max_tokens": max(record.settings.get("max_tokens", 0), counted.longest),
        },
    }
    return Plan(plan.location, record.model_copy(update=update), plan.fingerprint)
