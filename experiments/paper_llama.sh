#!/usr/bin/env bash
# NOT RUN: no machine with 8 GPUs was to be had. What is checked: every command parses, and --dry-run prints its plan.
# Llama-3.1-8B-Instruct -> Llama-3.2-1B-Instruct on instructions: warm-up, KD from the warmed-up student, KD alone,
# the five instruction sets with Rouge-L under MiniLLM's protocol.
#
#     bash runs/paper_llama.sh              8 GPUs of one node
#     bash runs/paper_llama.sh --dry-run    shapes, memory a GPU, steps, tokens, time: needs the models' config.json only
#
# From the paper: N = 8, eta = 4. Ours, since it does not say: all that is written out below; the two KD runs have the
# same steps. Alpaca and not Dolly is trained on: the test set `dolly` is held out of databricks-dolly-15k.
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=${GPUS:-8}
launch="torchrun --nproc_per_node $gpus"
teacher=${TEACHER:-meta-llama/Llama-3.1-8B-Instruct}
student=${STUDENT:-meta-llama/Llama-3.2-1B-Instruct}
warmed=out/paper-llama/warmup/student
if [ "${1:-}" = --dry-run ]; then # one process prints the plan for all; the warmed-up student has the student's shapes
    launch=python warmed=$student
    set -- --dry-run "$gpus"
fi

$launch warmup_distill.py --teacher $teacher --student $student --data tatsu-lab/alpaca --template alpaca --limit 12000 \
    --samples 8 --eta 4 --temperature 1 --max-prompt-tokens 512 --max-new-tokens 256 --prompts-per-batch 8 \
    --beta 0.1 --lr 5e-7 --epochs 1 --batch-size 64 --micro-batch-size 4 --activation-checkpointing \
    --eval-limit 64 --out out/paper-llama/warmup "$@"

for loss in forward_kl reverse_kl skew_reverse_kl; do
    $launch kd.py --teacher $teacher --student $warmed --data tatsu-lab/alpaca \
        --template alpaca --limit 12000 --loss $loss --kd-rate 0.5 --max-prompt-tokens 512 --max-new-tokens 256 \
        --lr 1e-5 --epochs 3 --batch-size 64 --micro-batch-size 4 --activation-checkpointing \
        --out out/paper-llama/warm-$loss "$@"
    $launch kd.py --teacher $teacher --student $student --data tatsu-lab/alpaca \
        --template alpaca --limit 12000 --loss $loss --kd-rate 0.5 --max-prompt-tokens 512 --max-new-tokens 256 \
        --lr 1e-5 --epochs 3 --batch-size 64 --micro-batch-size 4 --activation-checkpointing \
        --out out/paper-llama/kd-$loss "$@"
    [ $# = 0 ] || continue # evaluation has no plan to print
    $launch eval.py --model out/paper-llama/kd-$loss/student out/paper-llama/warm-$loss/student \
        --data dolly selfinst vicuna sni unni --preset minillm \
        --compare out/paper-llama/kd-$loss/student out/paper-llama/warm-$loss/student --out out/paper-llama/eval-$loss
done
