#!/usr/bin/env bash
# Autoencoder on the first GPU, audio net and evaluation probe on the second (or beside it, with one GPU).
# first.sh DATA_DIR OUT_DIR
set -u
here=$(cd "$(dirname "$0")" && pwd); data=$1; out=$2; mkdir -p "$out"
export POCKET_RENDER_GPU=/tmp/librender_gpu.so PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
nvcc -O3 -use_fast_math -arch=sm_90 -shared -Xcompiler -fPIC "$here/../render/render.cu" -o $POCKET_RENDER_GPU || exit 1
last=$(($(python3 -c 'import torch; print(torch.cuda.device_count())') - 1))
CUDA_VISIBLE_DEVICES=0 python3 "$here/train_ae.py" "$data" "$out" "${AE_SECONDS:-370}" > "$out/ae.log" 2>&1 & ae=$!
CUDA_VISIBLE_DEVICES=$last python3 "$here/train_audio.py" "$data" "$out" "${AUDIO_SECONDS:-140}" "${PROBE_SECONDS:-50}" 2>&1 | tee "$out/audio.log"
wait $ae; tail -30 "$out/ae.log"
