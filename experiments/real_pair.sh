#!/usr/bin/env bash
# A real pair on GSM8K, on a CPU: where the student's samples mismatch, whose answers are right (mismatch_real.json), and how
# far the student is from its teacher on held-out problems before and after a small warm-up, beside the teacher itself
# (mismatch_held_out.json).
#
#     TEACHER=Qwen/Qwen2.5-Coder-1.5B-Instruct STUDENT=Qwen/Qwen2.5-Coder-0.5B-Instruct bash experiments/real_pair.sh FILE
#     LAUNCH=echo TEACHER=T STUDENT=S bash experiments/real_pair.sh FILE          prints the commands
#
# FILE: openai/gsm8k's training problems as JSONL. Two hours on two cores that multiply bfloat16 well; resumes. Of the file, the
# first 1,000 problems are sampled and the last 128 are held out, each part sorted by the question's length, which saves
# padding. Of the pairs every fourth is kept, and 12 steps of 16 learn from 192 of them. --eta 1e9: on held-out problems
# nothing is spliced, log-probs are all that counts. DPO is the paper's; its learning rate and steps were not chosen: there
# was one try. At its end it prints the commands that make the two result files: each wants its checkout committed, so commit
# the first file before the second command. (The results in this folder were made by these commands, called one by one.)
set -euo pipefail
FILE=$(realpath "$1")
cd "$(dirname "$0")/.."
OUT=${OUT:-out/real} LAUNCH=${LAUNCH:-python}
mkdir -p "$OUT"

part() { # sed's command for the lines, name
    sed -n "$1" "$FILE" | python3 -c "import json, sys
print(*sorted(sys.stdin.read().splitlines(), key=lambda row: len(json.loads(row)['question'])), sep='\n')" >"$OUT/$2.jsonl"
}

sample() { # student, data, folder, more flags
    $LAUNCH warmup_distill.py --teacher "$TEACHER" --student "$1" --data "$OUT/$2.jsonl" --out "$OUT/$3" --pairs-only \
        --samples 1 --prompts-per-batch 64 --max-new-tokens 256 --dtype bfloat16 "${@:4}"
}

part 1,1000p train
part "$(($(wc -l <"$FILE") - 127)),\$p" held_out
sample "$STUDENT" train samples
[ "$LAUNCH" = echo ] || awk 'NR % 4 == 1' "$OUT/samples/pairs.jsonl" >"$OUT/pairs.jsonl"
sample "$STUDENT" held_out held_out/initial --eta 1e9
$LAUNCH dpo.py --model "$STUDENT" --pairs "$OUT/pairs.jsonl" --out "$OUT/dpo" --lr 1e-5 --max-steps 12 --batch-size 16 --dtype bfloat16
sample "$OUT/dpo/student" held_out held_out/dpo --eta 1e9
sample "$TEACHER" held_out held_out/teacher --eta 1e9
echo "python experiments/mismatch.py real $OUT/samples"
echo "python experiments/mismatch.py held_out --students $(echo "$OUT"/held_out/{initial,dpo,teacher})"
