"""A vocabulary as a trie over bytes: which token must some bytes begin with, whatever follows them?

Nodes are numbered by depth, then by bytes, so the children of a node have consecutive numbers in order
of their bytes. A step is a short binary search over five bytes a node, which fit the CPU's cache.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from store_schema.compiled import bare, compiled
from store_schema.text.vocabulary import Vocabulary

NO_NODE = -1
"""No token of the vocabulary begins with these bytes."""
UNDETERMINED = -2
"""Longer tokens begin with these bytes too: which token it is depends on bytes that are not known."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


class TargetTrie(NamedTuple):
    """The trie's arrays, read by compiled code; node 0 is the root.

    Args:
        first_child: [nodes + 1] int32; the children of node i are first_child[i] up to, and not
            including, first_child[i + 1].
        last_byte: [nodes] uint8, the byte that leads to a node.
        longest: [nodes] int32, the longest token on the way to a node, itself included; -1 for none.
        is_token: [nodes] bool, whether a token ends at a node.
        data: [bytes] uint8, the tokens end to end.
        offsets: [V+1] int64, where each token begins in `data`.
    """

    first_child: npt.NDArray[np.int32]
    last_byte: npt.NDArray[np.uint8]
    longest: npt.NDArray[np.int32]
    is_token: npt.NDArray[np.bool_]
    data: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> TargetTrie:
        """The trie of a vocabulary. Of tokens with the same bytes the last is used: byte-fallback
        tokens have the lower ids, and a tokenizer writes them only where it has no other token.
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
            data=data,
            offsets=offsets,
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
    """Index of (node, byte) in the hash table, or of the free slot where it belongs."""
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
    """Give each node where no token ends its parent's longest token."""
    for node in range(1, len(longest)):  # a parent comes before its children
        if longest[node] < 0:
            longest[node] = longest[parents[node]]


@bare
def child_of(trie: TargetTrie, node: int, byte: int) -> int:
    """The node that `byte` leads to, NO_NODE for none."""
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
    return NO_NODE


@bare
def has_children(trie: TargetTrie, node: int) -> bool:
    """Whether a node has children."""
    return bool(trie.first_child[node] < trie.first_child[node + 1])


@bare
def walk(trie: TargetTrie, node: int, data: Any, start: int, stop: int) -> tuple[int, int]:
    """Go from `node` along data[start:stop].

    Returns:
        The node reached, NO_NODE where there is none; and the longest token on the way, -1 for none.
    """
    longest = trie.longest
    for i in range(start, stop):
        following = child_of(trie, node, data[i])
        if following == NO_NODE:
            return NO_NODE, longest[node]
        node = following
    return node, longest[node]


@bare
def token_of(trie: TargetTrie, node: int, data: Any, start: int, stop: int) -> int:
    """The token that begins a text made of the bytes of `node` and data[start:stop]: -1 for none,
    UNDETERMINED where a longer token is possible."""
    reached, token = walk(trie, node, data, start, stop)
    if reached >= 0 and has_children(trie, reached):
        return UNDETERMINED
    return int(token)
