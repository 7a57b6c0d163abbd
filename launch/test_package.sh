#!/usr/bin/env bash
# Builds wheel and source distribution, looks at what is in them, and tries each in an environment of its own: answers
# of the embedded model and two steps of training in an empty folder, far from the repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/environment.sh
source launch/environment.sh

python=$(find_python)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m venv "$place/build"
"$place/build/bin/python" -m pip install --quiet --disable-pip-version-check "build>=1.3,<2"
"$place/build/bin/python" -m build --outdir "$place/dist" . >"$place/build.log" || {
  cat "$place/build.log"
  exit 1
}
"$python" - "$place"/dist/*.whl "$place"/dist/*.tar.gz <<'EOF'
import pathlib, subprocess, sys, tarfile, zipfile

wheel, source = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
    metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
package = {str(path) for path in map(pathlib.Path, subprocess.check_output(["git", "ls-files", "policy_split_jax"], text=True).split())}
info = {name for name in names if ".dist-info/" in name}
assert names - info == package, sorted((names - info) ^ package)
assert {name.partition("/")[2] for name in info} == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}, info
assert "\nLicense-Expression: Apache-2.0\nLicense-File: LICENSE\n" in metadata, metadata[:1000]
with tarfile.open(source) as archive:
    files = {name.partition("/")[2] for name in archive.getnames()}
tracked = set(subprocess.check_output(["git", "ls-files"], text=True).splitlines())
assert files == tracked | {"PKG-INFO"}, sorted(files ^ (tracked | {"PKG-INFO"}))
for path in (wheel, source):
    print(f"{pathlib.Path(path).name}: {pathlib.Path(path).stat().st_size / 2**20:.1f} MiB")
EOF
cp configs/tiny.yaml "$place"
for package in "$place"/dist/*.whl "$place"/dist/*.tar.gz; do
  rm -rf "$place/venv" "$place/empty"
  mkdir "$place/empty"
  "$python" -m venv "$place/venv"
  "$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check "${package}[serve]"
  (
    cd "$place/empty"
    PATH="$place/venv/bin:$PATH"
    unset PYTHONPATH
    policy-split --version
    policy-split serve --help >help.txt
    echo '{"question": "Make 35 from 3, 5, 4."}' >questions.jsonl
    policy-split sample --prompts questions.jsonl --mode both --n 2 --max-new-tokens 16 --output answers.jsonl
    [[ $(wc -l <answers.jsonl) -eq 4 ]]
    policy-split train "$place/tiny.yaml" train.steps=2 rollout.questions_per_step=4 eval.questions=4 eval.k=2
    ls runs/tiny/report.html runs/tiny/summary.json
  )
  echo "$(basename "$package") installs and works"
done
