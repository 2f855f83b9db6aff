#!/bin/sh
# What training costs on a GPU, in ten minutes: figures for docs/gpu.md.
#
#     sh docs/examples/gpu_check.sh runs/gpu          # on a machine with one GPU, no network
#     sh docs/examples/gpu_check.sh runs/gpu tiny     # the same with tiny sizes: does it run?
#
# Call it where `python` has torch with CUDA, transformers, peft and accelerate; speculators 0.9 to be compared with it.
set -eu
out=${1:?folder for the figures}
size=${2:-llama-8b}
mkdir -p "$out"
export PYTHONPATH="$(pwd)" TOKENIZERS_PARALLELISM=false
case $size in
tiny) lengths=128 vocabularies=512 tokens=256 long=256 wide=512 width=64 rows=64 heads=4 kv=2 head=16 \
    attention=sdpa ;; # FlexAttention has no gradient on a CPU
*) lengths=2048,8192 vocabularies=32000,128256 tokens=8192 long=2048,8192 wide=128256,262144 \
    width=4096 rows=4096 heads=32 kv=8 head=128 attention=simple_flex_attention ;;
esac
{
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv 2>/dev/null || echo "no GPU"
    python -c 'import torch, transformers; print(torch.__version__, transformers.__version__)'
    date -u
} | tee "$out/machine.txt"
python -m bench.kernels.attention --lengths $long --rows $tokens --heads $heads --kv-heads $kv \
    --size $head --repeats 3 --out "$out/attention.json"
python docs/examples/loss_cost.py --vocabularies $wide --width $width --rows $rows --repeats 3 \
    --out "$out/losses.json"
python docs/examples/against_speculators.py --size $size --lengths $lengths --tokens $tokens \
    --vocabularies $vocabularies --draft-steps 3,7 --arms full,lora --precision bf16 --repeats 3 \
    --attention $attention --minutes 7 --out "$out/steps.json"
date -u >>"$out/machine.txt"
