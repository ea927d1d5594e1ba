#!/usr/bin/env bash
# Queues a job of several 8-GPU nodes under Slurm, from a checkout that the nodes see. Run it again
# to continue: jobs of one name wait for each other.
#
#   bash scripts/launch/slurm_gpu.sh --config FILE --workdir DIR --nodes 4 [--config.KEY=VALUE …]
#
#   --config FILE          as for switch-jax train
#   --workdir DIR          on a disk that the nodes share
#   --nodes N
#   --time LIMIT           of one job (24:00:00); before it ends, the job saves and queues itself again
#   --name NAME            of the job (switch-jax)
#   --partition PARTITION  (Slurm's default)
#   --account ACCOUNT      (Slurm's default)
#   --dry-run              print the commands only
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=switch-jax time=24:00:00
parse nodes "time name partition account" "$@"
[ -z "$bucket" ] || fail "--workdir must be a folder that the nodes share, not a bucket."
need sbatch "run this on a login node of a Slurm cluster."

# One process per GPU: under Slurm, JAX gives each process the GPU whose number is its rank on the
# node. So all processes must see all GPUs: no --gpus-per-task.
run bash -ec 'source scripts/venv.sh; install cuda' "$launcher"
run mkdir -p "$workdir"
run sbatch --job-name="$name" --dependency=singleton --nodes="$nodes" --ntasks-per-node=8 \
  --gpus-per-node=8 --exclusive --mem=0 --time="$time" \
  ${partition:+--partition="$partition"} ${account:+--account="$account"} \
  --requeue --signal=B:USR1@600 --output="${workdir//%/%%}/slurm-%j.log" --open-mode=append \
  scripts/launch/slurm_job.sh .venv/bin/switch-jax "${train[@]}"
