#!/bin/sh
# vLLM on a GPU, in some six minutes: does all of it run there, and how fast? For docs/gpu.md.
#
#     sh docs/examples/gpu_serve.sh runs/gpu-serve
#
# Call it where `python` has afaspec's packages and vLLM for CUDA. It captures with transformers and
# through vLLM, measures a draft in vLLM, and changes the draft of a running server, there and back.
set -eu
out=${1:?folder for the figures}
count=${2:-2000} # prompts
mkdir -p "$out"
export PYTHONPATH="$(pwd):${PYTHONPATH:-}" TOKENIZERS_PARALLELISM=false
url=http://127.0.0.1:8765
run() { python -m afaspec "$@"; }
now() { date -u +%H:%M:%S; }
{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>/dev/null || echo "no GPU"
    python -c 'import torch, vllm; print(torch.__version__, vllm.__version__)'
} | tee "$out/machine.txt"
echo "$(now) serve"
run serve smollm2 --draft smollm2-draft --swappable --port 8765 --log "$out/vllm.log" >"$out/serve.log" 2>&1 &
trap 'kill $! 2>/dev/null || true' EXIT
for _ in $(seq 300); do curl -sf $url/health >/dev/null && break; sleep 1; done
# A draft of the same build and other values.
python - "$out/other" <<'P'
import shutil, sys
import torch
from afaspec.pairs.names import open_draft
from safetensors.torch import load_file, save_file
shutil.copytree(open_draft("smollm2-draft").folder, sys.argv[1], dirs_exist_ok=True)
file = f"{sys.argv[1]}/model.safetensors"
tensors = load_file(file)
tensors["fc.weight"] += 0.02 * torch.randn_like(tensors["fc.weight"])
save_file(tensors, file, metadata={"format": "pt"})
P
run bench smollm2 --url base=$url --suite builtin --size full --max-tokens 128 --rounds 2 --concurrency 1,16 \
    --out "$out/served" || echo "bench of the server failed"
for _ in 1 2 3 4 5; do
    run swap $url "$out/other"
    run swap $url --back
done 2>&1 | tee "$out/swaps.txt"
kill $!
wait $! || true
trap - EXIT
echo "$(now) bench"
run bench smollm2 --draft base=smollm2-draft --suite builtin --size full --max-tokens 128 --rounds 2 --out "$out/bench"
echo "$(now) capture with transformers"
run capture smollm2 --self-prompts "$count" --generate-with transformers --batch-size 1024 --out "$out/by-transformers"
echo "$(now) capture through vLLM"
run capture smollm2 "$out/by-transformers/self_prompts.jsonl" --generate-with vllm --states-with vllm --out "$out/by-vllm"
now
