#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that XPK has made, as one workload. Run it again to continue.
#
#   bash scripts/launch/gke_xpk.sh --config FILE --workdir gs://BUCKET/PATH --cluster CLUSTER --type v6e-64 --zone ZONE [--config.KEY=VALUE …]
#
#   --config FILE      as for switch-jax train; must be committed
#   --workdir DIR      gs://BUCKET/PATH, or a path in a storage that the cluster mounts everywhere
#   --cluster CLUSTER
#   --type TYPE        TPU type of one slice
#   --zone ZONE
#   --slices N         how many slices (1); mesh.slice is set to it
#   --name NAME        of the workload (switch-jax)
#   --project PROJECT  (that of gcloud's configuration)
#   --image IMAGE      what switch_jax is installed on (python:3.12)
#   --restarts N       how often at most, after a failure or a preemption (10)
#   --dry-run          print the commands only
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=switch-jax slices=1 image=python:3.12 restarts=10
parse "cluster type zone" "slices name project image restarts" "$@"
check_count slices 1
check_count restarts 0
source scripts/launch/cloud.sh
need xpk "pip install xpk."

train+=(--config.mesh.slice="$slices")
place=(--cluster="$cluster" --zone="$zone" ${project:+--project="$project"})
pack
make_secret
# XPK restarts what exits with 143 or another code from 127. `exec`: its SIGTERM must reach Python.
run xpk workload create --workload="$name" "${place[@]}" --tpu-type="$type" --num-slices="$slices" \
  --base-docker-image="$image" --script-dir="$(dirname "$bundle")" \
  --env-file="$secret" \
  --max-restarts="$restarts" --termination-grace-period-seconds=600 \
  --command="$unpack && cd switch_jax && pip install --quiet --editable '.[tpu,buckets]' && exec switch-jax $(quoted_twice "${train[@]}")"
