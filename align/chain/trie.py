"""A vocabulary as a trie over bytes, for asking which token bytes must belong to, whatever follows.

Nodes are numbered by depth, then by bytes, so the children of a node lie side by side in order: a step
is a short binary search in five bytes a node, which stay in the cache at any vocabulary size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from store_schema.compiled import bare, compiled
from store_schema.text.vocabulary import Vocabulary

FALLEN = -1
"""No token of the vocabulary goes on with these bytes."""
UNDETERMINED = -2
"""Longer tokens go on from here: which one it will be depends on bytes that are not known."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


class TargetTrie(NamedTuple):
    """The trie's arrays, which compiled code reads as they are; node 0 is the root.

    Args:
        first_child: [nodes + 1] int32, the first child of each node; the next node's is one past its
            last.
        last_byte: [nodes] uint8, the byte that leads to a node.
        longest: [nodes] int32, the longest token on the way to a node, itself included; -1 for none.
        is_token: [nodes] bool, whether a token ends at a node.
    """

    first_child: npt.NDArray[np.int32]
    last_byte: npt.NDArray[np.uint8]
    longest: npt.NDArray[np.int32]
    is_token: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> TargetTrie:
        """Build it; of tokens with the same bytes the last stands for all.

        Byte-fallback tokens come first, and a tokenizer does not write them where it has another.
        """
        data = np.frombuffer(b"".join(vocabulary.tokens), np.uint8)
        offsets = np.concatenate(([0], np.cumsum(vocabulary.lengths)))
        size = 1 << max(int(2 * len(data) + 1).bit_length(), 4)
        parents, last_byte, depths, own = _build(data, offsets, size)
        number = _by_depth_and_bytes(parents, last_byte, depths)
        order = np.argsort(number)
        children = np.bincount(number[parents[1:]], minlength=len(number))
        longest = own.copy()
        _inherit(longest, parents)
        return cls(
            first_child=(1 + np.concatenate(([0], np.cumsum(children)))).astype(np.int32),
            last_byte=last_byte[order],
            longest=longest[order],
            is_token=own[order] >= 0,
        )


@compiled
def _build(data: Any, offsets: Any, size: int) -> Any:
    """Parent, last byte, depth and own token (-1 for none) of each node, parents before children."""
    keys = np.full(size, -1, np.int64)
    children = np.empty(size, np.int32)
    own = np.full(len(data) + 1, -1, np.int32)
    parents, depths = np.zeros(len(data) + 1, np.int32), np.zeros(len(data) + 1, np.int32)
    last_byte = np.zeros(len(data) + 1, np.uint8)
    count = 1
    for token in range(len(offsets) - 1):
        node = 0
        for i in range(offsets[token], offsets[token + 1]):
            slot = _slot(keys, node, data[i])
            if keys[slot] < 0:
                keys[slot] = node * 256 + np.int64(data[i])
                children[slot] = count
                parents[count] = node
                depths[count] = depths[node] + 1
                last_byte[count] = data[i]
                count += 1
            node = children[slot]
        if node > 0:
            own[node] = token
    return parents[:count], last_byte[:count], depths[:count], own[:count]


@compiled
def _slot(keys: Any, node: int, byte: int) -> int:
    """Where (node, byte) is or would be."""
    key = np.int64(node) * 256 + np.int64(byte)
    mask = np.uint64(len(keys) - 1)
    hashed = np.uint64(key) * _MIX
    slot = np.int64((hashed >> np.uint64(29)) & mask)
    while keys[slot] >= 0 and keys[slot] != key:
        slot = np.int64(np.uint64(slot + 1) & mask)
    return int(slot)


def _by_depth_and_bytes(
    parents: npt.NDArray[np.int32], last_byte: npt.NDArray[np.uint8], depths: npt.NDArray[np.int32]
) -> npt.NDArray[np.int64]:
    """[nodes] number of each node, such that children of one node follow each other by byte."""
    number = np.zeros(len(parents), np.int64)
    by_depth = np.argsort(depths, kind="stable")
    ends = np.cumsum(np.bincount(depths))
    for start, stop in pairwise(ends):
        nodes = by_depth[start:stop]
        keys = number[parents[nodes]] * 256 + last_byte[nodes]
        number[nodes[np.argsort(keys)]] = np.arange(start, stop)
    return number


@compiled
def _inherit(longest: Any, parents: Any) -> None:
    """Where no token ends, the longest on the way is the parent's."""
    for node in range(1, len(longest)):  # a parent comes before its children
        if longest[node] < 0:
            longest[node] = longest[parents[node]]


@bare
def child_of(trie: TargetTrie, node: int, byte: int) -> int:
    """The node that `byte` leads to, FALLEN for none."""
    first_child, last_byte = trie.first_child, trie.last_byte
    low, high = first_child[node], first_child[node + 1]
    while low < high:
        middle = (low + high) >> 1
        if last_byte[middle] < byte:
            low = middle + 1
        else:
            high = middle
    if low < first_child[node + 1] and last_byte[low] == byte:
        return int(low)
    return FALLEN


@bare
def goes_on(trie: TargetTrie, node: int) -> bool:
    """Whether a node has children."""
    return bool(trie.first_child[node] < trie.first_child[node + 1])


@bare
def walk(trie: TargetTrie, node: int, data: Any, start: int, stop: int) -> tuple[int, int]:
    """Go on from `node` along data[start:stop].

    Returns:
        The node reached, FALLEN where no token goes on; and the longest token met so far, -1 for none.
    """
    longest = trie.longest
    for i in range(start, stop):
        following = child_of(trie, node, data[i])
        if following == FALLEN:
            return FALLEN, longest[node]
        node = following
    return node, longest[node]


@bare
def token_of(trie: TargetTrie, node: int, data: Any, start: int, stop: int) -> int:
    """The token that text must begin with that has come to `node` and goes on with data[start:stop]:
    -1 for none, UNDETERMINED where longer tokens still go on."""
    reached, token = walk(trie, node, data, start, stop)
    if reached >= 0 and goes_on(trie, reached):
        return UNDETERMINED
    return int(token)
