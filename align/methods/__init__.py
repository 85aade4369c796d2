"""Alignment methods: how distributions are converted to the target's tokens. METHODS lists them."""

from align.methods.kind import MethodKind
from store_schema.registry import Registry

METHODS = Registry(
    "method",
    MethodKind,
    {
        "bytes": "align.methods.kinds.bytes:Bytes",
        "exact": "align.methods.kinds.exact:Exact",
        "mined": "align.methods.kinds.mined:Mined",
        "stats": "align.methods.kinds.stats:Stats",
        "spans": "align.methods.kinds.spans:Spans",
        "gold": "align.methods.kinds.gold:Gold",
        "h_kl": "align.methods.kinds.h_kl:HybridKl",
        "p_kl": "align.methods.kinds.p_kl:ProjectionKl",
        "byte_prefix": "align.methods.kinds.byte_prefix:BytePrefix",
    },
)
