#!/usr/bin/env bash
# Autoencoder on the first GPU; audio net, probe and a short trial of two optimisers on the second.
# first.sh DATA_DIR OUT_DIR
set -u
here=$(cd "$(dirname "$0")" && pwd); data=$1; out=$2; mkdir -p "$out" /tmp/trial
export POCKET_RENDER_GPU=/tmp/librender_gpu.so PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=/tmp/inductor OMP_NUM_THREADS=4
nvcc -O3 -use_fast_math -arch=sm_90 -shared -Xcompiler -fPIC "$here/../render/render.cu" -o $POCKET_RENDER_GPU || exit 1
CUDA_VISIBLE_DEVICES=0 python3 "$here/train_ae.py" "$data" "$out" "${AE_SECONDS:-370}" > "$out/ae.log" 2>&1 & ae=$!
export CUDA_VISIBLE_DEVICES=1
python3 "$here/train_audio.py" "$data" "$out" "${AUDIO_SECONDS:-140}" "${PROBE_SECONDS:-50}" 2>&1 | tee "$out/audio.log"
for optimizer in muon adamw; do
  timeout 110 python3 "$here/train_dit.py" "$data" /tmp/none /tmp/trial 88 --optimizer $optimizer --clips 1500 --pixels .8 --own .6 2>&1 | tee "$out/trial_$optimizer.log" | tail -40
done
tar czf "$out/inductor.tgz" -C /tmp inductor; ls -la "$out"/inductor.tgz; find "$out"/inductor.tgz -size +15M -delete
wait $ae; tail -30 "$out/ae.log"
