#!/usr/bin/env bash
# Makes the policy that ships in rlzoo/models/tiny, from nothing, in two supervised runs of the zoo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-outputs/tiny_policy}
threads=${2:-1}
export OMP_NUM_THREADS=$threads
python=.venv/bin/python
$python experiments/tiny_policy/make_blank.py "$out/blank" --seed 0
$python -m rlzoo.run experiment=tiny_policy_skill model.path="$out/blank" run_dir="$out/skill" \
    num_threads="$threads" seed=0
$python -m rlzoo.run experiment=tiny_policy_habits model.path="$out/skill/policy" \
    run_dir="$out/habits" num_threads="$threads" seed=0
echo "The policy is in $out/habits/policy; copy it to rlzoo/models/tiny to ship it."
