#!/bin/sh
# Hardware and expected result: README.md beside this file. Run from anywhere, `megavid` installed.
set -eu
cd "$(dirname "$0")/../.."
preset=examples/quickstart/preset.toml
out=runs/quickstart

megavid doctor
# the first half, tensor x expert parallel: the preset stops at step 30
megavid train $preset --out $out --ranks 4 --parallel.tensor 2 --parallel.expert 2
# the second half, pipeline x expert parallel, from the same checkpoint
megavid train $preset --out $out --ranks 4 --parallel.pipeline 2 --parallel.expert 2 --train.stop_at_step 0
megavid inspect $out/checkpoints/latest
megavid sample $out/checkpoints/latest --prompt "a red circle moving right" --out $out/circle.mp4
