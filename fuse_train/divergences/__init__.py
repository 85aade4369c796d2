"""How far the target's distribution is from a source's; DIVERGENCES lists the ways to measure it."""

from fuse_train.divergences.kind import DivergenceKind
from store_schema.registry import Registry

DIVERGENCES = Registry(
    "divergence",
    DivergenceKind,
    {
        "cross_entropy": "fuse_train.divergences.cross_entropy:CrossEntropy",
        "kl": "fuse_train.divergences.kl:Kl",
        "reverse_kl": "fuse_train.divergences.reverse_kl:ReverseKl",
        "jsd": "fuse_train.divergences.jsd:Jsd",
        "uld": "fuse_train.divergences.uld:Uld",
    },
)
