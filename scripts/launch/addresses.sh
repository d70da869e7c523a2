#!/usr/bin/env bash
# Train on machines that ssh reaches, one process a machine, or on one machine in several processes:
#   scripts/launch/addresses.sh "host1 host2" train CONFIG --run RUN
#   scripts/launch/addresses.sh "localhost localhost" train CONFIG --run RUN
# A process has all accelerators of its machine; a machine that is named several times gives each of
# its processes one, in their order.
# The first address is the coordinator; PORT (9911) has to be open on it. On every machine, this
# folder is at the same path, with its .venv; prepared data and RUN are on storage that all see.
# The exit status is that of the first process in this order that fails. To stop a run on other
# machines so that it saves, send SIGTERM to its processes there.
set -euo pipefail
if [ "$#" -lt 3 ]; then
  sed -n '2,10s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
read -r -a hosts <<<"$1"
shift
port="${PORT:-9911}"
here="$(cd "$(dirname "$0")/../.." && pwd)"
python="${VENV:-$here/.venv}/bin/python"
processes=()
stop() { kill -TERM "${processes[@]}" 2>/dev/null || true; }
trap stop INT TERM
for number in "${!hosts[@]}"; do
  host="${hosts[$number]}"
  command=("$python" "$here/scripts/train.py" --coordinator "${hosts[0]}:$port"
    --processes "${#hosts[@]}" --process "$number" "$@")
  before=0 all=0
  for other in "${!hosts[@]}"; do
    [ "${hosts[$other]}" = "$host" ] || continue
    all=$((all + 1))
    [ "$other" -ge "$number" ] || before=$((before + 1))
  done
  [ "$all" -eq 1 ] || command=(env "JAX_LOCAL_DEVICE_IDS=$before" "${command[@]}")
  if [ "$host" = localhost ]; then
    "${command[@]}" &
  else
    ssh -tt "$host" "cd $(printf '%q' "$PWD") && exec$(printf ' %q' "${command[@]}")" </dev/null &
  fi
  processes+=("$!")
done
status=0
for process in "${processes[@]}"; do
  code=0
  wait "$process" || code=$?
  while [ "$code" -gt 128 ] && kill -0 "$process" 2>/dev/null; do  # a signal came: wait on
    code=0
    wait "$process" || code=$?
  done
  [ "$status" -ne 0 ] || status="$code"
done
exit "$status"
