#!/usr/bin/env bash
# Replacement rates and the place of t* for eta from 0.5 to 10, on the toy and, with the variables below, on a real pair;
# accuracy after warm-up and KD against eta on the toy. Resumes.
#
#     bash runs/eta_sweep.sh                                                  the toy alone, 10 minutes on one core
#     TEACHER=T STUDENT=S DATA=gsm8k_train.jsonl bash runs/eta_sweep.sh       125 problems x 8 samples of 160 tokens, too:
#                       40 minutes on one CPU core for Qwen2.5-Coder 1.5B and 0.5B, 6 GB of memory
#
# --eta 1000 splices nothing and makes no pair: sampling and checking are all that the sweep needs.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
if [ -n "${TEACHER:-}" ]; then
    if [ ! -f out/eta_real/mismatch.json ]; then
        python warmup_distill.py --teacher "$TEACHER" --student "$STUDENT" --data "$DATA" --limit 125 \
            --max-prompt-tokens 384 --samples 8 --max-new-tokens 160 --prompts-per-batch 5 --eta 1000 --eval-limit 0 \
            --dtype bfloat16 --threads 1 --out out/eta_real
    fi
    rm -rf out/eta_real/student # the student unchanged: no pair was made
    python runs/eta_sweep.py out/eta_real
else
    python runs/eta_sweep.py
fi
