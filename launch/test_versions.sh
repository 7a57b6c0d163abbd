#!/usr/bin/env bash
# Tests at one end of the ranges of pyproject.toml, in an environment of its own:
#   launch/test_versions.sh lowest    the lowest version of every direct dependency
#   launch/test_versions.sh newest    the newest of all
# Further arguments go to pytest; without any, every module is imported and the tests that touch each dependency run.
# PYTHON chooses the interpreter. uv reads its own settings: UV_FIND_LINKS and UV_CONSTRAINT=FILE with torch==2.13.0+cpu
# take PyTorch for the CPU alone.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

case ${1:-} in
  lowest) resolution=lowest-direct ;;
  newest) resolution=highest ;;
  *)
    echo "usage: launch/test_versions.sh lowest|newest [PYTEST ARGUMENT...]" >&2
    exit 2
    ;;
esac
folder=.venv-$1
shift
"$(find_python)" -m venv --clear "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
"$folder/bin/uv" pip install --quiet --python "$folder" --resolution "$resolution" --editable ".[test]"
"$folder/bin/uv" pip list --python "$folder"
export PATH="$PWD/$folder/bin:$PATH"
[[ $# -gt 0 ]] || set -- tests/test_imports.py tests/test_cli.py tests/test_policy.py tests/model tests/data \
  tests/rewards/test_pool.py tests/rewards/test_maths.py tests/serving tests/report \
  tests/training/test_update.py tests/training/test_loop.py
exec python -m pytest -q "$@"
