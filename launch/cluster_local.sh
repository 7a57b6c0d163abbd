#!/usr/bin/env bash
# Trains with several processes on this machine's CPU, to try what happens on several hosts:
#   launch/cluster_local.sh PROCESSES CONFIG [KEY=VALUE ...]
# It shows what process 0 prints, and the end of what the first process to fail printed; then all are stopped. DEVICES
# (default 1) is how many CPU devices each process pretends to have; POLICY_SPLIT is an installed policy-split to use
# instead of .venv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ || ! ${DEVICES:-1} =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: [DEVICES=D] launch/cluster_local.sh PROCESSES CONFIG [KEY=VALUE ...]" >&2
  exit 2
fi
processes=$1
shift
if [[ ! ${POLICY_SPLIT-} ]]; then
  make_environment .venv .
fi
policy_split=${POLICY_SPLIT:-.venv/bin/policy-split}
port=$("$(find_python)" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
logs=$(mktemp -d "${TMPDIR:-/tmp}/policy-split.XXXXXX")
echo "$processes processes, coordinator 127.0.0.1:$port; the logs of all but process 0 are in $logs" >&2

export JAX_PLATFORMS=cpu
if [[ ${XLA_FLAGS-} != *--xla_force_host_platform_device_count=* ]]; then
  export XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${DEVICES:-1}"
fi

ids=()
# Interrupts what still runs, and ends it if that is not enough. Each process has a group of its own, with its workers.
stop_all() {
  local id try
  for id in ${ids[@]+"${ids[@]}"}; do
    kill -INT -- "-$id" 2>/dev/null || true
  done
  for ((try = 0; try < 600; try++)); do
    [[ $(jobs -rp) ]] || break
    sleep 0.1
  done
  for id in ${ids[@]+"${ids[@]}"}; do
    kill -KILL -- "-$id" 2>/dev/null || true
  done
}
trap 'stop_all; exit 130' INT TERM

start() {
  "$policy_split" train "${@:2}" --coordinator "127.0.0.1:$port" --processes "$processes" --process-id "$1" \
    </dev/null &
  ids+=($!)
}
# With job control the processes hear interrupts, which a shell's background jobs otherwise do not.
set -m
start 0 "$@"
for ((i = 1; i < processes; i++)); do
  start "$i" "$@" >"$logs/$i.log" 2>&1
done
# Without it again, so that Ctrl-C reaches this script and not whatever it waits for.
set +m

left=$processes
while [[ $left -gt 0 ]]; do
  sleep 0.2
  for ((i = 0; i < processes; i++)); do
    if [[ ! ${ids[i]} ]] || kill -0 "${ids[i]}" 2>/dev/null; then
      continue
    fi
    code=0
    wait "${ids[i]}" 2>/dev/null || code=$?
    if [[ $code -ne 0 ]]; then
      stop_all
      echo "process $i ended with exit code $code" >&2
      [[ $i -eq 0 ]] || tail -n 20 "$logs/$i.log" >&2
      exit "$code"
    fi
    ids[i]='' left=$((left - 1))
  done
done
