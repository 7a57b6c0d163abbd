#!/usr/bin/env bash
# What launch/tpu.sh does on each worker of a TPU; not meant to be called by hand. The run goes on when the connection
# that started it ends, so a laptop may sleep.
#   mount BUCKET FOLDER   a bucket as a folder; BUCKET is NAME or NAME/FOLDER
#   install EXTRAS        .venv with the project
#   start ARGUMENT...     policy-split ARGUMENT... in the background, after whatever ran before was stopped
#   status                what runs here, or how it ended: one line
#   follow LINES          the log from there (as `tail -n` counts), until the run ends
#   result SECONDS        waits so long for the end, stops what has not ended, and says how it ended: one line
#   stop                  interrupts the run
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
poll=${POLL_SECONDS:-1}
# pid: the process group of the run; command: a checksum of its arguments, and they; log: what it prints; code: its exit
# code, once it has ended
state=.launch

running() {
  [[ -f $state/pid && ! -f $state/code ]] && kill -0 -- "-$(<"$state/pid")" 2>/dev/null
}

# wait_for TRIES: whether the run has ended after so many looks at it.
wait_for() {
  local try
  for ((try = 0; try < $1; try++)); do
    running || return 0
    sleep "$poll"
  done
  ! running
}

# Interrupts the run, which then saves what it has, and ends it if that takes too long.
stop_run() {
  running || return 0
  kill -INT -- "-$(<"$state/pid")" 2>/dev/null || true
  wait_for 300 || kill -KILL -- "-$(<"$state/pid")" 2>/dev/null || true
}

# How the run ended. Without a code it was killed, as by a worker that is restarted.
code() {
  if [[ -f $state/code ]]; then
    cat "$state/code"
  else
    echo 137
  fi
}

mount_bucket() {
  local bucket=$1 folder=$2 only=()
  # It may be another bucket's by now; lazily, since a run that hangs may hold it.
  if mountpoint -q "$folder"; then
    fusermount -uz "$folder"
  fi
  if ! command -v gcsfuse >/dev/null; then
    echo "Installing gcsfuse ..."
    curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg |
      sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt" \
      "gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
  fi
  sudo mkdir -p "$folder"
  sudo chown "$(id -u):$(id -g)" "$folder"
  if [[ $bucket == */* ]]; then
    only=(--only-dir "${bucket#*/}")
  fi
  # Nothing is remembered about files: each worker must see at once what another has written.
  gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    ${only[@]+"${only[@]}"} "${bucket%%/*}" "$folder"
}

install() {
  local python
  # The TPU images bring Python 3.10, some a Python that cannot make environments; uv brings one that will do.
  if ! python=$(find_python 2>/dev/null) || ! "$python" -c 'import ensurepip' 2>/dev/null; then
    python3 -m pip install --quiet --disable-pip-version-check --user uv
    python3 -m uv python install --quiet 3.12
    PYTHON=$(python3 -m uv python find 3.12)
  fi
  make_environment .venv ".[$1]"
}

start() {
  stop_run
  mkdir -p "$state"
  rm -f "$state/code"
  if [[ -f $state/log ]]; then
    mv "$state/log" "$state/log.before"
  fi
  {
    printf '%s\n' "$@" | cksum | cut -d ' ' -f 1 | tr '\n' ' '
    printf '%q ' "$@"
  } >"$state/command"
  # With job control the run is a process group, which can be stopped whole, and it hears interrupts.
  set -m
  bash launch/tpu_worker.sh hold "$@" </dev/null >"$state/log" 2>&1 &
  echo $! >"$state/pid"
}

# What `start` leaves running: the run itself, and a note of how it ended.
hold() {
  local code=0
  trap '' HUP
  trap : INT
  .venv/bin/policy-split "$@" || code=$?
  echo "$code" >"$state/code.part"
  mv "$state/code.part" "$state/code"
}

follow() {
  if [[ ! -f $state/log ]]; then
    echo "nothing was started here" >&2
    return 2
  fi
  tail -n "$1" -F "$state/log" 2>/dev/null &
  # shellcheck disable=SC2064
  trap "kill $! 2>/dev/null || true" EXIT
  while running; do
    sleep "$poll"
  done
  sleep "$poll"
}

action=$1
shift
case $action in
  mount) mount_bucket "$@" ;;
  install) install "$@" ;;
  start) start "$@" ;;
  hold) hold "$@" ;;
  follow) follow "$@" ;;
  status)
    if running; then
      echo "running $(<"$state/command")"
    elif [[ -f $state/pid ]]; then
      echo "ended with $(code)"
    else
      echo "idle"
    fi
    ;;
  result)
    if wait_for "$1"; then
      echo "ended with $(code)"
    else
      # That tells nothing about the run: another worker's process had ended, and this one waited for it.
      stop_run
      echo "had to be stopped"
    fi
    if [[ $(code) -ne 0 ]]; then
      tail -n 5 "$state/log" | sed "s/^/$(hostname): /" >&2
    fi
    ;;
  stop) stop_run ;;
  *)
    echo "unknown action: $action" >&2
    exit 2
    ;;
esac
