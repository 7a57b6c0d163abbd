#!/usr/bin/env bash
# Trains on a Cloud TPU VM or slice, and starts again after preemptions. `launch/tpu.sh --help` tells all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

usage() {
  cat <<'HELP'
usage: launch/tpu.sh --name NAME --zone ZONE --type TYPE [OPTION ...] CONFIG [KEY=VALUE ...]
       launch/tpu.sh --name NAME --zone ZONE [--project P] --status | --logs | --stop | --delete

Creates the TPU (or takes the one of that name), copies this folder to every worker, installs it there, runs
`policy-split train CONFIG KEY=VALUE ...` on every worker and shows what the first one prints. When the TPU is preempted
it is deleted and created anew, and the same command goes on from the last checkpoint. Ctrl-C ends only the watching;
the same command watches again. A TPU costs money until it is deleted: --delete.

  --name NAME       of the TPU
  --zone ZONE       for example us-east5-b
  --type TYPE       for example v5litepod-32, v5p-64, v6e-8, v4-32
  --project P       instead of gcloud's own setting
  --version V       runtime version, instead of the usual one of the type
  --spot            a spot TPU, from the queue: cheap, and preempted at any time
  --queued          wait in the queue for a TPU instead of failing when there is none
  --bucket gs://B   mounts this bucket (or a folder in it, gs://B/FOLDER) on every worker as /mnt/bucket, and puts the
                    runs into /mnt/bucket/runs. Models and data can lie there too: model.path=/mnt/bucket/Qwen3-8B
  --retries N       at most so many new starts (default 100)
  --dry-run         print the commands, run none
  --status          what the TPU and its workers do
  --logs            what the first worker prints, from its last 100 lines on
  --stop            interrupt the run; the TPU stays
  --delete          delete the TPU

All workers must see the run's folder: give --bucket, or output= on a file system that is mounted on every worker. A
folder on the workers themselves goes with them, and a preempted run then starts from nothing. The bucket needs a
hierarchical namespace, because a checkpoint is complete when its folder gets its name:
  gcloud storage buckets create gs://B --location REGION --uniform-bucket-level-access --enable-hierarchical-namespace
CONFIG and files named in settings are paths in this folder, or on the workers.

gcloud copies to several workers only with a key that the agent has: ssh-add ~/.ssh/google_compute_engine

Exit codes: 0 done, 2 bad input or a run that is not to go on (not tried again), 130 interrupted, otherwise the last
failure's (143: SIGTERM, as on preemption; what was done is saved, and the next start goes on from there). A run that fails five
times in a row soon after its start, with the TPU in order, is given up.
Environment: EXTRAS (default tpu; for example tpu,wandb) names the project's extras to install; POLL_SECONDS (15) pass
between two looks at the TPU; BACKOFF_SECONDS (10, doubled up to 300) pass before a new start.
HELP
}

say() {
  echo "launch/tpu.sh: $*" >&2
}

refuse() {
  say "error: $*"
  exit 2
}

action=train name='' zone='' type='' project='' version='' spot='' queued='' bucket='' retries=100 dry_run=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --name | --zone | --type | --project | --version | --bucket | --retries)
      [[ $# -gt 1 ]] || refuse "$1 needs a value"
      printf -v "${1#--}" %s "$2"
      shift
      ;;
    --spot) spot=yes queued=yes ;;
    --queued) queued=yes ;;
    --dry-run) dry_run=yes ;;
    --status | --logs | --stop | --delete) action=${1#--} ;;
    -h | --help)
      usage
      exit
      ;;
    -*) refuse "unknown option $1; launch/tpu.sh --help lists them" ;;
    *) break ;;
  esac
  shift
done
[[ $name && $zone ]] || refuse "--name and --zone say which TPU is meant; launch/tpu.sh --help tells more"
[[ $dry_run ]] || command -v gcloud >/dev/null || refuse "gcloud is needed: https://cloud.google.com/sdk/docs/install"

mount_folder=/mnt/bucket
poll=${POLL_SECONDS:-15}
common=("--zone=$zone" ${project:+"--project=$project"} --quiet)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
exec 3>&1

# Runs a command, or prints it as it could be typed.
run() {
  if [[ $dry_run ]]; then
    printf '%q' "$1" >&3
    printf ' %q' "${@:2}" >&3
    echo >&3
  else
    "$@"
  fi
}

# describe tpu-vm|queued-resources FIELD: prints its state, ABSENT where there is none; fails when gcloud cannot tell.
describe() {
  local found
  if found=$(run gcloud compute tpus "$1" describe "$name" "--format=value($2)" "${common[@]}" 2>"$scratch/error"); then
    echo "${found:-ABSENT}"
  elif grep -qi 'not.found' "$scratch/error"; then
    echo ABSENT
  else
    cat "$scratch/error" >&2
    return 1
  fi
}

# The state of the TPU or, while there is none, of its place in the queue.
look() {
  local state
  state=$(describe tpu-vm state) || return
  if [[ $state == ABSENT ]]; then
    state=$(describe queued-resources state.state) || return
  fi
  echo "$state"
}

