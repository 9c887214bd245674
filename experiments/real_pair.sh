#!/usr/bin/env bash
# The four arms on a real pair, Qwen2.5-Coder 1.5B -> 0.5B Instruct, as far as a CPU reaches: 24 problems x 8 samples for
# the warm-up (3 DPO steps of 16 pairs), 64 problems for KD (4 steps of 16), 64 held-out problems of GSM8K's training
# file for the test, up to 512 tokens each: at 256 most of the teacher's responses are cut, and a shorter student would
# win by being short. About an hour a seed on one core with AMX, 18 GB of memory, 10 GB of disk at a time; resumes.
#
#     TEACHER=T STUDENT=S DATA=gsm8k_train.jsonl bash runs/real_pair.sh [SEED...]       -> runs/real_pair.json
#
# The learning rates are larger than the defaults because the steps are so few. They were not tuned.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python runs/real_pair.py split "$DATA"
model="--teacher $TEACHER --dtype bfloat16 --threads 1 --max-prompt-tokens 384 --batch-size 16 --micro-batch-size 4 --activation-checkpointing"

distil() { # distil STUDENT OUT SEED
    if [ ! -d "$2/student" ]; then
        python kd.py $model --student "$1" --data out/real/train.jsonl --limit 64 --max-new-tokens 256 \
            --lr 1e-5 --seed "$3" --save-every 1000 --out "$2"
        rm -rf "$2/checkpoint"
    fi
}

evaluate() { # evaluate MODEL OUT: a model that has its responses is not needed any more
    [ -f "$2/eval/table.json" ] || python eval.py --model "$1" --data gsm8k=out/real/test.jsonl --max-new-tokens 512 \
        --batch-size 64 --dtype bfloat16 --threads 1 --out "$2"
}

evaluate "$TEACHER" out/real/teacher
evaluate "$STUDENT" out/real/student
for seed in "${@:-0}"; do
    out=out/real/$seed
    if [ ! -f "$out/warm-kd/eval/table.json" ]; then
        if [ ! -d "$out/warm/student" ]; then
            python warmup_distill.py $model --student "$STUDENT" --data out/real/train.jsonl --limit 24 --samples 8 \
                --max-new-tokens 256 --prompts-per-batch 8 --beta 0.1 --lr 5e-6 --max-steps 3 --eval-limit 0 --seed "$seed" \
                --save-every 1000 --out "$out/warm"
            rm -rf "$out/warm/checkpoint"
        fi
        evaluate "$out/warm/student" "$out/warm"
        distil "$out/warm/student" "$out/warm-kd" "$seed"
        evaluate "$out/warm-kd/student" "$out/warm-kd"
        rm -rf "$out/warm-kd/student" "$out/warm/student"
    fi
    if [ ! -f "$out/kd/eval/table.json" ]; then
        distil "$STUDENT" "$out/kd" "$seed"
        evaluate "$out/kd/student" "$out/kd"
        rm -rf "$out/kd/student"
    fi
    python runs/real_pair.py collect
done
