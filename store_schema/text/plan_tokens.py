"""How many tokens a plan's segments have in a model that the plan was not made for.

A plan can be used for every model whose tokenizer represents its text and whose context fits its
longest segment. The tokens are counted once for each tokenizer, and the counts are kept in
`plan/tokens/`.
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
    """tokens/<tokenizer>.json: numbers of tokens of a plan's segments in one tokenizer."""

    schema_version: int = SCHEMA_VERSION
    plan_fingerprint: str
    tokenizer_fingerprint: str
    num_tokens: tuple[int, ...]
    """Tokens of the texts of each shard."""
    context_tokens: int = Field(ge=0)
    """Tokens of the contexts of all segments."""
    longest: int = Field(ge=0)
    """Tokens of the longest segment, with its context."""
    longest_segment: str
    """Id of that segment."""


def count_plan_tokens(
    plan: Plan, tokenizer: SegmentTokenizer, on_shard: Callable[[int], None] = lambda size: None
) -> PlanTokens:
    """Tokenise all segments and count; checks that every text's tokens join to it.

    Args:
        plan: The plan.
        tokenizer: Any model's tokenizer.
        on_shard: Called with the text bytes of each shard that is done; may raise to stop.

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
    """The kept counts; where there are none, count, and keep the counts if `keep`."""
    key = f"tokens/{tokenizer.fingerprint}.json"
    if plan.location.exists(key):
        with contextlib.suppress(StoreError):  # damaged, or of a newer version: counted again
            data = plan.location.read_bytes(key)
            counted = unseal(PlanTokens, data, where=f"{plan.location.url}/{key}")
            if counted.plan_fingerprint == plan.fingerprint:
                return counted
    counted = count_plan_tokens(plan, tokenizer, on_shard)
    if keep:
        with contextlib.suppress(StorageError):  # another run's plan may be read-only
            plan.location.write_atomic(key, seal(counted))
    return counted


def plan_for(
    plan: Plan,
    name: str,
    tokenizer: SegmentTokenizer,
    *,
    keep: bool = True,
    max_positions: int | None = None,
    on_shard: Callable[[int], None] = lambda size: None,
) -> Plan:
    """The plan with the token counts of one model, which are counted if the plan does not have them.

    Args:
        plan: The plan.
        name: Name of the model: a source or "target".
        tokenizer: The model's tokenizer.
        keep: Whether new counts are kept beside the plan.
        max_positions: The model's context length in tokens; None if not known.
        on_shard: See `count_plan_tokens`.

    Raises:
        MismatchError: A segment is longer than the model's context.
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
