// What every kernel here needs: eight elements at a time, sums over a block, e4m3, errors.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <stdint.h>

namespace lq {

// Element types as Rust names them (cuda/mod.rs, `Kind`).
enum Kind : int { F32 = 0, BF16 = 1, E4M3 = 2 };

constexpr float LARGEST = 448.f; // of e4m3

// Eight neighbours as floats, one or two 16-byte accesses.
__device__ __forceinline__ void load8(const float *p, float v[8]) {
    float4 a = reinterpret_cast<const float4 *>(p)[0], b = reinterpret_cast<const float4 *>(p)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

__device__ __forceinline__ void load8(const __nv_bfloat16 *p, float v[8]) {
    uint4 raw = *reinterpret_cast<const uint4 *>(p);
    const __nv_bfloat162 *h = reinterpret_cast<const __nv_bfloat162 *>(&raw);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 f = __bfloat1622float2(h[j]);
        v[2 * j] = f.x, v[2 * j + 1] = f.y;
    }
}

__device__ __forceinline__ void load8(const __nv_fp8_e4m3 *p, float v[8]) {
    uint2 raw = *reinterpret_cast<const uint2 *>(p);
    const __nv_fp8x2_storage_t *h = reinterpret_cast<const __nv_fp8x2_storage_t *>(&raw);
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float2 f = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(h[j], __NV_E4M3)));
        v[2 * j] = f.x, v[2 * j + 1] = f.y;
    }
}

__device__ __forceinline__ void store8(float *p, const float v[8]) {
    reinterpret_cast<float4 *>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4 *>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

__device__ __forceinline__ void store8(__nv_bfloat16 *p, const float v[8]) {
    uint4 raw;
    __nv_bfloat162 *h = reinterpret_cast<__nv_bfloat162 *>(&raw);
#pragma unroll
    for (int j = 0; j < 4; j++) h[j] = __floats2bfloat162_rn(v[2 * j], v[2 * j + 1]);
    *reinterpret_cast<uint4 *>(p) = raw;
}

// e4m3, saturating.
__device__ __forceinline__ void store8(__nv_fp8_e4m3 *p, const float v[8]) {
    uint2 raw;
    __nv_fp8x2_storage_t *h = reinterpret_cast<__nv_fp8x2_storage_t *>(&raw);
#pragma unroll
    for (int j = 0; j < 4; j++)
        h[j] = __nv_cvt_float2_to_fp8x2(make_float2(v[2 * j], v[2 * j + 1]), __NV_SATFINITE, __NV_E4M3);
    *reinterpret_cast<uint2 *>(p) = raw;
}

struct Sum {
    static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
struct Largest {
    static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// N values over all threads of a block, the results in every thread, one barrier. `room` is 32·N floats of shared memory
// that nothing else uses. Threads of the block: a multiple of 32. Largest is for values that are not negative.
template <class Op, int N> __device__ __forceinline__ void over_block(float (&v)[N], float *room) {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) v[n] = Op::of(v[n], __shfl_xor_sync(~0u, v[n], o));
        if (lane == 0) room[n * 32 + warp] = v[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; n++) {
        v[n] = lane < (blockDim.x >> 5) ? room[n * 32 + lane] : 0.f;
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) v[n] = Op::of(v[n], __shfl_xor_sync(~0u, v[n], o));
    }
}

// Rows are cut into runs; run i ends before row end[i].
constexpr int MOST_RUNS = 32;
struct Runs {
    int count;
    int end[MOST_RUNS];
    __device__ __forceinline__ int of(int row) const {
        int i = 0;
        while (i + 1 < count && row >= end[i]) i++;
        return i;
    }
};

// A row is held in registers: up to this many vectors of eight a thread. Kernels are compiled for each number, so that
// short rows do not pay for the registers of long ones.
constexpr int MOST_HELD = 4;

// Vectors a thread holds for rows of `width` elements; 0 where a row does not fit.
inline int held_for(int width) {
    if (width <= 0 || width % 8) return 0;
    const int vectors = width / 8;
    if (vectors <= 256) return 1;
    if (vectors <= 768) return 2;
    if (vectors <= 1152) return 3;
    return vectors <= MOST_HELD * 1024 ? MOST_HELD : 0;
}

inline int threads_for(int width) {
    const int held = held_for(width);
    return held ? ((width / 8 + held - 1) / held + 31) / 32 * 32 : 0;
}

} // namespace lq

// What a launcher returns: 0, or CUDA's error number.
#define LQ_LAUNCHED() return static_cast<int>(cudaGetLastError())
