#!/usr/bin/env bash
# Check the format and run the whole test suite, on two CPU cores, in a virtual environment made for it.
set -euo pipefail
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
"$environment/bin/pip" install --quiet --requirement requirements.txt
"$environment/bin/ruff" check .
"$environment/bin/ruff" format --check .
"$environment/bin/python" -m pytest tests --numprocesses 2 --dist worksteal --quiet -p no:cacheprovider --show-capture=no --durations=5 "$@"
