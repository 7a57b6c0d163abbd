# Sourced by the other scripts.

# Prints the first Python of at least 3.11 (or $PYTHON, if that is set).
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "Python 3.11 or newer is needed; set PYTHON to its path" >&2
  return 2
}

# make_environment FOLDER REQUIREMENT...: a virtual environment with the project in it. Does nothing when the
# project's dependencies have not changed since it was made.
make_environment() {
  local folder=$1 stamp python requirement
  local requirements=()
  shift
  stamp="$* $(cksum <pyproject.toml)"
  if [[ -f $folder/.made && $(<"$folder/.made") == "$stamp" ]]; then
    return
  fi
  python=$(find_python)
  echo "Installing into $folder with $("$python" --version) ..."
  "$python" -m venv "$folder"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip
  for requirement in "$@"; do
    [[ $requirement == .* ]] && requirements+=(--editable)
    requirements+=("$requirement")
  done
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "${requirements[@]}"
  echo "$stamp" >"$folder/.made"
}
