#!/usr/bin/env bash
# The transformer on all GPUs.   second.sh DATA_DIR MODELS_DIR OUT_DIR SECONDS [options of train_dit.py]
set -u
here=$(cd "$(dirname "$0")" && pwd); data=$1; models=$2; out=$3; seconds=$4; shift 4; mkdir -p "$out"
export POCKET_RENDER_GPU=/tmp/librender_gpu.so PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=/tmp/inductor OMP_NUM_THREADS=8
nvcc -O3 -use_fast_math -arch=sm_90 -shared -Xcompiler -fPIC "$here/../render/render.cu" -o $POCKET_RENDER_GPU || exit 1
n=$(python3 -c 'import torch; print(torch.cuda.device_count())')
python3 -m torch.distributed.run --standalone --nproc-per-node "$n" "$here/train_dit.py" "$data" "$models" "$out" "$seconds" "$@" 2>&1 | tee "$out/dit.log"
