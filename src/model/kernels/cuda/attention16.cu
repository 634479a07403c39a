// Attention in bf16 for Hopper (`attention.cuh`).
//
// Values stay rows: products in bf16 can be told that an operand lies transposed. Tiles of 80 keys are the largest whose
// scores, softmax values and results fit into the registers of three groups. Sums of softmax values are taken before they
// are rounded to bf16, in f32.
#include "attention.cuh"

namespace lq::attention16 {

// Two floats to two bf16, the first lower.
__device__ __forceinline__ uint32_t pack(float a, float b) {
    uint32_t r = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
#endif
    return r;
}

struct Form {
    using Element = __nv_bfloat16;
    using Values = CUtensorMap; // rows, as keys
    static constexpr auto TYPE = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    static constexpr int TILE = 80, STAGES = 4;
    static constexpr float STRETCH = 0.f, LAZY = 8.f;

    __device__ static __forceinline__ void copy_values(void *to, const Values &values, int head, int first, int,
                                                       uint64_t *full) {
        barrier_expect(full, TILE * HEAD * 2);
        copy_rows<Form>(to, &values, head, first, TILE, full);
    }
    __device__ static __forceinline__ uint32_t values_at(const void *v) { return halves_at<TILE * 128>(v); }
    template <int ADD> __device__ static __forceinline__ void score(float (&s)[TILE / 2], uint32_t q, uint32_t k) {
        product16<ADD>(s, q, k);
    }
    __device__ static __forceinline__ void convert(const float (&s)[TILE / 2], uint32_t (&p)[TILE / 4]) {
#pragma unroll
        for (int j = 0; j < TILE / 4; j++) p[j] = pack(s[2 * j], s[2 * j + 1]);
    }
    __device__ static __forceinline__ void weigh(float (&o)[64], const uint32_t (&p)[TILE / 4], uint32_t v) {
#pragma unroll
        for (int j = 0; j < TILE / 16; j++) product16(o, p + 4 * j, v + j * (16 * 128 / 16));
    }
    __device__ static __forceinline__ void store(const float *o, const float (&sum)[2], const Values &, __nv_bfloat16 *out,
                                                 int row, int queries, int dim, int column) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const float inverse = 1.f / sum[r];
            const int at = row + lane / 4 + 8 * r;
            const bool odd = lane & 1;
            __nv_bfloat16 *to = out + (size_t)at * dim + column + (odd ? 8 : 0) + (lane & 2) * 2;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                // Neighbours exchange halves so that each writes eight bytes: even threads of a pair the first block of eight
                // columns, odd threads the second.
                const float *e = o + 8 * j + 2 * r;
                const uint32_t a = pack(e[0] * inverse, e[1] * inverse), b = pack(e[4] * inverse, e[5] * inverse);
                const uint32_t other = __shfl_xor_sync(~0u, odd ? a : b, 1);
                if (at < queries) *reinterpret_cast<uint2 *>(to + 16 * j) = odd ? make_uint2(other, b) : make_uint2(a, other);
            }
        }
    }
};

} // namespace lq::attention16

using namespace lq;
using namespace lq::attention16;

extern "C" {

// Queries, keys and values `[rows, heads · 128]` in bf16, rows a multiple of eight elements apart; for the others see
// `launch`.
int lq_attention16(const void *q, int q_stride, const void *k, int k_stride, const void *v, int v_stride, void *out,
                   int queries, int room, int heads, const uint32_t *keys, float *parts, uint64_t bytes, void *stream) {
    CUtensorMap values;
    if (room < 1 || heads < 1) return cudaErrorInvalidValue;
    if (int e = tiles_of(&values, Form::TYPE, v, heads * HEAD, room, 2ull * v_stride, Form::TILE)) return e;
    return launch<Form>(q, 2ull * q_stride, k, 2ull * k_stride, values, out, queries, room, heads, keys, parts, bytes, stream);
}
}
