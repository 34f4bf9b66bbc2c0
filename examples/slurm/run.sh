#!/bin/sh
# Hardware and expected result: README.md beside this file. SHARDS is the folder that `megavid prepare` wrote.
# More arguments go to `megavid launch slurm`: --account A --partition P --dry-run --nodes 4 ...
set -eu
cd "$(dirname "$0")/../.."
: "${SHARDS:?set SHARDS to the folder that megavid prepare wrote}"

[ "$#" -gt 0 ] || set -- --nodes 8
megavid launch slurm examples/slurm/preset.toml --out runs/30b --data.path "$SHARDS" "$@"
