"""A vocabulary as a trie over bytes, for asking which token bytes must belong to, whatever follows.

Children lie in one hash table of (node, byte), so a step costs one look-up at any vocabulary size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from store_schema.vocabulary import Vocabulary

FALLEN = -1
"""No token of the vocabulary goes on with these bytes."""
UNDETERMINED = -2
"""Longer tokens go on from here: which one it will be depends on bytes that are not known."""
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class TargetTrie:
    """The trie's arrays.

    Args:
        keys: [2^n] int64, node * 256 + byte, -1 where free.
        children: [2^n] int32, the node there.
        longest: [nodes] int32, the longest token on the way to a node, itself included; -1 for none.
        goes_on: [nodes] bool, whether a node has children.
        is_token: [nodes] bool, whether a token ends at a node.
    """

    keys: npt.NDArray[np.int64]
    children: npt.NDArray[np.int32]
    longest: npt.NDArray[np.int32]
    goes_on: npt.NDArray[np.bool_]
    is_token: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> TargetTrie:
        """Build it; of tokens with the same bytes the last stands for all.

        Byte-fallback tokens come first, and a tokenizer does not write them where it has another.
        """
        data = np.frombuffer(b"".join(vocabulary.tokens), np.uint8)
        offsets = np.concatenate(([0], np.cumsum(vocabulary.lengths)))
        size = 1 << max(int(2 * len(data) + 1).bit_length(), 4)
        return cls(*_build(data, offsets, size))

    @property
    def arrays(self) -> tuple[Any, ...]:
        """For compiled code."""
        return self.keys, self.children, self.longest, self.goes_on, self.is_token


@njit(cache=True, nogil=True)
def _build(data: Any, offsets: Any, size: int) -> Any:
    keys = np.full(size, -1, np.int64)
    children = np.empty(size, np.int32)
    own = np.full(len(data) + 1, -1, np.int32)
    parents = np.zeros(len(data) + 1, np.int32)
    goes_on = np.zeros(len(data) + 1, np.bool_)
    count = 1
    for token in range(len(offsets) - 1):
        node = 0
        for i in range(offsets[token], offsets[token + 1]):
            slot = _slot(keys, node, data[i])
            if keys[slot] < 0:
                keys[slot] = node * 256 + np.int64(data[i])
                children[slot] = count
                parents[count] = node
                goes_on[node] = True
                count += 1
            node = children[slot]
        if node > 0:
            own[node] = token
    is_token = own[:count] >= 0
    for node in range(1, count):  # a parent is numbered before its children
        if own[node] < 0:
            own[node] = own[parents[node]]
    return keys, children, own[:count].copy(), goes_on[:count].copy(), is_token


@njit(cache=True, nogil=True)
def _slot(keys: Any, node: int, byte: int) -> int:
    """Where (node, byte) is or would be."""
    key = np.int64(node) * 256 + np.int64(byte)
    mask = np.uint64(len(keys) - 1)
    hashed = np.uint64(key) * _MIX
    slot = np.int64((hashed >> np.uint64(29)) & mask)
    while keys[slot] >= 0 and keys[slot] != key:
        slot = np.int64(np.uint64(slot + 1) & mask)
    return int(slot)


@njit(cache=True, nogil=True)
def walk(trie: Any, node: int, data: Any, start: int, stop: int) -> tuple[int, int]:
    """Go on from `node` along data[start:stop].

    Returns:
        The node reached, FALLEN where no token goes on; and the longest token met so far, -1 for none.
    """
    keys, children, longest, _, _ = trie
    for i in range(start, stop):
        slot = _slot(keys, node, data[i])
        if keys[slot] < 0:
            return FALLEN, longest[node]
        node = children[slot]
    return node, longest[node]


@njit(cache=True, nogil=True)
def token_of(trie: Any, node: int, data: Any, start: int, stop: int) -> int:
    """The token that text must begin with that has come to `node` and goes on with data[start:stop]:
    -1 for none, UNDETERMINED where longer tokens still go on."""
    reached, token = walk(trie, node, data, start, stop)
    if reached >= 0 and trie[3][reached]:
        return UNDETERMINED
    return token
