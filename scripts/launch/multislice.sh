#!/usr/bin/env bash
# Trains on several equal slices of TPU VMs (v6e and before), one queued resource; requests them if
# there are none of that name, and waits. Run it again to continue. On GKE: gke_xpk.sh --slices.
#
#   bash scripts/launch/multislice.sh --config FILE --workdir gs://BUCKET/PATH --type v5p-128 --slices 2 --zone ZONE [--config.KEY=VALUE …]
#
#   --config FILE      as for switch-jax train; must be committed
#   --workdir DIR      gs://BUCKET/PATH, or a path on a disk that all hosts mount
#   --type TYPE        accelerator type of one slice
#   --slices N         how many; mesh.slice is set to it
#   --zone ZONE
#   --name NAME        of the queued resource (switch-jax)
#   --project PROJECT  (that of gcloud's configuration)
#   --runtime VERSION  software of the TPU VMs (the usual one for TYPE)
#   --dry-run          print the commands only
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=switch-jax
parse "type slices zone" "name project runtime" "$@"
check_count slices 1
source scripts/launch/cloud.sh
need gcloud "install the Google Cloud CLI."

train+=(--config.mesh.slice="$slices")
place=(--zone="$zone" ${project:+--project="$project"})
succeeds gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
  || run gcloud compute tpus queued-resources create "$name" "${place[@]}" \
    --node-count="$slices" --node-prefix="$name" \
    --accelerator-type="$type" --runtime-version="${runtime:-$(runtime_of "$type")}"
wait_for ACTIVE gcloud compute tpus queued-resources describe "$name" "${place[@]}" --format="value(state.state)"
on_tpu_vms queued-resources "$name" "${place[@]}" --node=all --worker=all
