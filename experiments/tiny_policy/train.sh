#!/usr/bin/env bash
# Makes the policy that ships in rlzoo/models/tiny, from nothing, in three supervised runs of the zoo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-outputs/tiny_policy}
threads=${2:-1}
export OMP_NUM_THREADS=$threads
python=.venv/bin/python
$python experiments/tiny_policy/make_blank.py "$out/blank" --seed 0
model=$out/blank
for stage in skill polish habits; do
    $python -m rlzoo.run "experiment=tiny_policy_$stage" "model.path=$model" "run_dir=$out/$stage" \
        "num_threads=$threads" seed=0
    model=$out/$stage/policy
done
echo "The policy is in $model; copy it to rlzoo/models/tiny to ship it."
