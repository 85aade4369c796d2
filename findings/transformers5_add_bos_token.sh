#!/usr/bin/env bash
# A folder whose tokenizer_config.json says `add_bos_token: true` beside a tokenizer.json that puts nothing before
# a text (DeepSeek V3, coder and LLM as published; class LlamaTokenizerFast). Guess beforehand: the setting is
# honoured, or at least warned of. Seen: transformers 4.57 puts BOS before the text; transformers 5.19 takes the key
# out of the file's settings once there is a tokenizer.json and says nothing, so the same folder gives text without
# the BOS that the model was trained with. Given as an argument of from_pretrained it is honoured.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/make.py" <<'P'
import json, sys
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
words = ["<s>", "</s>"] + sorted(pre_tokenizers.ByteLevel.alphabet())
t = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
t.decoder = decoders.ByteLevel()
t.post_processor = processors.ByteLevel(trim_offsets=False)
t.add_special_tokens(["<s>", "</s>"])
t.save(sys.argv[1] + "/tokenizer.json")
config = {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": None, "add_bos_token": True, "add_eos_token": False}
json.dump(config, open(sys.argv[1] + "/tokenizer_config.json", "w"))
json.dump({"model_type": "deepseek_v3"}, open(sys.argv[1] + "/config.json", "w"))
P
cat > "$place/read.py" <<'P'
import sys, tokenizers, transformers
from transformers import AutoTokenizer
plain = AutoTokenizer.from_pretrained(sys.argv[1])
asked = AutoTokenizer.from_pretrained(sys.argv[1], add_bos_token=True)
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("class", type(plain).__name__, "ids of 'a':", plain("a")["input_ids"], "asked for BOS:", asked("a")["input_ids"])
found = plain("a")["input_ids"][0] == 0
sys.exit(0 if found == (sys.argv[2] == "yes") else 1)
P
for version in "4.57.1 yes" "5.19.0 no"; do
    set -- $version
    python3 -m venv "$place/v$1"
    "$place/v$1/bin/pip" install -q "transformers==$1" jinja2==3.1.6 >/dev/null
    mkdir -p "$place/m$1"
    "$place/v$1/bin/python" "$place/make.py" "$place/m$1"
    "$place/v$1/bin/python" "$place/read.py" "$place/m$1" "$2"
done
