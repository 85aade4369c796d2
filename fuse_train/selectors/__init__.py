"""Selectors give each source its weight at each position; SELECTORS lists them."""

from fuse_train.selectors.kind import SelectorKind
from store_schema.registry import Registry

SELECTORS = Registry(
    "selector",
    SelectorKind,
    {
        "uniform": "fuse_train.selectors.kinds.uniform:Uniform",
        "static": "fuse_train.selectors.kinds.static:Static",
        "min_ce": "fuse_train.selectors.kinds.min_ce:MinCe",
        "avg_ce": "fuse_train.selectors.kinds.avg_ce:AvgCe",
        "author": "fuse_train.selectors.kinds.author:Author",
        "hedge": "fuse_train.selectors.kinds.hedge:Hedge",
        "asn": "fuse_train.selectors.kinds.asn:Asn",
        "constant": "fuse_train.selectors.kinds.constant:Constant",
        "bayes": "fuse_train.selectors.kinds.bayes:Bayes",
    },
)
