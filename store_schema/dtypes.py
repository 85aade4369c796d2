"""Dtypes that models are loaded in."""

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
"""Dtypes of a model, with the bytes of a weight."""

_ALIASES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp64": "float64",
    "double": "float64",
}


def full_name(name: str) -> str:
    """A dtype's name in full: "bfloat16" of "bf16" or "torch.bfloat16"; unknown ones as they are."""
    plain = name.strip().lower().removeprefix("torch.")
    return _ALIASES.get(plain, plain)
