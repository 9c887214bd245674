#!/usr/bin/env bash
# NOT RUN: no machine with 8 GPUs was to be had. What is checked: every command parses, and --dry-run prints its plan.
# Qwen2.5-7B-Instruct -> Qwen2.5-1.5B-Instruct on GSM8K: warm-up, KD from the warmed-up student, KD alone, evaluation.
#
#     bash runs/paper_qwen.sh               8 GPUs of one node
#     bash runs/paper_qwen.sh --dry-run     shapes, memory a GPU, steps, tokens, time: needs the models' config.json only
#
# From the paper: N = 8, eta = 4, the pair of models. Ours, since it does not say: all that is written out below; the two
# KD runs have the same steps. README, "What the paper leaves open", has the flags that change them.
set -euo pipefail
cd "$(dirname "$0")/.."
gpus=${GPUS:-8}
launch="torchrun --nproc_per_node $gpus"
teacher=${TEACHER:-Qwen/Qwen2.5-7B-Instruct}
student=${STUDENT:-Qwen/Qwen2.5-1.5B-Instruct}
warmed=out/paper-qwen/warmup/student
if [ "${1:-}" = --dry-run ]; then # one process prints the plan for all; the warmed-up student has the student's shapes
    launch=python warmed=$student
    set -- --dry-run "$gpus"
fi

$launch warmup_distill.py --teacher $teacher --student $student --data openai/gsm8k --data-config main \
    --samples 8 --eta 4 --temperature 1 --max-prompt-tokens 512 --max-new-tokens 512 --prompts-per-batch 8 \
    --beta 0.1 --lr 5e-7 --epochs 1 --batch-size 64 --micro-batch-size 4 --activation-checkpointing \
    --eval-limit 64 --out out/paper-qwen/warmup "$@"

for loss in forward_kl reverse_kl skew_reverse_kl; do
    $launch kd.py --teacher $teacher --student $warmed --data openai/gsm8k --data-config main \
        --loss $loss --kd-rate 0.5 --max-prompt-tokens 512 --max-new-tokens 512 --lr 1e-5 --epochs 3 --batch-size 64 \
        --micro-batch-size 4 --activation-checkpointing --out out/paper-qwen/warm-$loss "$@"
    $launch kd.py --teacher $teacher --student $student --data openai/gsm8k --data-config main \
        --loss $loss --kd-rate 0.5 --max-prompt-tokens 512 --max-new-tokens 512 --lr 1e-5 --epochs 3 --batch-size 64 \
        --micro-batch-size 4 --activation-checkpointing --out out/paper-qwen/kd-$loss "$@"
    [ $# = 0 ] || continue # evaluation has no plan to print
    $launch eval.py --model out/paper-qwen/kd-$loss/student out/paper-qwen/warm-$loss/student --data gsm8k math \
        --compare out/paper-qwen/kd-$loss/student out/paper-qwen/warm-$loss/student --out out/paper-qwen/eval-$loss
done
