#!/usr/bin/env bash
# Queues a job of several nodes, with GPUs or without, under Slurm, from a checkout that the nodes
# see. Run it again to continue: jobs of one name wait for each other.
#
#   bash scripts/launch/slurm_gpu.sh --config FILE --workdir DIR --nodes 4 [--config.KEY=VALUE …]
#
#   --config FILE          as for switch-jax train
#   --workdir DIR          on a disk that the nodes share
#   --nodes N
#   --gpus_per_node N      one process each (8); 0: nodes without GPUs, one process a node
#   --time LIMIT           of one job (24:00:00); before it ends, the job saves and queues itself again
#   --name NAME            of the job (switch-jax)
#   --partition PARTITION  (Slurm's default)
#   --account ACCOUNT      (Slurm's default)
#   --dry-run              print the commands only
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

# Of a time limit as Slurm reads it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.
minutes() {
  awk -v limit="$1" 'BEGIN {
    n = split(limit, part, /[-:]/)
    print limit ~ /-/ ? 1440 * part[1] + 60 * part[2] + part[3] : n == 3 ? 60 * part[1] + part[2] : part[1]
  }'
}

name=switch-jax time=24:00:00 gpus_per_node=8
parse nodes "gpus_per_node time name partition account" "$@"
[[ $workdir != *://* ]] || fail "--workdir must be a folder that the nodes share, where Slurm writes its log."
check_count nodes 1
check_count gpus_per_node 0
[[ $time =~ ^[0-9]+(-[0-9]+)?(:[0-9]+){0,2}$ ]] \
  || fail "--time must be a limit such as 24:00:00 or 2-00:00:00, not '$time'."
[ "$(minutes "$time")" -ge 20 ] \
  || fail "--time must be at least 20 minutes, the last 10 of which are for saving, not '$time'."
need sbatch "run this on a login node of a Slurm cluster."

# One process per GPU: under Slurm, JAX gives each process the GPU whose number is its rank on the
# node. So all processes must see all GPUs: no --gpus-per-task.
gpus=() tasks=1 extra=''
if ((gpus_per_node > 0)); then
  gpus=(--gpus-per-node="$gpus_per_node") tasks=$gpus_per_node extra=' cuda'
fi
job=(--job-name="$name" --dependency=singleton --nodes="$nodes" --ntasks-per-node="$tasks"
  ${gpus[@]+"${gpus[@]}"} --exclusive --mem=0 --time="$time"
  ${partition:+--partition="$partition"} ${account:+--account="$account"}
  --requeue --signal=B:USR1@600 --output="${workdir//%/%%}/slurm-%j.log" --open-mode=append
  scripts/launch/slurm_job.sh .venv/bin/switch-jax "${train[@]}")

# Slurm would let a job that no nodes can run wait for ever.
run sbatch --test-only "${job[@]}" \
  || fail "Slurm has no such nodes for this job, as it says above; sinfo lists what there is."
run bash -ec "source scripts/venv.sh; install$extra" "$launcher"
run mkdir -p "$workdir"
run sbatch "${job[@]}"
