"""Weights of checkpoints of one shape merged into one model; MERGES lists the methods."""

from fuse_train.merge.kind import MergeKind
from store_schema.registry import Registry

MERGES = Registry(
    "method of merging",
    MergeKind,
    {
        "linear": "fuse_train.merge.kinds.linear:Linear",
        "slerp": "fuse_train.merge.kinds.slerp:Slerp",
        "task_arithmetic": "fuse_train.merge.kinds.task_arithmetic:TaskArithmetic",
        "ties": "fuse_train.merge.kinds.ties:Ties",
        "dare_linear": "fuse_train.merge.kinds.dare_linear:DareLinear",
        "dare_ties": "fuse_train.merge.kinds.dare_ties:DareTies",
        "della": "fuse_train.merge.kinds.della:Della",
        "varm": "fuse_train.merge.kinds.varm:Varm",
        "sce": "fuse_train.merge.kinds.sce:Sce",
    },
)
