#!/usr/bin/env bash
# Make a virtual environment with megatron_ext in it: tools/setup_env.sh [VENV] [EXTRAS]
#   VENV    where (default: .venv in the repository)
#   EXTRAS  extras of setup.py, such as dev or dev,cuda (default: none)
# PyTorch is installed only if the environment has none that fits: the CPU build where there is no NVIDIA driver and the index has one,
# else the index's own. PYTHON chooses the interpreter (default: python3), TORCH the version (default below).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
extras=${2:-}
python=${PYTHON:-python3}
torch=${TORCH:-2.13.0}

"$python" - <<'EOF' || exit 1
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"megatron_ext needs Python 3.11 to 3.13; {sys.executable} is {sys.version.split()[0]}. Choose another one: PYTHON=python3.12 {sys.argv[0]}")
EOF

# The stamp says what the environment was made from, so that a second call takes no time.
wanted=$(sha256sum <setup.py | cut -d' ' -f1)
stamp=$venv/.megatron_ext-${extras:-base}
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
fits() { "$venv/bin/python" -c 'import torch; v = tuple(map(int, torch.__version__.split(".")[:2])); raise SystemExit(not (2, 11) <= v <= (2, 13))' 2>/dev/null; }
if fits; then
    echo "PyTorch: already in $venv"
else
    echo "PyTorch: installing $torch"
    if command -v nvidia-smi >/dev/null 2>&1; then
        pip install --quiet "torch==$torch"
    else
        # Some indices carry the CPU build under a local version, which is much smaller; the plain version runs on a CPU as well.
        pip install --quiet "torch==$torch+cpu" 2>/dev/null || pip install --quiet "torch==$torch"
    fi
fi
echo "megatron_ext: installing${extras:+ with extras $extras}"
pip install --quiet -e ".${extras:+[$extras]}"
echo "$wanted" >"$stamp"
echo "environment: $venv ($("$venv/bin/python" -c 'from importlib.metadata import version as v; print("torch", v("torch") + ", deepspeed", v("deepspeed"))'))"
