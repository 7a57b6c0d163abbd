#!/usr/bin/env bash
# Policy Split on the embedded tiny model and task, on this machine's CPU, from nothing: makes .venv, installs the
# project, trains. Needs Python 3.11 or newer. Further arguments are settings, for example: train.seed=1 name=second
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh
make_environment .venv .
exec .venv/bin/policy-split train configs/tiny.yaml "$@"
