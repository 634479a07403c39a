// Attention in e4m3 for Hopper (`attention.cuh`).
//
// Two things make it faster than a library that takes rows of values: values are stored when they are written
// (`lq_store_transposed`) as the tensor cores want them, keys inside, so no tile is transposed here; and the keys of each 16
// are stored in the order in which the accumulators of q·kᵀ lie in registers, so softmax values become the next product's
// operand without any exchange.
//
// A step of e4m3 products cuts its 32 addends off some 13 bits below the sum, so where values have a mean, sums over many
// keys come out small. Weights sum to one: what is about that mean is taken from the values when they are stored, and added
// to the results. And where keys are many, results are alike in all rows: they would all be rounded the same way, and what
// is wrong in all tokens does not average out later. So each row has a unit of its own, spread over an octave.
//
// Softmax values are rounded to e4m3; their sum is taken before rounding, in f32. (Sums by eight columns of ones in the
// second product are faster, and small for the same reason. Exponentials by a polynomial beside the special function unit's
// are slower.)
#include "attention.cuh"

namespace lq::attention90 {

// Four floats to four e4m3 bytes, the first lowest: two instructions, which the compiler does not find by itself.
__device__ __forceinline__ uint32_t pack(float a, float b, float c, float d) {
    uint32_t r = 0;
#if __CUDA_ARCH__ >= 890
    asm("{\n.reg .b16 lo, hi;\ncvt.rn.satfinite.e4m3x2.f32 lo, %2, %1;\ncvt.rn.satfinite.e4m3x2.f32 hi, %4, %3;\n"
        "mov.b32 %0, {lo, hi};\n}"
        : "=r"(r)
        : "f"(a), "f"(b), "f"(c), "f"(d));
#endif
    return r;
}

struct Form {
    using Element = uint8_t;
    struct Values {
        const uint8_t *at; // as `lq_store_transposed` leaves them
        const float *mean; // of each channel, taken from them, in their unit; or none
        const float *rows; // what each row of the result is multiplied by; or none
    };
    static constexpr auto TYPE = CU_TENSOR_MAP_DATA_TYPE_UINT8;
    static constexpr int TILE = 96, STAGES = 8;
    static constexpr float STRETCH = 7.f, LAZY = 1.75f; // up to 2^8.75 < 448

    __device__ static __forceinline__ void copy_values(void *to, const Values &values, int head, int first, int room,
                                                       uint64_t *full) {
        const int bytes = min(TILE, room - first) * HEAD;
        barrier_expect(full, bytes);
        copy_run(to, values.at + ((size_t)head * room + first) * HEAD, bytes, full);
    }
    __device__ static __forceinline__ uint32_t values_at(const void *v) { return blocks_at(v); }
    template <int ADD> __device__ static __forceinline__ void score(float (&s)[TILE / 2], uint32_t q, uint32_t k) {
        product<ADD>(s, q, k);
    }
    __device__ static __forceinline__ void convert(const float (&s)[TILE / 2], uint32_t (&p)[TILE / 8]) {
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
            const float *e = s + j / 2 * 8 + j % 2 * 2; // a row's four of sixteen neighbouring keys
            p[j] = pack(e[0], e[1], e[4], e[5]);
        }
    }
    __device__ static __forceinline__ void weigh(float (&o)[64], const uint32_t (&p)[TILE / 8], uint32_t v) {
#pragma unroll
        for (int j = 0; j < TILE / 32; j++) product(o, p + 4 * j, v + j * (32 * HEAD / 16));
    }
    __device__ static __forceinline__ void store(const float *o, const float (&sum)[2], const Values &values, uint8_t *out,
                                                 int row, int queries, int dim, int column) {
        const int lane = threadIdx.x & 31;
        const float *mean = values.mean ? values.mean + column + 2 * (lane & 3) : nullptr;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int at = row + lane / 4 + 8 * r;
            const float factor = values.rows && at < queries ? values.rows[at] : 1.f, inverse = factor / sum[r];
            const bool odd = lane & 1;
            uint8_t *to = out + (size_t)at * dim + column + (odd ? 8 : 0) + (lane & 2) * 2;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                // Neighbours exchange halves so that each writes four bytes: even threads of a pair the first block of eight
                // columns, odd threads the second.
                const float *e = o + 8 * j + 2 * r;
                float2 a = {0.f, 0.f}, b = {0.f, 0.f};
                if (mean) {
                    a = *reinterpret_cast<const float2 *>(mean + 16 * j);
                    b = *reinterpret_cast<const float2 *>(mean + 16 * j + 8);
                }
                uint32_t w = pack(__fmaf_rn(e[0], inverse, a.x * factor), __fmaf_rn(e[1], inverse, a.y * factor),
                                  __fmaf_rn(e[4], inverse, b.x * factor), __fmaf_rn(e[5], inverse, b.y * factor));
                const uint32_t other = __shfl_xor_sync(~0u, w, 1);
                w = odd ? (other >> 16) | (w & 0xffff0000u) : (w & 0xffffu) | (other << 16);
                if (at < queries) *reinterpret_cast<uint32_t *>(to + 16 * j) = w;
            }
        }
    }
};

