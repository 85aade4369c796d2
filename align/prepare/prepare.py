"""Build the aligner of the run file's method for one source: vocabulary maps, counts of text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from align.chain.continuation import PairCounts, first_tokens
from align.chain.first_token import piece_table
from align.chain.tail_tokens import tail_tokens
from align.chain.trie import TargetTrie
from align.chain.vocabulary_map import VocabularyMap
from align.methods import METHODS
from align.methods.method import Aligner
from align.papers.dtw import BAND_BYTES
from align.papers.entry_maps import EntryMap, Table, Vocabularies
from align.papers.mapped import MappedAligner
from align.papers.mined_vocabulary import nearest_tokens, written_tokens
from align.papers.stats import MatchCounts
from align.prepare.checked import CheckedAlignment
from align.prepare.counting import Counting, count_once
from launch.signals import StopFlag
from store_schema.text.tokenizer import SegmentTokenizer


def make_aligner(checked: CheckedAlignment, stop: StopFlag) -> Aligner:
    """The aligner of the run file's method for this source.

    Raises:
        MissingError: A shard whose text is to be counted is not there.
        StorageError: The disk or object store refused.
        Stopped: On a signal, while text is counted.
    """
    return METHODS[checked.section.method].make(checked, stop)


def mapped(
    checked: CheckedAlignment, table: Callable[[Vocabularies], Table], *, inside: bool = False
) -> MappedAligner:
    """An aligner that maps entries by one of the tables of `Vocabularies`."""
    source = SegmentTokenizer.load(checked.run.sources[checked.source], name=checked.source)
    both = Vocabularies(source, checked.target)
    entries = EntryMap.of(table(both), len(checked.reader.vocabulary))
    return MappedAligner(entries, both, checked.section.max_entries, inside)


def eos_ids(checked: CheckedAlignment) -> tuple[int, int]:
    """EOS id of the source and of the target, -1 for none."""
    source = SegmentTokenizer.load(checked.run.sources[checked.source], name=checked.source)
    own, other = source.eos_id, checked.target.eos_id
    return -1 if own is None else own, -1 if other is None else other


def nearest(checked: CheckedAlignment) -> npt.NDArray[np.int32]:
    """[V] the target token of least edit distance to each source token, -1 for none."""
    own, other = eos_ids(checked)
    return nearest_tokens(
        checked.reader.vocabulary,
        checked.target.vocabulary,
        written=written_tokens(checked.target),
        roles={own: other} if own >= 0 and other >= 0 else {},
    )


def most_matched(checked: CheckedAlignment, stop: StopFlag) -> npt.NDArray[np.int32]:
    """[V] the target token that each source token is matched to most often in training text."""
    counts, counting = count_matches(checked)
    count_once(checked, counting, stop)
    vocabularies = (checked.reader.vocabulary, checked.target.vocabulary)
    return counts.token_map(nearest(checked), *vocabularies)


def count_matches(checked: CheckedAlignment) -> tuple[MatchCounts, Counting]:
    """Empty counts for method `stats`, and how to fill them."""
    counts = MatchCounts(len(checked.reader.vocabulary), checked.target.vocab_size)
    what = f"beside each other on warping paths, band {BAND_BYTES}"
    return counts, Counting(what, counts.distinct, counts.add)


def vocabulary_map(checked: CheckedAlignment, stop: StopFlag) -> VocabularyMap:
    """Build the map of method `bytes`, counting continuations on training text if the run file says so.

    The same plan and store give the same map in every worker, whatever is committed.
    """
    section, target = checked.section, checked.target
    counts, counting = count_continuations(checked)
    if section.continuation != "first_token":
        count_once(checked, counting, stop)
    pieces = piece_table(checked.reader.vocabulary, target)
    continuation = counts.continuation(first_tokens(pieces), section.continuation_prior)
    if section.continuation == "tail":
        continuation = continuation.only_certain()
    lengths, source_lengths = target.vocabulary.lengths, checked.reader.vocabulary.lengths
    tail = tail_tokens(counts.distinct, source_lengths, lengths, section.tail_tokens)
    return VocabularyMap(
        pieces,
        continuation,
        TargetTrie.of(target.vocabulary),
        lengths,
        tail,
        eos_ids(checked),
        section.look_ahead,
    )


def count_continuations(checked: CheckedAlignment) -> tuple[PairCounts, Counting]:
    """Empty counts for method `bytes`, and how to fill them."""
    counts = PairCounts(len(checked.reader.vocabulary), checked.target.vocab_size)

    def note(text: bytes, *tokens: npt.NDArray[Any]) -> None:
        counts.add(*tokens)

    return counts, Counting("begun together", counts.distinct, note)
