#!/usr/bin/env bash
# Set up the environment with the test extras and run the tests: bash tests/run.sh [pytest arguments]
#
#   TEST_WORKERS   processes that share the test files when no arguments are given (default: 2); each starts up to 8 ranks of its own
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
bash tools/setup_env.sh "$venv" dev
export PATH="$(cd "$venv" && pwd)/bin:$PATH"
# Ranks and tests share the cores; threads on top of them would only wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ $# -eq 0 ]; then
    set -- -m "not slow" -n "${TEST_WORKERS:-2}" --dist loadfile
fi
exec python -m pytest "$@"