// Eight neighbours in e4m3; those that are so already are in the right unit, and nothing is taken from them.
__device__ __forceinline__ uint2 stored8(const __nv_bfloat16 *p, float factor, const float (&mean)[8]) {
    float v[8];
    load8(p, v);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = __fmaf_rn(v[i], factor, -mean[i]);
    uint2 e;
    store8(reinterpret_cast<__nv_fp8_e4m3 *>(&e), v);
    return e;
}
__device__ __forceinline__ uint2 stored8(const __nv_fp8_e4m3 *p, float, const float (&)[8]) {
    return *reinterpret_cast<const uint2 *>(p);
}

// Values `[rows, width]` (rows `stride` apart), less `mean` (by channel, in units; or none), as e4m3 from key row + *offset
// on, in the order in which they are copied and multiplied: by head, 16 keys, 8 channels; then a channel's 16 keys, key
// 8h + 2c + b of them at 4c + 2h + b. A block: 128 keys of the result, 64 channels.
template <class In>
__global__ void __launch_bounds__(256) store_transposed(const In *v, int stride, uint8_t *out, int room, const int *offset,
                                                        int row, const float *unit, const float *mean, int rows) {
    __shared__ uint32_t tile[64][33]; // [channel][four keys]
    const int slot = row + (offset ? *offset : 0), first = (slot & ~127) + blockIdx.x * 128, channel = blockIdx.y * 64;
    if (first >= slot + rows) return;
    const float factor = 1.f / *unit;
    const int t = threadIdx.x, c8 = t & 7, word = t >> 3; // word: which four keys
    const int key = first + (word / 4) * 16 + (word & 3) * 2;
    uint2 e[4];
    float less[8] = {};
    if (mean)
#pragma unroll
        for (int i = 0; i < 8; i++) less[i] = mean[channel + c8 * 8 + i];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = key + (i >> 1) * 8 + (i & 1) - slot;
        e[i] = row >= 0 && row < rows ? stored8(v + (size_t)row * stride + channel + c8 * 8, factor, less)
                                     : make_uint2(0, 0);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
        auto byte = [&](int i) { return (j < 4 ? e[i].x : e[i].y) >> 8 * (j % 4) & 255; };
        tile[c8 * 8 + j][word] = byte(0) | byte(1) << 8 | byte(2) << 16 | byte(3) << 24;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int ch = t & 63, g = (t >> 6) + 4 * i, at = first + g * 16;
        const uint32_t *w = &tile[ch][g * 4];
        const int head = (channel + ch) / HEAD, c = (channel + ch) % HEAD;
        uint8_t *to = out + ((size_t)head * room + at) * HEAD + c * 16;
        if (at >= slot && at + 16 <= slot + rows) {
            *reinterpret_cast<uint4 *>(to) = make_uint4(w[0], w[1], w[2], w[3]);
        } else {
            for (int k = 0; k < 16; k++) { // k: place in the group
                const int of = at + (k >> 1 & 1) * 8 + (k >> 2) * 2 + (k & 1);
                if (of >= slot && of < slot + rows) to[k] = w[k / 4] >> 8 * (k & 3);
            }
        }
    }
}

} // namespace lq::attention90

using namespace lq;
using namespace lq::attention90;

extern "C" {

// Queries and keys `[rows, heads · 128]`, values for `room` keys from lq_store_transposed with the same `mean`, all e4m3;
// rows of the result are multiplied by `factors`, if any; for the others see `launch`.
int lq_attention90(const void *q, const void *k, const void *v, const float *mean, const float *factors, void *out,
                   int queries, int room, int heads, const uint32_t *keys, float *parts, uint64_t bytes, void *stream) {
    if (room % 16) return cudaErrorInvalidValue;
    const uint64_t pitch = heads * HEAD;
    const Form::Values values{(const uint8_t *)v, mean, factors};
    return launch<Form>(q, pitch, k, pitch, values, out, queries, room, heads, keys, parts, bytes, stream);
}

// `kind`: BF16, or E4M3 where values are in their unit already and have no `mean`.
int lq_store_transposed(int kind, const void *v, int stride, void *out, int room, const int *offset, int row,
                        const float *unit, const float *mean, int rows, int width, void *stream) {
    if ((mean && kind != BF16) || rows < 1 || room % 16 || width % HEAD || stride % 8) return cudaErrorInvalidValue;
    const auto go = [&](auto *v) {
        const dim3 grid((rows + 127) / 128 + 1, width / 64);
        store_transposed<<<grid, 256, 0, (cudaStream_t)stream>>>(v, stride, (uint8_t *)out, room, offset, row, unit, mean,
                                                                 rows);
    };
    if (kind == BF16) go((const __nv_bfloat16 *)v);
    else go((const __nv_fp8_e4m3 *)v);
    LQ_LAUNCHED();
}
}
