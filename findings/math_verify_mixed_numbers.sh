#!/usr/bin/env bash
# What does math-verify read in a mixed number such as "10 1/2", as word problems have it?
#
# Best guess beforehand: 21/2, or, if it knows no mixed numbers, the last or the first number, 1/2 or 10.
# Seen with math-verify 0.9.0 and latex2sympy2_extended 1.11.0: none of these. In plain text "10 1/2" and
# "3 1/2" are both 1, and "12 3/4" is 3: the whole is lost, and numerator and denominator do not stand for their
# quotient. So 10 1/2 is not equal to 10.5, and is equal to 3 1/2 and to 1. Only 3\frac{1}{2} in LaTeX is 7/2.
# A wrong answer is counted as right.
# Exits non-zero when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip --quiet --disable-pip-version-check install \
  "math-verify[antlr4-13-2]==0.9.0" "latex2sympy2_extended==1.11.0" "sympy==1.14.0"
cat > "$work/show.py" <<'PY'
import sys
from importlib.metadata import version

from math_verify import parse, verify


def read(text):
    return str(parse(text)[0])


def same(expected, given):
    return verify(parse(expected), parse(given))


print(f"math-verify {version('math-verify')}, latex2sympy2_extended {version('latex2sympy2_extended')}")
for text in ("10 1/2", "3 1/2", "12 3/4", r"$3\frac{1}{2}$", "1/2"):
    print(f"{text!r} is read as {read(text)}")
for expected, given in (("10.5", "10 1/2"), ("3 1/2", "10 1/2"), ("1", "10 1/2")):
    print(f"expected {expected!r}, given {given!r}: {same(expected, given)}")
values = [read(text) for text in ("10 1/2", "3 1/2", "12 3/4", r"$3\frac{1}{2}$")]
wrong = values == ["1", "1", "3", "7/2"]
wrong = wrong and not same("10.5", "10 1/2") and same("3 1/2", "10 1/2") and same("1", "10 1/2")
sys.exit(0 if wrong else 1)
PY
"$work/venv/bin/python" "$work/show.py"
