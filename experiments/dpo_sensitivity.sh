#!/usr/bin/env bash
# How much the DPO settings matter that the paper does not give: beta, learning rate, NLL weight, sum or mean, reference,
# filter; the toy, dev sets of seeds 1 to 5. About half an hour on one core; resumes.
#
#     bash runs/dpo_sensitivity.sh        -> runs/dpo_sensitivity.json
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
python runs/dpo_sensitivity.py
