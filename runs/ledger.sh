#!/usr/bin/env bash
# The README's ledger: what each choice that the paper leaves open does to the toy, 5 seeds, each on its own toy.
# Greedy accuracy on the 500 dev problems after the warm-up alone; the test set is not touched. About 10 minutes on 2 cores.
#
#     bash runs/ledger.sh             -> runs/ledger.json and the table, printed
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD

run() {  # run SEED NAME FLAGS...
    local seed=$1 name=$2
    shift 2
    [ -f "out/$name/summary.json" ] && return
    python "$root/warmup_distill.py" --seed "$seed" --out "out/$name" "$@" >"out/$name.log" 2>&1 || cat "out/$name.log"
}

one_seed() {
    local seed=$1
    mkdir -p "out/ledger/$seed/out" && cd "out/ledger/$seed"
    run "$seed" "default"
    run "$seed" "eta-2" --eta 2
    run "$seed" "eta-6" --eta 6
    run "$seed" "replace-after" --replace after
    run "$seed" "teacher-greedy" --teacher-decoding greedy
    run "$seed" "keep-teacher" --keep teacher
    run "$seed" "keep-correct" --keep correct
    run "$seed" "beta-0.1" --beta 0.1
    run "$seed" "lr-1e-4" --lr 1e-4
    run "$seed" "nll-0" --nll-weight 0
    run "$seed" "logprobs-mean" --logprobs mean
    run "$seed" "reference-teacher" --reference teacher
    run "$seed" "label-smoothing-0.1" --label-smoothing 0.1
}

for pair in "1 2" "3 4" "5"; do  # two seeds at a time: one for each core
    for seed in $pair; do (one_seed "$seed") & done
    wait
done
python runs/ledger.py
