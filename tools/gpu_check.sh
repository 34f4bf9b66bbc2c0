#!/usr/bin/env bash
# Everything of this repository that needs a GPU, in one run: builds csrc, runs tests/gpu (law 1 with four ranks that
# share the GPU, and parity of Transformer Engine's linears, are steps of their own), times the ops and training steps
# in bf16 and FP8, and writes JSON and a table. Not run on a GPU yet.
#
#   tools/gpu_check.sh               on a machine with a GPU; the page goes to docs/benchmarks/gpu_check.md
#   tools/gpu_check.sh --dry-run     the same steps on CPU at sizes that say nothing, to see that they run; status 2
#
# OUT=FOLDER: where logs and figures go (default runs/gpu_check). PYTHON=...: the interpreter (default python).
# Status 0: every step passed; 1: one did not (its log is in OUT), or python has no torch; 2: there is no CUDA device.
# Where Transformer Engine or FlashAttention-3 cannot be used its steps are left out, and the table says so.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python} out=${OUT:-runs/gpu_check} device=cuda
failed=0

"$python" tools/gpu_check.py device
found=$?
[ $found -eq 0 ] || [ $found -eq 2 ] || exit 1 # not even asked: the error is above
if [ "${1:-}" = --dry-run ]; then
  device=cpu
elif [ $found -eq 2 ]; then
  echo "gpu_check: --dry-run runs the same steps on CPU" >&2
  exit 2
fi
mkdir -p "$out"
rm -f "$out"/*.json "$out"/*.log "$out"/steps.tsv "$out"/gpu_check.md

step() { # NAME COMMAND...: run, keep the log, go on whatever comes
  local name=$1 began=$SECONDS status
  shift
  echo "gpu_check: $name" >&2
  "$@" >"$out/$name.log" 2>&1
  status=$?
  if [ $status -ne 0 ]; then
    failed=1
    tail -n 5 "$out/$name.log" >&2
  fi
  printf '%s\t%s\t%s\n' "$name" "$([ $status -eq 0 ] && echo passed || echo "failed ($status)")" $((SECONDS - began)) \
    >>"$out/steps.tsv"
}

if [ $device = cuda ]; then
  ops=(--tokens 32768 --width 1536 --rounds 20)
  dense=(wan_1b --layers 30) moe=(wan_moe_7b_a2b --layers 6)
  peer=(--dtype bf16 --layers 30 --grid 21 30 52 --rounds 5)
  step build "$python" setup.py build_ext --inplace
  step kernels "$python" tools/gpu_check.py kernels
  export MEGAVID_NEEDS_KERNELS=1 # tests of kernels that are not there fail
else
  ops=(--tokens 512 --width 256 --rounds 1 --only router_topk)
  dense=(tiny --layers 4 --grid 1 4 4 --steps 1) moe=("${dense[@]}")
  peer=() # takes minutes on a CPU, and has a page of its own: tools/bench_peer.py
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # several ranks share few cores
fi
shared=tests/gpu/test_shared_gpu.py te=tests/gpu/test_te_cuda.py
step tests "$python" -m pytest -q tests/gpu --ignore $shared --ignore $te
step law1 "$python" -m pytest -q -s $shared
has_te=1
if [ $device = cpu ]; then
  has_te=0
  step te_parity "$python" -m pytest -q tests/distributed/test_te_linears.py # with a stand-in for the package
elif "$python" tools/gpu_check.py te; then
  step te_parity "$python" -m pytest -q -s -rs $te
else
  has_te=0
  printf 'te_parity\tleft out: Transformer Engine cannot be used\t0\n' >>"$out/steps.tsv"
fi
step ceiling "$python" tools/gpu_check.py ceiling --device $device --json "$out/ceiling.json"
step ops "$python" tools/bench_ops.py --device $device --ceiling "$out/ceiling.json" "${ops[@]}" --steps 0
train() { # NAME OPTIONS...: time training steps
  local name=$1
  shift
  step "$name" "$python" tools/gpu_check.py step "$@" --device $device --ceiling "$out/ceiling.json" \
    --json "$out/step_$name.json"
}
for choice in reference compiled; do
  train "dense_$choice" "${dense[@]}" --ops $choice
done
[ $device = cpu ] || train dense_cudnn "${dense[@]}" --attention cudnn
recipes=$("$python" tools/gpu_check.py recipes --device $device) || failed=1
for recipe in $recipes; do
  train "dense_$recipe" "${dense[@]}" --fp8 "$recipe"
done
if [ $has_te = 1 ]; then
  train dense_te "${dense[@]}" --linears transformer_engine
  train dense_te_tensorwise "${dense[@]}" --linears transformer_engine --fp8 tensorwise
fi
if [ $device = cpu ]; then
  train dense_tensorwise_attention "${dense[@]}" --fp8 tensorwise --fp8-attention # turned back to wide numbers
elif "$python" tools/gpu_check.py fa3; then
  fa3=("${dense[@]}" --attention flash_attn_3)
  train dense_fa3 "${fa3[@]}"
  train dense_fa3_tensorwise "${fa3[@]}" --fp8 tensorwise
  train dense_fa3_tensorwise_attention "${fa3[@]}" --fp8 tensorwise --fp8-attention
else
  printf 'dense_fa3\tleft out: FlashAttention-3 cannot be used\t0\n' >>"$out/steps.tsv"
fi
for routing in real forced; do
  train "moe_$routing" "${moe[@]}" --routing $routing
  train "moe_${routing}_tensorwise" "${moe[@]}" --routing $routing --fp8 tensorwise
done
[ ${#peer[@]} -eq 0 ] || step peer "$python" tools/bench_peer.py --device $device --profiled 0 "${peer[@]}"
step page "$python" tools/gpu_check.py page "$out" --out "$out/gpu_check.md"

if [ -f "$out/gpu_check.md" ]; then
  cat "$out/gpu_check.md"
  [ $device = cpu ] || cp "$out/gpu_check.md" docs/benchmarks/gpu_check.md
fi
if [ $device = cpu ]; then
  said=$([ $failed -eq 0 ] && echo "all steps ran" || echo "a step failed (above)")
  echo "gpu_check: dry run on CPU, $said; no CUDA device was measured" >&2
  exit 2
fi
exit $failed
