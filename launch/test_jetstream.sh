#!/usr/bin/env bash
# Tests the adapter to JetStream in an environment of its own: JetStream brings TensorFlow. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

make_environment .venv-jetstream ".[test,jetstream]"
exec .venv-jetstream/bin/python -m pytest tests/sampler/test_jetstream.py "$@"
