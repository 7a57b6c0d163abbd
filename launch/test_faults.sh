#!/usr/bin/env bash
# The whole fault harness, also what takes long: kills, damaged files, hostile answers and requests, long runs.
# What it measured is printed at its end; docs/reliability.md quotes it. Arguments go to pytest, for example:
# launch/test_faults.sh tests/faults/test_kill.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ $# -gt 0 ]] || set -- tests/faults
exec bash launch/test.sh -m 'slow or not slow' "$@"
