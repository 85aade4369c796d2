"""The prior of a domain: how well each source does on its text, before a segment has a past.

A hedge begins a segment knowing nothing, and an answer of a few tokens is over before it knows more.
What the training split says of a source in a domain is known beforehand: the prior of a domain has the
weights of a Bayes mixture that takes one source for a segment, those under which the split's segments
are likeliest (EM). The valid and the test split are not read for it.

Shape suffixes: S segments, M sources, G domains.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

RATE = 0.5
"""Power of a segment's probability, as in the hedges: no source is the true one."""
ROUNDS = 50
"""Of EM. It may stop before it has converged: more rounds make small weights smaller."""


def domain_priors(nats_SM: Floats, domains_S: Integers, num_domains: int) -> Floats:
    """Weights of each source by domain, [G, M], each row of sum 1.

    A domain of few segments stays near the weights of all text, and those near equal ones.

    Args:
        nats_SM: NLL of each segment, over labels that every source knows.
        domains_S: Domain of each segment, 0 to G-1.
        num_domains: G; one without a segment has the weights of all text.
    """
    num_sources = nats_SM.shape[1]
    every_S = np.zeros(len(nats_SM), np.int64)
    all_M = _weights(nats_SM, every_S, np.full((1, num_sources), 1 / num_sources))[0]
    return _weights(nats_SM, domains_S, np.tile(all_M, (num_domains, 1)))


def _weights(nats_SM: Floats, groups_S: Integers, start_GM: Floats) -> Floats:
    """Weights of each group, with as many segments of the start's weights as there are sources."""
    num_groups, num_sources = start_GM.shape
    size_G1 = np.bincount(groups_S, minlength=num_groups)[:, None]
    weights_GM = start_GM
    for _ in range(ROUNDS):
        logs_SM = np.log(weights_GM)[groups_S] - RATE * nats_SM
        logs_SM -= logs_SM.max(1, keepdims=True, initial=-np.inf)
        share_SM = np.exp(logs_SM)
        share_SM /= share_SM.sum(1, keepdims=True)
        counts_GM = np.zeros_like(start_GM)
        np.add.at(counts_GM, groups_S, share_SM)
        weights_GM = (counts_GM + num_sources * start_GM) / (size_G1 + num_sources)
    return weights_GM


def uniform_prior(num_rows: int, num_sources: int) -> Floats:
    """Equal weights [rows, M]."""
    return np.full((num_rows, num_sources), 1 / max(num_sources, 1))
