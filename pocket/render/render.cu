// GPU renderer:  nvcc -O3 -use_fast_math -arch=sm_90 -shared -Xcompiler -fPIC render.cu -o librender_gpu.so
#define FN __device__ __forceinline__
#include "presenter.h"

__device__ unsigned char byte_of(float v) { return (unsigned char)(v * 255.f + .5f); }

__global__ void pixels(const float* __restrict__ parameters, unsigned char* out, int size) {
  __shared__ float own[PRESENTER_PARAMETERS];
  int frame = blockIdx.y, p = blockIdx.x * blockDim.x + threadIdx.x;
  for (int q = threadIdx.x; q < PRESENTER_PARAMETERS; q += blockDim.x) own[q] = parameters[(size_t)frame * PRESENTER_PARAMETERS + q];
  __syncthreads();
  size_t plane = (size_t)size * size;
  if (p >= (int)plane) return;
  Rgb c = presenter_pixel((p % size + .5f) * 2.f / size - 1.f, (p / size + .5f) * 2.f / size - 1.f, own, 2.f / size);
  unsigned char* o = out + (size_t)frame * 3 * plane + p;
  o[0] = byte_of(c.r); o[plane] = byte_of(c.g); o[2 * plane] = byte_of(c.b);
}

__global__ void mattes(const float* __restrict__ parameters, unsigned char* out, int size) {
  int frame = blockIdx.y, p = blockIdx.x * blockDim.x + threadIdx.x;
  if (p >= size * size) return;
  out[(size_t)frame * size * size + p] = byte_of(presenter_matte((p % size + .5f) * 2.f / size - 1.f, (p / size + .5f) * 2.f / size - 1.f,
                                                                 parameters + (size_t)frame * PRESENTER_PARAMETERS, 2.f / size));
}

// parameters [n][72] -> out [n][size][size], both on the device: the presenter's matte; returns the CUDA error
extern "C" int render_matte(const float* parameters, unsigned char* out, int n, int size, void* stream) {
  dim3 grid((size * size + 255) / 256, n);
  mattes<<<grid, 256, 0, (cudaStream_t)stream>>>(parameters, out, size);
  return (int)cudaGetLastError();
}

// parameters [n][72] -> out [n][3][size][size], both on the device; returns the CUDA error
extern "C" int render(const float* parameters, unsigned char* out, int n, int size, void* stream) {
  dim3 grid((size * size + 255) / 256, n);
  pixels<<<grid, 256, 0, (cudaStream_t)stream>>>(parameters, out, size);
  return (int)cudaGetLastError();
}
