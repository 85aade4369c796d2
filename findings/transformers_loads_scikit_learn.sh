#!/usr/bin/env bash
# Does an installed scikit-learn change what importing a transformers model class loads?
#
# Best guess beforehand: no. A causal language model needs nothing of scikit-learn; what uses it would be
# loaded when it is called.
# Seen with transformers 5.19.0 and scikit-learn 1.9.1: where scikit-learn can be imported, importing
# LlamaForCausalLM loads it at once, for a helper of assisted generation: hundreds of modules of
# scikit-learn and SciPy in every process that loads a model. lm-eval brings scikit-learn along, so
# installing it makes every start of an unrelated command slower.
# Exits non-zero when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install "torch==2.13.0" "transformers==5.19.0"
cat > "$work/show.py" <<'PY'
import sys
from importlib.metadata import version

from transformers import LlamaForCausalLM  # noqa: F401

loaded = [name for name in sys.modules if name.partition(".")[0] in ("sklearn", "scipy")]
print(f"transformers {version('transformers')}: {len(loaded)} modules of scikit-learn and SciPy")
print(len(loaded), file=sys.stderr)
PY
count() { "$work/venv/bin/python" "$work/show.py" 2> "$work/count"; tail -n 1 "$work/count" > "$work/$1"; }
count without
pip install "scikit-learn==1.9.1"
count with
echo "modules without scikit-learn installed: $(cat "$work/without"), with 1.9.1: $(cat "$work/with")"
[ "$(cat "$work/without")" = 0 ] && [ "$(cat "$work/with")" -gt 100 ]
