#!/usr/bin/env bash
# Train on all machines of a Cloud TPU pod slice, one process a machine:
#   TPU=my-pod ZONE=us-east5-b scripts/launch/tpu_pod.sh train CONFIG --run RUN
# Needs gcloud, and on each machine this repository in ~/mtrec_jax with scripts/setup.sh run and the
# [tpu] extra installed. Prepared data and RUN are on storage that all machines see.
set -euo pipefail
if [ "$#" -lt 2 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
command="cd ~/mtrec_jax && exec .venv/bin/python scripts/train.py$(printf ' %q' "$@")"
exec gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$command"
