#!/usr/bin/env bash
# What a GPU says, in one call: parity of every op in Triton and CUDA C++, the GPU tests, compute-sanitizer, a model,
# and benchmarks. Everything goes to OUT as JSON and logs. Run from anywhere; needs torch with CUDA, pytest, and the
# library built by `python setup.py build_ext --inplace` (it is built here where it is missing and nvcc is there).
#
#   scripts/gpu_check.sh OUT                      every stage
#   scripts/gpu_check.sh OUT verify bench         these
#   scripts/gpu_check.sh --dry-run OUT            the same commands on a CPU, cut to one op: does the script work?
set -uo pipefail
dry=; [ "${1:-}" = --dry-run ] && { dry=1; shift; }
[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) && shift || exit 2
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD/kernels:$PWD" PYTHONUNBUFFERED=1
python=python3; python3 -c 'import torch' 2>/dev/null || python=.venv/bin/python
stages=${*:-facts build verify hopper model tests sanitizer bench}
status=0

stage() { # name, seconds at most, command: its output goes to the log, the end of it is shown
  local name=$1 limit=$2 start=$SECONDS code; shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1; code=$?
  echo "== $name: exit $code after $((SECONDS - start)) s"
  tail -n "${shown:-6}" "$out/$name.log"
  [ $code -eq 0 ] || status=1
}

for name in $stages; do
  case $name in
    facts) stage facts 60 bash -c "nvidia-smi -q | head -40; nvcc --version; $python -m pip list" ;;
    build)
      if [ -z "$dry" ] && ! compgen -G 'kernels/mistral_kernels/*.so' >/dev/null; then
        stage build 540 "$python" setup.py -q build_ext --inplace
      fi ;;
    verify)
      if [ -n "$dry" ]; then set -- --op swiglu --impl cpu --device cpu; else set -- --impl triton --impl cuda; fi
      shown=40 stage verify 400 "$python" -m mistral_kernels.verify --jobs "${dry:-$(nproc)}" --json "$out/verify.json" "$@" ;;
    hopper) stage hopper 540 "$python" scripts/gpu_hopper.py ${dry:+--dry-run} "$out/hopper.json" ;;
    model) stage model 200 "$python" scripts/gpu_model.py ${dry:+--device cpu} ;;
    tests) stage tests 400 "$python" -m pytest -q -m gpu ${dry:+--collect-only} ;;
    sanitizer)
      if ! command -v compute-sanitizer >/dev/null; then echo "== sanitizer: compute-sanitizer is not on PATH"; continue; fi
      for tool in memcheck racecheck; do
        stage "$tool" 200 compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" scripts/gpu_model.py --ops cuda
      done ;;
    bench)
      for what in ops attention decode; do
        stage "bench_$what" 200 "$python" -m bench "$what" --json "$out/bench_$what.json" \
          ${dry:+--quick --device cpu --only nothing}
      done ;;
    *) echo "no stage $name; there are facts build verify hopper model tests sanitizer bench"; status=2 ;;
  esac
done
exit $status
