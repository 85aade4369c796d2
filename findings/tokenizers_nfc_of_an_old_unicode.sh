#!/usr/bin/env bash
# tokenizers' NFC normaliser (Qwen's tokenizer.json has it) knows Unicode 9 only.
#
# Guess beforehand: it composes and orders as Python's unicodedata does, so either of the two may be used to
# bring a corpus into the form that Qwen reads.
# Seen: characters of Unicode 10 and later are unknown to it. U+11935 U+11930 (Dives Akuru, Unicode 13) stays
# two characters where Python makes U+11938; of the combining marks that Python 3.11 knows, 74 (U+0D3B of Unicode
# 10, U+09FE of 11, U+0EBA of 12, ...) count as letters, so "e" + mark + acute is not composed and marks are not
# put in order. Text in Python's NFC is left alone by it, the other way round it is not so: ids of a text that
# was normalised by Python first are then others than the model's own reading of it.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$place/venv/bin/python" - <<'P'
import sys
import unicodedata
from tokenizers import __version__
from tokenizers.normalizers import NFC

theirs, ours = NFC().normalize_str, lambda text: unicodedata.normalize("NFC", text)
print(f"tokenizers {__version__}, Python {sys.version.split()[0]} with Unicode {unicodedata.unidata_version}")
vowel = "\U00011935\U00011930"
print(f"{ascii(vowel)}: Python {ascii(ours(vowel))}, tokenizers {ascii(theirs(vowel))}")
marks = [chr(i) for i in range(0x300, 0x110000) if unicodedata.combining(chr(i))]
unknown = [mark for mark in marks if theirs(f"e{mark}\u0323") != ours(f"e{mark}\u0323")]
shown = ", ".join(f"U+{ord(mark):04X}" for mark in unknown[:6])
print(f"{len(unknown)} of {len(marks)} combining marks are letters to it: {shown}, ...")
stays = all(theirs(ours(f"e{mark}\u0323")) == ours(f"e{mark}\u0323") for mark in marks)
print(f"Python's NFC is left alone by it: {stays}")
sys.exit(theirs(vowel) != vowel or ours(vowel) == vowel or not unknown or not stays)
P
