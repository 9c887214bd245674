#!/usr/bin/env bash
# When does the warm-up pay? Four arms and their controls on the toy, 10 seeds, test sets: runs/toy_ablation.py says which.
# About 2 hours of CPU time, two processes of one thread; resumes.
#
#     bash runs/toy_ablation.sh           -> runs/toy_ablation.json
#
# Settings are those of runs/toy_selected.json, chosen on the dev sets of other seeds. Delete it (and
# runs/dpo_sensitivity.json) to choose again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
[ -f runs/dpo_sensitivity.json ] || bash runs/dpo_sensitivity.sh
[ -f runs/toy_selected.json ] || python runs/toy_ablation.py select
for condition in gold mismatch teacher student; do
    python runs/toy_ablation.py report $condition 0 42 123 11 12 &
    python runs/toy_ablation.py report $condition 13 14 15 16 17
    wait $!
done
python runs/toy_ablation.py collect
