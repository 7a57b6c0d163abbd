#!/usr/bin/env bash
# Installs what the tests need and runs every check: format, lint, types, tests. Arguments go to pytest, for
# example: -m slow, or tests/objective. The slow tests alone: launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

make_environment .venv-test ".[test]"
PATH="$PWD/.venv-test/bin:$PATH"
if [[ $# -eq 0 ]]; then
  ruff format --check .
  ruff check .
  pyright
fi
# Pictures of the pages, where there is a browser to take them.
export POLICY_SPLIT_SCREENSHOTS="${POLICY_SPLIT_SCREENSHOTS:-$PWD/build/screenshots}"
exec python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
