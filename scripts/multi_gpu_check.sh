#!/usr/bin/env bash
# One call: trains a 7B-shaped random model with FSDP2 on 1, 2, 4 ... processes and writes what was seen to a JSON file.
#
#   scripts/multi_gpu_check.sh out/multi_gpu.json            # every count of GPUs that is here; NCCL
#   scripts/multi_gpu_check.sh out/dry.json --tiny           # the same calls on CPUs in a tiny shape; gloo
#   scripts/multi_gpu_check.sh out/x.json --counts "1 2" --layers 24 --steps 8 --skip-eager
#
# Float32 master weights, their gradient and two moments take 16 bytes a weight: 32 layers need about 116 GB over all
# GPUs. Without --layers, the most layers are taken that fit on the fewest GPUs of the run.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
export PYTHONPATH=kernels:.${PYTHONPATH:+:$PYTHONPATH}
exec "$python" scripts/multi_gpu_check.py "$@"