# remote WORKER COMMAND: on one worker or on all of them; COMMAND is a line for the shell there.
remote() {
  run gcloud compute tpus tpu-vm ssh "$name" "--worker=$1" "--command=$2" --ssh-flag=-oServerAliveInterval=30 \
    "${common[@]}" </dev/null
}

# A line for the shell of a worker; every word arrives there as it is here.
on_worker() {
  printf '%q' bash
  printf ' %q' policy-split/launch/tpu_worker.sh "$@"
}

ask_status="if [ -f policy-split/launch/tpu_worker.sh ]; then $(on_worker status); else echo idle; fi"

delete() {
  local state
  state=$(describe queued-resources state.state) || return
  if [[ $state != ABSENT || ($dry_run && $queued) ]]; then
    # --force: together with its TPU
    run gcloud compute tpus queued-resources delete "$name" --force "${common[@]}"
  else
    run gcloud compute tpus tpu-vm delete "$name" "${common[@]}"
  fi
}

create() {
  say "creating $name ($type)"
  if [[ $queued ]]; then
    run gcloud compute tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$version" ${spot:+--spot} "${common[@]}"
  else
    run gcloud compute tpus tpu-vm create "$name" "--accelerator-type=$type" "--version=$version" "${common[@]}"
  fi
}

case $action in
  status)
    state=$(look) || exit
    [[ $dry_run ]] || echo "$name: $state"
    if [[ $dry_run || $state == READY ]]; then
      remote all "$ask_status"
    fi
    exit
    ;;
  logs)
    remote 0 "$(on_worker follow 100)"
    exit
    ;;
  stop)
    remote all "$(on_worker stop)"
    exit
    ;;
  delete)
    delete
    exit
    ;;
esac

