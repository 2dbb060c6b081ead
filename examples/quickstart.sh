#!/usr/bin/env bash
# From nothing to a model that was pretrained, continued on a second domain without forgetting the first, and exported.
#
#   bash examples/quickstart.sh
#
#   QUICKSTART_DIR   where everything goes (default: runs/quickstart)
#   CONTROL=1        also run the continual phase without replay, to see what it forgets (about two minutes more)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${QUICKSTART_DIR:-runs/quickstart}
ranks=2
venv=${VENV:-.venv}

say() { printf '\n== %s\n' "$*"; }

say "environment"
bash tools/setup_env.sh "$venv"
export PATH="$(cd "$venv" && pwd)/bin:$PATH"
command -v nvidia-smi >/dev/null 2>&1 || export DS_ACCELERATOR=cpu
begin=$SECONDS
mkdir -p "$out"

bash examples/prepare_corpus.sh "$out"

train() {
    name=$1
    shift
    deepspeed --num_gpus $ranks --log_level warning examples/pretrain.py --config "examples/configs/$name.yaml" \
        "tokenizer=$out/tokenizer" "$@"
}
paths() { # overrides that point a configuration at the data of this run
    printf '%s ' "data.sources.0.path=$out/data/$1.train_text_document" \
        "data.validation.0.path=$out/data/prose.valid_text_document" "data.validation.1.path=$out/data/code.valid_text_document"
}

say "pretrain on prose"
train quickstart_pretrain "run_dir=$out/pretrain" $(paths prose)

say "continue on code, with longer documents and replay of prose"
first=$out/pretrain/checkpoints/$(cat "$out/pretrain/checkpoints/latest")
train quickstart_continual "run_dir=$out/continual" "model.init_from=$first" "data.replay.run=$out/pretrain" $(paths code)

compare=()
if [ "${CONTROL:-0}" = 1 ]; then
    say "control: the same phase without replay"
    train quickstart_continual "run_dir=$out/no_replay" "model.init_from=$first" data.replay=null $(paths code)
    compare=(--compare "without replay=$out/no_replay")
fi

say "export to Hugging Face format, and a sample"
last=$out/continual/checkpoints/$(cat "$out/continual/checkpoints/latest")
python tools/convert_checkpoint.py export "$last" "$out/model"
python tools/generate.py --model "$out/model" --prompt "def __init__(self" --tokens 60

say "report"
python tools/report.py "$out/pretrain" "$out/continual" ${compare[@]+"${compare[@]}"} --output "$out/report.html" --text

printf '\ndone in %d s after the installs\n  model   %s\n  report  %s\n' $((SECONDS - begin)) "$out/model" "$out/report.html"
