#!/usr/bin/env bash
# Tests plans with a real TPU compiler, in an environment of its own: libtpu compiles for TPUs on machines without
# one, but JAX looks for a TPU wherever it is installed. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

make_environment .venv-tpu ".[test,tpu]"
# No flags: elsewhere tests compile without optimizing, and plans are of programs as they are run.
XLA_FLAGS="" JAX_PLATFORMS=cpu exec .venv-tpu/bin/python -m pytest tests/planning "$@"