[[ $type ]] || refuse "--type says what TPU to create, for example v5litepod-32"
[[ $# -gt 0 ]] || refuse "CONFIG is missing, for example configs/qwen3_8b.yaml"
[[ -f $1 || $1 == /* ]] || refuse "$1: no such file in this folder, which is what the workers get"
[[ $retries =~ ^[0-9]+$ ]] || refuse "--retries $retries: it must be a number"
if [[ ! $version ]]; then
  case $type in
    v2-* | v3-* | v4-*) version=tpu-ubuntu2204-base ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) refuse "--type $type: its runtime version is not known here; give it as --version (v7 and later: GKE alone)" ;;
  esac
fi
large=$(find . -path './.?*' -prune -o -path ./runs -prune -o -type f -size +200000k -print | head -n 1 || true)
[[ ! $large ]] || refuse "$large is too large to copy to every worker; move it out of this folder, into a bucket perhaps"

arguments=(train "$@")
output=''
for argument in "$@"; do
  [[ $argument != output=* ]] || output=yes
  [[ $argument != --* || $(usage) != *"  $argument "* ]] || refuse "$argument belongs before CONFIG"
done
bucket=${bucket#gs://} bucket=${bucket%/}
if [[ $bucket ]]; then
  hierarchical=$(run gcloud storage buckets describe "gs://${bucket%%/*}" \
    --raw '--format=value(hierarchicalNamespace.enabled)' ${project:+"--project=$project"}) ||
    refuse "the bucket gs://${bucket%%/*} cannot be looked at"
  [[ $dry_run || $hierarchical == True ]] ||
    refuse "gs://${bucket%%/*} has no hierarchical namespace, which only a new bucket gets; see launch/tpu.sh --help"
  [[ $output ]] || arguments+=("output=$mount_folder/runs")
elif [[ ! $output ]]; then
  say "without --bucket or output= the checkpoints lie on the workers and go with them"
fi
identity=$(printf '%s\n' "${arguments[@]}" | cksum | cut -d ' ' -f 1)

# Made once: what is edited here later does not get into the run when it starts anew. Nothing whose name starts with a
# dot is needed there, and macOS would add such files.
archive=$scratch/policy-split.tgz
COPYFILE_DISABLE=1 run tar -czf "$archive" --exclude './.?*' --exclude ./runs --exclude __pycache__ .

code=1       # of the last attempt
known=''     # whether the TPU has ever been ready
lost=''      # whether the last attempt ended because the TPU was gone
created=''   # whether the TPU is new, so that nothing can run on it
reached=''   # whether anything was ever copied to it
unreachable=0

# Returns when the TPU is ready: creates it where there is none, and anew where it was preempted.
get_ready() {
  local state before='' deleted=''
  while true; do
    state=$(look) || return
    case $state in
      READY)
        known=yes lost=''
        return
        ;;
      ABSENT)
        lost=yes
        create || return
        created=yes
        [[ ! $dry_run ]] || return 0
        ;;
      PREEMPTED | TERMINATED | SUSPENDED | FAILED)
        say "$name is $state; deleting it"
        lost=yes
        [[ ! $deleted ]] || return
        deleted=yes
        delete || return
        ;;
      STOPPED) refuse "$name is stopped; start it with gcloud compute tpus tpu-vm start, or --delete it" ;;
      *) [[ $state == "$before" ]] || say "$name is $state; waiting" ;;
    esac
    before=$state
    sleep "$poll"
  done
}

# Whether this very run goes on there already, as after a Ctrl-C.
goes_on() {
  local found other tries=0
  # Installing would interrupt it: a connection that fails once is no answer.
  until found=$(remote all "$ask_status"); do
    ((++tries < 3)) || return
    sleep "$poll"
  done
  other=$(grep '^running ' <<<"$found" | grep -v "^running $identity " | head -n 1)
  [[ ! $other ]] || refuse "$name is busy with another run (policy-split ${other#running * }); --stop ends it"
  [[ $found == *"running $identity "* ]] && ! grep -q '^ended\|^idle' <<<"$found"
}

copy() {
  say "copying this folder to every worker"
  if run gcloud compute tpus tpu-vm scp "$archive" "$name:policy-split.tgz" --worker=all "${common[@]}"; then
    reached=yes unreachable=0
    return
  fi
  # Never reached, it may well be this machine that is at fault, and the TPU is not given away for that.
  if [[ ! $reached && $(look) == READY ]]; then
    say "error: the workers cannot be reached; does the agent have the key? ssh-add ~/.ssh/google_compute_engine"
    exit 1
  fi
  if ((++unreachable >= 3)); then
    say "deleting $name, which cannot be reached"
    lost=yes unreachable=0
    delete
  fi
  return 1
}

set_up() {
  local line='mkdir -p policy-split && cd policy-split && rm -rf policy_split_jax && tar -xzf ../policy-split.tgz && cd'
  line+=" && $(on_worker install "${EXTRAS:-tpu}")"
  [[ ! $bucket ]] || line+=" && $(on_worker mount "$bucket" "$mount_folder")"
  remote all "$line"
}

# Shows what the first worker prints until the run ends there. A lost connection is taken up again.
follow() {
  local from=$1 state tries=0 since status
  while true; do
    since=$SECONDS status=0
    remote 0 "$(on_worker follow "$from")" || status=$?
    [[ $status -ne 0 ]] || return 0
    state=$(look) || state=UNKNOWN
    if [[ $state != READY && $state != UNKNOWN ]]; then
      say "$name is $state"
      lost=yes
      return 1
    fi
    ((SECONDS - since < 600)) || tries=0
    # 2: there is no run to follow, as on a worker that was made anew.
    ((status != 2 && ++tries < 20)) || return 1
    say "the connection to the first worker was lost; trying again"
    sleep "$poll"
    from=10
  done
}

# Sets `code` to how the run ended on all workers: 2 and 130 count wherever they occur, since the other workers only
# miss the one that ended first.
collect() {
  local found status=0 codes
  found=$(remote all "$(on_worker result 120)") || status=$?
  codes=$(sed -n 's/^ended with \([0-9]*\).*/\1/p' <<<"$found")
  if grep -qx 2 <<<"$codes"; then
    code=2
  elif grep -qx 130 <<<"$codes"; then
    code=130
  else
    code=$(grep -vx 0 <<<"$codes" | head -n 1)
    code=${code:-$status}
  fi
}

# One try, from nothing or from wherever the TPU stands, to the end of the run.
attempt() {
  local first=$1 from=+1
  code=1 lost='' created=''
  get_ready || return
  if [[ $first && ! $created ]] && goes_on; then
    say "the run goes on there already; its last lines and what follows:"
    from=10
  else
    copy || return
    say "installing"
    set_up || return
    remote all "$(on_worker start "${arguments[@]}")" || return
  fi
  watching=yes
  follow "$from" || return
  collect
}

watching=''
interrupted() {
  [[ ! $watching ]] || say "the run goes on; the same command watches it again, --stop ends it"
  exit 130
}
trap interrupted INT TERM

finish() {
  if [[ $known && ! $dry_run ]]; then
    say "$name is still there and costs money; to delete it: launch/tpu.sh --name $name --zone $zone --delete"
  fi
  exit "$code"
}

first=yes delay=${BACKOFF_SECONDS:-10} failures=0
for ((restarts = 1; ; restarts++)); do
  since=$SECONDS
  attempt "$first" || true
  first=''
  case $code in
    0 | 2 | 130) finish ;;
  esac
  if [[ ! $known ]]; then
    say "the TPU could not be had, for the reason above; where the zone has none to give, --queued waits for one"
    finish
  fi
  if ((SECONDS - since >= 600)); then
    delay=${BACKOFF_SECONDS:-10} failures=0
  elif [[ ! $lost ]] && ((++failures >= 5)); then
    say "it failed $failures times in a row soon after its start; not trying again"
    finish
  fi
  if ((restarts > retries)); then
    say "it was started anew $retries times; not trying again"
    finish
  fi
  say "new start $restarts of at most $retries in $delay s"
  sleep "$delay"
  delay=$((delay * 2 < 300 ? delay * 2 : 300))
done
