#!/usr/bin/env bash
# Trains on a slice of TPU VMs (v6e and before); makes it if there is none of that name.
# Run it again to continue.
#
#   bash scripts/launch/tpu_vm.sh --config FILE --workdir gs://BUCKET/PATH --type v5p-128 --zone ZONE [--config.KEY=VALUE …]
#
#   --config FILE      as for switch-jax train; must be committed
#   --workdir DIR      gs://BUCKET/PATH, or a path on a disk that all hosts mount
#   --type TYPE        accelerator type
#   --zone ZONE
#   --name NAME        of the TPU (switch-jax)
#   --project PROJECT  (that of gcloud's configuration)
#   --runtime VERSION  software of the TPU VMs (the usual one for TYPE)
#   --dry-run          print the commands only
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

name=switch-jax
parse "type zone" "name project runtime" "$@"
source scripts/launch/cloud.sh
need gcloud "install the Google Cloud CLI."

place=(--zone="$zone" ${project:+--project="$project"})
succeeds gcloud compute tpus tpu-vm describe "$name" "${place[@]}" \
  || run gcloud compute tpus tpu-vm create "$name" "${place[@]}" \
    --accelerator-type="$type" --version="${runtime:-$(runtime_of "$type")}"
on_tpu_vms tpu-vm "$name" "${place[@]}" --worker=all
