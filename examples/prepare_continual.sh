#!/usr/bin/env bash
# What examples/studies/continual.yaml begins from: a pair of corpora, two models that know the first of them, and a teacher. In an
# environment made by tools/setup_env.sh.
#
#   bash examples/prepare_continual.sh DIR [PACKAGE]
#
#   DIR       where everything goes, such as runs/stdlib
#   PACKAGE   an installed package to read instead of Python's standard library
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?DIR}
steps=600

bash examples/prepare_corpus.sh "$out" "${2:-}"

say() { printf '\n== %s\n' "$*"; }

train() { # NAME CONFIG KEY=VALUE ...
    if [ ! -f "$out/$1/checkpoints/latest" ]; then
        python examples/pretrain.py --config "examples/configs/$2.yaml" "run_dir=$out/$1" "tokenizer=$out/tokenizer" train.dtype=float32 \
            "data.sources.0.path=$out/data/$source.train_text_document" "data.validation.0.path=$out/data/prose.valid_text_document" \
            "data.validation.1.path=$out/data/code.valid_text_document" train.threads_per_rank=1 checkpoint.every=200 checkpoint.keep_last=1 \
            logging.tensorboard=false "${@:3}"
    fi
}

say "code with its module's path as metadata"
python tools/preprocess_data.py --input "$out/corpus/code.train.jsonl" --tokenizer "$out/tokenizer" --output "$out/data/described.train" \
    --metadata 'Module: {path}'$'\n\n' --workers 2

source=prose
small=(model.hidden_size=64 model.intermediate_size=172 "train.steps=$steps" evaluation.every=200)
say "a model of prose, its learning rate decayed"
train decayed quickstart_pretrain "${small[@]}"
say "a model of prose, its learning rate left at half of the peak"
train constant quickstart_pretrain "${small[@]}" \
    schedule.kind=infinite schedule.cooldown_steps=100 schedule.constant_factor=0.5 schedule.decay_steps=0
source=code
say "a teacher: the first model, continued on code without replay"
train teacher quickstart_continual "model.init_from=$out/decayed/checkpoints/$(cat "$out/decayed/checkpoints/latest")" data.replay=null \
    train.steps=240
