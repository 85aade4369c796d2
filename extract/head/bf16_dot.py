"""Products of bf16 matrices with float32 sums on a CPU: the innermost loop, written as instructions.

AVX-512 BF16 multiplies 32 pairs of bf16 numbers in one instruction (VDPBF16PS) and adds them in
float32, twice as many as a float32 product does. oneDNN gives such a product only rounded to bf16, in
which logits tie; here the sums stay as they are. IDS rows of the weight and LANES x 16 rows of hidden
states have their sums in registers (24 of 32), so each number that is loaded is used several times.

Shapes: IDS rows of the weight at a time, WIDTH rows of hidden states (a panel), H hidden.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from store_schema.compiled import cpu_features, emitted

IDS, LANES = 6, 4
WIDTH = 16 * LANES
"""Rows of hidden states in a panel."""
PAIR_BYTES = 4
"""Bytes of two neighbouring bf16 numbers of a row, which one instruction multiplies."""

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
_FLOATS, _PAIRS = ir.VectorType(_F32, 16), ir.VectorType(_I32, 16)
_VECTOR_BYTES = 64


def has_bf16_dot() -> bool:
    """Whether this CPU has the instruction, and no matrix unit (AMX): there torch is faster."""
    features = cpu_features()
    return "avx512bf16" in features and "amx-bf16" not in features


@emitted(None, "int64", "int64", "int64", "int64", "int64", "int64")
def add_dots(
    b: Any, weight: Any, row_bytes: Any, last: Any, panel: Any, num_pairs: Any, out: Any
) -> None:
    """out[i, r] += sum over h of weight[i, h] * hidden[r, h], for IDS rows i and a panel of rows r.

    Args:
        b: The builder of instructions.
        weight: Address of the first row's first bf16 number.
        row_bytes: From one row of the weight to the next.
        last: Index of the last row that may be read, from 0; results of rows beyond it mean nothing.
        panel: Address of [num_pairs, WIDTH, 2] bf16 hidden states.
        num_pairs: Half of the numbers of a row that are multiplied.
        out: Address of [IDS, WIDTH] float32.
    """
    dot_type = ir.FunctionType(_FLOATS, [_FLOATS, _PAIRS, _PAIRS])
    dot = b.module.declare_intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", (), dot_type)
    tile = [(i, lane) for i in range(IDS) for lane in range(LANES)]
    rows = []
    for i in range(IDS):
        readable = b.select(b.icmp_signed("<", _int(i), last), _int(i), last)
        rows.append(b.add(weight, b.mul(readable, row_bytes)))

    before, loop, after = b.block, b.append_basic_block(), b.append_basic_block()
    b.branch(loop)
    b.position_at_end(loop)
    pair = b.phi(_I64)
    pair.add_incoming(_int(0), before)
    sums = {place: b.phi(_FLOATS) for place in tile}
    at_panel = b.add(panel, b.mul(pair, _int(WIDTH * PAIR_BYTES)))
    at_row = b.mul(pair, _int(PAIR_BYTES))
    hidden = [_load(b, at_panel, _PAIRS, lane * _VECTOR_BYTES) for lane in range(LANES)]
    for i in range(IDS):
        numbers = _repeated(b, _load(b, b.add(rows[i], at_row), _I32))
        for lane in range(LANES):
            total = b.call(dot, [sums[i, lane], hidden[lane], numbers])
            sums[i, lane].add_incoming(ir.Constant(_FLOATS, [0.0] * 16), before)
            sums[i, lane].add_incoming(total, loop)
            sums[i, lane] = total
    following = b.add(pair, _int(1))
    pair.add_incoming(following, loop)
    b.cbranch(b.icmp_signed("<", following, num_pairs), loop, after)

    b.position_at_end(after)
    for i, lane in tile:
        offset = (i * WIDTH + 16 * lane) * 4
        found = _load(b, out, _FLOATS, offset)
        b.store(b.fadd(found, sums[i, lane]), _address(b, out, _FLOATS, offset), align=4)


@emitted("float32", "int32")
def float_of_bits(b: Any, bits: Any) -> Any:
    """The float32 number with these bits."""
    return b.bitcast(bits, _F32)


def _int(number: int) -> Any:
    return ir.Constant(_I64, number)


def _address(b: Any, start: Any, kind: Any, offset: int = 0) -> Any:
    return b.inttoptr(b.add(start, _int(offset)), kind.as_pointer())


def _load(b: Any, start: Any, kind: Any, offset: int = 0) -> Any:
    return b.load(_address(b, start, kind, offset), align=2)


def _repeated(b: Any, pair: Any) -> Any:
    """A vector of 16 equal pairs."""
    nothing = ir.Constant(_PAIRS, ir.Undefined)
    first = b.insert_element(nothing, pair, ir.Constant(_I32, 0))
    return b.shuffle_vector(first, nothing, ir.Constant(_PAIRS, [0] * 16))
