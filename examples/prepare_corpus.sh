#!/usr/bin/env bash
# The data of the quickstart and of examples/studies: two corpora, a tokenizer, tokens. In an environment made by tools/setup_env.sh.
#
#   bash examples/prepare_corpus.sh [DIR [PACKAGE]]
#
#   DIR       where everything goes (default: runs/quickstart)
#   PACKAGE   an installed package to read instead of Python's standard library, such as sympy
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/quickstart}
package=${2:-}
mkdir -p "$out"

say() { printf '\n== %s\n' "$*"; }

say "two corpora from ${package:-the standard library of Python}: prose (documentation) and code (sources without it)"
python examples/build_corpus.py --output "$out/corpus" ${package:+--package "$package"}

say "tokenizer and tokens"
if [ ! -f "$out/tokenizer/tokenizer.json" ]; then
    python tools/train_tokenizer.py --input "$out/corpus/prose.train.jsonl" "$out/corpus/code.train.jsonl" --vocab-size 2048 --output "$out/tokenizer"
fi
for domain in prose code; do
    for split in train valid; do
        python tools/preprocess_data.py --input "$out/corpus/$domain.$split.jsonl" --tokenizer "$out/tokenizer" \
            --output "$out/data/$domain.$split" --workers 2
    done
done
