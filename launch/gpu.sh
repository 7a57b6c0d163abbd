#!/usr/bin/env bash
# Trains on NVIDIA GPUs: those of this machine, or of several nodes. `launch/gpu.sh --help` tells all.
set -euo pipefail

usage() {
  cat <<'HELP'
usage: launch/gpu.sh CONFIG [KEY=VALUE ...]                     all GPUs of this machine
       launch/gpu.sh --slurm NODES [--slurm-args "OPTION ..."] CONFIG [KEY=VALUE ...]
       launch/gpu.sh --coordinator HOST:PORT --processes N --process-id I CONFIG [KEY=VALUE ...]

Makes .venv with the project and CUDA, and runs `policy-split train CONFIG KEY=VALUE ...`, one process on each node,
which uses all GPUs that it sees (CUDA_VISIBLE_DEVICES chooses). All nodes must see this folder and the run's.

  --slurm NODES       on whole nodes of SLURM: within an allocation (salloc, sbatch) at once, otherwise as a new job,
                      which SLURM starts again after a node failed or the job was preempted
  --slurm-args "..."  more options for sbatch, or for srun within an allocation, for example
                      "--partition=gpu --gpus-per-node=8 --time=2-00:00:00"
  --coordinator HOST:PORT --processes N --process-id I
                      without SLURM: run it on every node, with I = 0 on HOST, where PORT must be free
  --dry-run           print the commands, run none

Environment: EXTRAS (default cuda; for example cuda,wandb) names the project's extras to install; POLICY_SPLIT is an
installed policy-split to use instead of .venv; XLA_FLAGS and XLA_CLIENT_MEM_FRACTION win over what is set here.
HELP
}

refuse() {
  echo "launch/gpu.sh: error: $*" >&2
  exit 2
}

nodes='' slurm_args='' cluster=() dry_run=''
while [[ $# -gt 0 ]]; do
  case $1 in
    --slurm | --slurm-args | --coordinator | --processes | --process-id)
      [[ $# -gt 1 ]] || refuse "$1 needs a value"
      case $1 in
        --slurm) nodes=$2 ;;
        --slurm-args) slurm_args=$2 ;;
        *) cluster+=("$1" "$2") ;;
      esac
      shift
      ;;
    --dry-run) dry_run=yes ;;
    -h | --help)
      usage
      exit
      ;;
    -*) refuse "unknown option $1; launch/gpu.sh --help lists them" ;;
    *) break ;;
  esac
  shift
done
[[ $# -gt 0 ]] || refuse "CONFIG is missing, for example configs/qwen3_1p7b.yaml"
[[ ! $nodes || $nodes =~ ^[1-9][0-9]*$ ]] || refuse "--slurm $nodes: it must be a number of nodes"
[[ ! $nodes || ${#cluster[@]} -eq 0 ]] || refuse "--slurm finds the processes by itself; leave out ${cluster[0]}"
[[ ${#cluster[@]} -eq 0 || ${#cluster[@]} -eq 6 ]] ||
  refuse "--coordinator, --processes and --process-id belong together; give all three"

# sbatch runs a copy of this script from a folder of its own, but in the project's.
here=$(dirname "${BASH_SOURCE[0]}")
[[ ! -f $here/environment.sh ]] || cd "$here/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

# Runs a command in this shell's place, or prints it as it could be typed.
finish_with() {
  if [[ $dry_run ]]; then
    printf '%q' "$1"
    printf ' %q' "${@:2}"
    echo
  else
    exec "$@"
  fi
}

# Here rather than in the job: compute nodes often reach no package index.
if [[ ! ${POLICY_SPLIT-} && ! $dry_run ]]; then
  make_environment .venv ".[${EXTRAS:-cuda}]"
fi
policy_split=${POLICY_SPLIT:-.venv/bin/policy-split}

read -ra more <<<"$slurm_args"
if [[ $nodes && ! ${SLURM_JOB_ID-} ]]; then
  # Whole nodes, since the process of a node uses all that it has. A job that SLURM starts again goes on from its last
  # checkpoint, and its log is kept.
  finish_with sbatch --job-name=policy-split "--nodes=$nodes" --ntasks-per-node=1 --exclusive --mem=0 --requeue \
    --open-mode=append "--chdir=$PWD" ${more[@]+"${more[@]}"} launch/gpu.sh --slurm "$nodes" "$@"
  exit
fi

# set_default NAME VALUE
set_default() {
  export "$1=$2"
  [[ ! $dry_run ]] || printf 'export %s=%q\n' "$1" "$2"
}

# Lets XLA move transfers between GPUs behind computation; without it a sharded step waits for each of them.
if [[ ${XLA_FLAGS-} != *--xla_gpu_enable_latency_hiding_scheduler=* ]]; then
  set_default XLA_FLAGS "${XLA_FLAGS:+$XLA_FLAGS }--xla_gpu_enable_latency_hiding_scheduler=true"
fi
# JAX takes 75 % of a GPU's memory at its start. Nothing else runs there, but NCCL and cuBLAS need some of their own.
if [[ ! ${XLA_CLIENT_MEM_FRACTION-} && ! ${XLA_PYTHON_CLIENT_MEM_FRACTION-} ]]; then
  set_default XLA_CLIENT_MEM_FRACTION 0.92
fi

if [[ $nodes ]]; then
  # No binding: a task that names no CPUs may otherwise be given a single one. One process that ends ends the others,
  # which would wait for it.
  finish_with srun "--nodes=$nodes" "--ntasks=$nodes" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 \
    ${more[@]+"${more[@]}"} "$policy_split" train "$@"
else
  finish_with "$policy_split" train ${cluster[@]+"${cluster[@]}"} "$@"
fi
