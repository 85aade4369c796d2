"""Make the demo's text and models: `first_run.demo.make`, which `logitfuse demo` runs too.

python examples/make_demo.py --out runs/demo/inputs --seed 0
"""

from __future__ import annotations

from first_run.demo.make import main

if __name__ == "__main__":
    main()
