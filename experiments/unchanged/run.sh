#!/usr/bin/env bash
# Runs every algorithm from two checkouts of rlzoo with the same seed: run.sh PYTHON OLD NEW OUT
# (2,048 responses each, one thread a run; about 40 s a run on an idle core).
set -eu
python=$1 old=$2 new=$3 out=$4
for tree in old new; do
    for file in "${!tree}"/conf/algo/*.yaml; do
        algo=$(basename "$file" .yaml)
        case $algo in shared | clipped | sft) continue ;; dapo) sampler=dynamic ;; *) sampler=uniform ;; esac
        run=$out/$tree/$algo
        if [ ! -e "$run/summary.json" ]; then
            rm -rf "$run" && mkdir -p "$out/$tree"
            (cd "${!tree}" && PYTHONPATH=$PWD OMP_NUM_THREADS=1 "$python" -m rlzoo.run run_dir="$run" \
                algo="$algo" sampler=$sampler limits.max_responses=2048 val_every=4 seed=0 \
                num_threads=1 logger=csv > "$run.out" 2>&1) || echo "$run failed: see $run.out"
        fi
    done
done
