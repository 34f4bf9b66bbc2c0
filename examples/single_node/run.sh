#!/bin/sh
# Hardware and expected result: README.md beside this file. SHARDS is the folder that `megavid prepare` wrote.
set -eu
cd "$(dirname "$0")/../.."
: "${SHARDS:?set SHARDS to the folder that megavid prepare wrote}"

torchrun --nproc-per-node 8 -m megavid train examples/single_node/preset.toml --out runs/7b --data.path "$SHARDS"
