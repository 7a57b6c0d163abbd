#!/usr/bin/env bash
# Looks for known vulnerabilities in what the project and its tests install, as PyPI reports them: needs the network.
# Further arguments go to pip-audit, for example: --vulnerability-service osv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

make_environment .venv-test ".[test]"
make_environment .venv-audit "pip-audit>=2.10,<3"
# Strict: what cannot be looked up is a failure. PyPI does not know builds of a version, such as torch's +cpu.
listed=$(mktemp)
trap 'rm -f "$listed"' EXIT
.venv-test/bin/python -m pip list --format freeze --exclude-editable | sed 's/+[a-z0-9.]*$//' >"$listed"
.venv-audit/bin/pip-audit --strict --disable-pip --no-deps --requirement "$listed" "$@"
