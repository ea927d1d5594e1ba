#!/usr/bin/env bash
# Runs on every host of a TPU VM before the start: installs switch_jax from the clone that this file
# is in, and mounts the bucket that is its argument, if it has one, as /mnt/BUCKET.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# By uv, because the Python of these hosts is 3.10.
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python 3.12
python3 -m uv pip install --quiet --editable '.[tpu]'

bucket=${1:-}
if [ -z "$bucket" ] || mountpoint -q "/mnt/$bucket"; then
  exit
fi
if ! command -v gcsfuse >/dev/null; then
  apt=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  curl -fsS "$apt/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $apt gcsfuse-$(lsb_release -cs) main" \
    | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get update -qq
  sudo apt-get install -qq gcsfuse
fi
sudo mkdir -p "/mnt/$bucket"
sudo chown "$USER" "/mnt/$bucket"
# No caches of metadata: what one host writes, the others must see at once.
gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
  "$bucket" "/mnt/$bucket"
