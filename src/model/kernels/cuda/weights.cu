// Softmax weights of queries over keys that are known long before them, for a product with what the output projection
// makes of their values: no values are read here. Two passes, because a weight needs the norm of the whole row: the
// first reads rows, the second one head of 64 rows a block, by matrix units.
#include "common.cuh"

#include <type_traits>

using namespace lq;

namespace {

constexpr int HEAD = 128;           // channels of a head
constexpr int CHUNKS = HEAD / 32;   // a lane reads 16 bytes of each 32 channels
constexpr int WARPS = 4;            // a block
constexpr int ROWS = 16;            // a warp
constexpr int MOST_PAIRS = 7;       // pairs of tiles of eight keys

// 1 / root mean square of each row, a warp a row.
__global__ void inverse_rms(const __nv_bfloat16 *q, float *inverse, int rows, int width, float eps) {
    const int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (row >= rows) return;
    const __nv_bfloat16 *in = q + (size_t)row * width;
    float sum = 0.f;
#pragma unroll 5
    for (int i = lane * 8; i < width; i += 256) {
        float v[8];
        load8(in + i, v);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += v[j] * v[j];
    }
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (lane == 0) inverse[row] = rsqrtf(sum / width + eps);
}

// d += a · b: 16 rows, 8 columns, 16 channels.
__device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void store4(__nv_bfloat16 *p, const float v[4]) {
    uint2 raw;
    __nv_bfloat162 *h = reinterpret_cast<__nv_bfloat162 *>(&raw);
    h[0] = __floats2bfloat162_rn(v[0], v[1]), h[1] = __floats2bfloat162_rn(v[2], v[3]);
    *reinterpret_cast<uint2 *>(p) = raw;
}

// The largest weight is the largest number that e4m3 has.
__device__ __forceinline__ void store4(__nv_fp8_e4m3 *p, const float v[4]) {
    const float2 a = {v[0] * LARGEST, v[1] * LARGEST}, b = {v[2] * LARGEST, v[3] * LARGEST};
    const uint32_t low = __nv_cvt_float2_to_fp8x2(a, __NV_SATFINITE, __NV_E4M3);
    const uint32_t high = __nv_cvt_float2_to_fp8x2(b, __NV_SATFINITE, __NV_E4M3);
    *reinterpret_cast<uint32_t *>(p) = low | high << 16;
}

// One head of 64 rows. A dot product does not care in which order its channels come, so a lane takes eight neighbours of
// queries and keys instead of the pairs that matrix units ask for, and keys lie in the order in which lanes read them
// (`weights.rs`, `fragments`): key 16 p + 4 c + 2 t + i of a head is column 2 c + i of tile 2 p + t, so that a lane holds
// four neighbouring weights. Rows of group g see keys g · count to (g + 1) · count; to the score of the last one `last` is
// added.
template <int PAIRS, class Out>
__global__ void __launch_bounds__(WARPS * 32)
    weights(const __nv_bfloat16 *q, const float *inverse, const uint4 *keys, Out *out, float *units, int rows,
            int rows_in_group, int count, float last, int columns, float scale) {
    constexpr int TILES = 2 * PAIRS;
    const int head = blockIdx.x, heads = gridDim.x;
    const int lane = threadIdx.x & 31, group = lane >> 2, c = lane & 3;
    const int first = (blockIdx.y * WARPS + (threadIdx.x >> 5)) * ROWS;
    if (first >= rows) return;
    const int mine[2] = {first + group, first + group + 8};
    const int read[2] = {min(mine[0], rows - 1), min(mine[1], rows - 1)};
    uint4 a[2][CHUNKS];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const __nv_bfloat16 *in = q + ((size_t)read[r] * heads + head) * HEAD + c * 8;
#pragma unroll
        for (int k = 0; k < CHUNKS; k++) a[r][k] = *reinterpret_cast<const uint4 *>(in + k * 32);
    }
    float s[TILES][4] = {};
    const uint4 *b = keys + (size_t)head * TILES * CHUNKS * 32 + lane;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++)
