#!/usr/bin/env bash
# All of the training that needs a GPU, stage by stage.  One GPU or several of one host.
#
#   run.sh DATA_DIR WORK_DIR STAGE SECONDS [options of the stage's program]
#
# Stages, in order: warm (from ../pocket-*.safetensors, no budget), ae, audio (and probe), latents (transformer on latents, then
# on pixels), together (transformer and decoder end to end), export.  Each starts from WORK_DIR/STAGE of the stage before, or,
# run again, from where it was.  Checkpoints are f16, in files below 16 MiB, written four times a stage.
# CUDA_VISIBLE_DEVICES chooses the GPUs; PROCESSES=2 tries several processes on a CPU.  Without the stage warm it trains from nothing.
set -eu
here=$(cd "$(dirname "$0")" && pwd); data=$1; work=$2; stage=$3; seconds=${4:-0}; shift; shift; shift; [ $# -gt 0 ] && shift
mkdir -p "$work"
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-/tmp/inductor} OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
python=${PYTHON:-python3}
gpus=$($python -c 'import torch; print(torch.cuda.device_count())')      # those that CUDA_VISIBLE_DEVICES leaves
built() {  # file, command that makes it: another stage may be doing the same
  [ -e "$1" ] || { "${@:2}" -o "$1.$$" && mv "$1.$$" "$1"; }
}
if [ "$gpus" -gt 0 ]; then
  export POCKET_RENDER_GPU=${POCKET_RENDER_GPU:-/tmp/librender_gpu.so}
  built "$POCKET_RENDER_GPU" nvcc -O3 -use_fast_math -arch=sm_90 -shared -Xcompiler -fPIC "$here/../render/render.cu"
else
  built "$here/../render/librender_cpu.so" cc -O3 -march=native -ffast-math -shared -fPIC "$here/../render/render.c" -lm
fi
each() {   # a program on every GPU
  if [ "${PROCESSES:-$gpus}" -gt 1 ]; then $python -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-$gpus}" "$@"; else $python "$@"; fi
}
newest() { for d in "$@"; do if ls "$work/$d"* >/dev/null 2>&1; then echo "--resume $work/$d"; return; fi; done; }
models=$work/models; mkdir -p "$models"
case $stage in
  warm) $python "$here/warm.py" "${OLD:-$here/../pocket.safetensors}" "$data" "$work/warm" "$@" ;;
  ae) each "$here/train_ae.py" "$data" "$models" "$seconds" $(newest models/ae.safetensors warm/ae.safetensors) "$@" ;;
  audio) $python "$here/train_audio.py" "$data" "$models" "$seconds" "${PROBE_SECONDS:-60}" $(newest models/audio.safetensors warm/audio.safetensors) "$@" ;;
  latents) each "$here/train_dit.py" "$data" "$models" "$work/latents" "$seconds" $(newest latents/dit.safetensors warm/dit.safetensors) "$@" ;;
  together) each "$here/train_dit.py" "$data" "$models" "$work/together" "$seconds" $(newest together/dit.safetensors latents/dit.safetensors) --together --pixels 0 --own 0 --seed 3 "$@" ;;
  export) $python "$here/export.py" "$models" "$work/together/dit.safetensors" "$work/pocket.safetensors" --shards --steps 1 "$@" ;;
  *) echo "no stage named $stage" >&2; exit 2 ;;
esac 2>&1 | tee -a "$work/$stage.log"
exit "${PIPESTATUS[0]}"