#pragma unroll
        for (int t = 0; t < TILES; t++) {
            const uint4 key = __ldg(b + (t * CHUNKS + k) * 32);
            multiply(s[t], a[0][k].x, a[1][k].x, a[0][k].y, a[1][k].y, key.x, key.y);
            multiply(s[t], a[0][k].z, a[1][k].z, a[0][k].w, a[1][k].w, key.z, key.w);
        }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float factor = inverse[read[r]] * scale;
        // The lane's first key, counted from the group's first.
        const int key = c * 4 - read[r] / rows_in_group * count;
        float most = -INFINITY, sum = 0.f;
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int at = key + (t / 2) * 16 + (t & 1) * 2 + i;
                float &x = s[t][2 * r + i];
                x = at < 0 || at >= count ? -INFINITY : x * factor + (at == count - 1 ? last : 0.f);
                most = fmaxf(most, x);
            }
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
        most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
#pragma unroll
        for (int t = 0; t < TILES; t++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float &x = s[t][2 * r + i];
                x = __expf(x - most);
                sum += x;
            }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const float share = __fdividef(1.f, sum);
        if (mine[r] >= rows) continue;
        Out *to = out + ((size_t)mine[r] * heads + head) * columns + c * 4;
#pragma unroll
        for (int p = 0; p < PAIRS; p++) {
            if (p * 16 >= columns) break;
            const float v[4] = {s[2 * p][2 * r] * share, s[2 * p][2 * r + 1] * share, s[2 * p + 1][2 * r] * share,
                                s[2 * p + 1][2 * r + 1] * share};
            store4(to + p * 16, v);
        }
        if (sizeof(Out) == 1 && head == 0 && c == 0) units[mine[r]] = 1.f / LARGEST;
    }
}

// Row (h, j) of the result is value j in the channels of head h, zero elsewhere. Eight channels a thread.
__global__ void heads_apart(const __nv_bfloat16 *values, __nv_bfloat16 *out, int count, int head, int width) {
    const int row = blockIdx.x;
    for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
        uint4 v = {0, 0, 0, 0};
        if (i / head == row / count) v = *reinterpret_cast<const uint4 *>(values + (size_t)(row % count) * width + i);
        *reinterpret_cast<uint4 *>(out + (size_t)row * width + i) = v;
    }
}

template <int PAIRS = 1, class Go> int with_pairs(int pairs, Go go) {
    if constexpr (PAIRS > MOST_PAIRS) {
        return cudaErrorInvalidValue;
    } else {
        if (pairs != PAIRS) return with_pairs<PAIRS + 1>(pairs, go);
        go(std::integral_constant<int, PAIRS>{});
        LQ_LAUNCHED();
    }
}

} // namespace

extern "C" {

// q [rows, heads · 128], keys as `fragments` lays them, 16 · pairs of them, `count` for each of `groups` equal parts of the
// rows; out [rows, heads · columns] bf16 or e4m3 with units [rows]; inverse [rows]: room.
int lq_weights(int out_kind, const void *q, const void *keys, float *inverse, void *out, float *units, int rows, int heads,
               int groups, int count, float last, int pairs, int columns, float eps, void *stream) {
    if (rows < 1 || heads < 1 || columns < 16 || columns % 16 || columns > 16 * pairs || groups < 1 || rows % groups ||
        count < 1 || groups * count > 16 * pairs)
        return cudaErrorInvalidValue;
    const auto s = (cudaStream_t)stream;
    inverse_rms<<<(rows + 7) / 8, 256, 0, s>>>((const __nv_bfloat16 *)q, inverse, rows, heads * HEAD, eps);
    const dim3 grid(heads, (rows + WARPS * ROWS - 1) / (WARPS * ROWS));
    return with_pairs(pairs, [&](auto n) {
        auto go = [&](auto type) {
            using Out = decltype(type);
            weights<n(), Out><<<grid, WARPS * 32, 0, s>>>((const __nv_bfloat16 *)q, inverse, (const uint4 *)keys,
                                                          (Out *)out, units, rows, rows / groups, count, last, columns,
                                                          1.f / sqrtf((float)HEAD));
        };
        if (out_kind == BF16) go(__nv_bfloat16{});
        else go(__nv_fp8_e4m3{});
    });
}

// values [count, width] -> out [heads · count, width].
int lq_heads_apart(const void *values, void *out, int heads, int count, int width, void *stream) {
    if (heads < 1 || count < 1 || width % heads || width / heads % 8) return cudaErrorInvalidValue;
    heads_apart<<<heads * count, 128, 0, (cudaStream_t)stream>>>((const __nv_bfloat16 *)values, (__nv_bfloat16 *)out,
                                                                 count, width / heads, width);
    LQ_LAUNCHED();
}
}
