// The video autoencoder's last convolution, of 3×3×3 to at most three channels, on matrix units: in a quarter of cuDNN's
// time.
#include "common.cuh"

#include <limits.h>

using namespace lq;
typedef __nv_bfloat16 bf16;

namespace {

// Written are eight channels, the last five of them zero. Every pixel of a frame is multiplied once with the taps of all
// three frames that it counts for: its products are columns [tap in time, channel] of one matrix, and sums go from tap to
// tap while frames pass, so that where a video is cut makes no difference. A block takes HIGH×WIDE pixels through all
// frames; PART channels are brought while those before them are multiplied.
constexpr int HIGH = 8, WIDE = 32, PART = 32, PITCH = PART + 8, LINE = WIDE + 2, HALO = (HIGH + 2) * LINE;

struct Narrow {
    const bf16 *x;       // [2 + frames, height, width, channels]
    const bf16 *weight;  // [8, 3, 3, 3, channels]
    bf16 *out;           // [frames, height, width, 8]
    int frames, height, width, channels;
};

__device__ __forceinline__ unsigned shared(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__global__ void __launch_bounds__(32 * HIGH, 2) narrow(Narrow p) {
    extern __shared__ uint4 room[];
    const int slices = p.channels / 16, parts = p.channels / PART, count = (p.frames + 2) * parts;
    uint4 *weight = room;                              // [9, slices, 32]: what a lane multiplies with
    bf16 *tile = (bf16 *)(room + 9 * slices * 32);     // [2, HALO, PITCH]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
    const int top = blockIdx.y * HIGH, left = blockIdx.x * WIDE;
    // Columns 0 … 2 are the first tap in time, 4 … 6 the second, 8 … 10 the third.
    for (int i = threadIdx.x; i < 9 * slices * 32; i += blockDim.x) {
        const int l = i % 32, slice = i / 32 % slices, tap = i / 32 / slices, k = slice * 16 + l % 4 * 2;
        const int column = l / 4, channel = column % 4;
        auto pair = [&](int time, int at) {
            return channel == 3 || time > 2
                ? 0u : *(const unsigned *)(p.weight + ((channel * 3 + time) * 9 + tap) * (size_t)p.channels + at);
        };
        weight[i] = {pair(column / 4, k), pair(column / 4, k + 8), pair(column / 4 + 2, k), pair(column / 4 + 2, k + 8)};
    }
    // What this thread brings: its vectors of the tile, the same in every frame; −1 outside the picture.
    constexpr int MINE = (HALO * PART / 8 + 32 * HIGH - 1) / (32 * HIGH);
    int from[MINE];
#pragma unroll
    for (int i = 0; i < MINE; i++) {
        const int n = threadIdx.x + i * 32 * HIGH, pixel = n / (PART / 8);
        const int row = top + pixel / LINE - 1, column = left + pixel % LINE - 1;
        const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
        from[i] = inside ? (row * p.width + column) * p.channels + n % (PART / 8) * 8 : -1;
    }
    auto bring = [&](int n) {
        const bf16 *x = p.x + (size_t)(n / parts) * p.height * p.width * p.channels + n % parts * PART;
        const unsigned to = shared(tile + n % 2 * HALO * PITCH);
#pragma unroll
        for (int i = 0; i < MINE; i++) {
            const int v = threadIdx.x + i * 32 * HIGH;
            if (v < HALO * PART / 8)
                asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                             :: "r"(to + (v / (PART / 8) * PITCH + v % (PART / 8) * 8) * 2), "l"(x + max(from[i], 0)),
                                "r"(from[i] < 0 ? 0 : 16));
        }
        asm volatile("cp.async.commit_group;");
    };
    bring(0);
    // Of 16 pixels each: a warp has a row of 32.
    float near[2][4] = {}, far[2][4] = {};
    const unsigned mine = ((warp * LINE + lane % 16) * PITCH + lane / 16 * 8) * 2;
    for (int n = 0; n < count; n++) {
        asm volatile("cp.async.wait_group 0;");
        __syncthreads();
        if (n + 1 < count) bring(n + 1);
        const unsigned at = shared(tile + n % 2 * HALO * PITCH) + mine;
        const uint4 *w = weight + n % parts * (PART / 16) * 32 + lane;
#pragma unroll
        for (int tap = 0; tap < 9; tap++)
#pragma unroll
            for (int slice = 0; slice < PART / 16; slice++) {
                const uint4 b = w[(tap * slices + slice) * 32];
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    unsigned a[4];
                    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
                                 : "r"(at + ((tap / 3 * LINE + tap % 3 + half * 16) * PITCH + slice * 16) * 2));
                    multiply(near[half], a, b.x, b.y);
                    multiply(far[half], a, b.z, b.w);
                }
            }
        if (n % parts + 1 < parts) continue;
        // A frame has passed: the third tap's sums are done, others go on to the next tap.
        const int frame = n / parts - 2;
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const float third = __shfl_down_sync(~0u, far[half][2 * r], 1);
                const int row = top + warp, column = left + half * 16 + g + 8 * r;
                if (q == 0 && frame >= 0 && row < p.height && column < p.width) {
                    const float v[8] = {far[half][2 * r], far[half][2 * r + 1], third};
                    store8(p.out + (((size_t)frame * p.height + row) * p.width + column) * 8, v);
                }
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float other = __shfl_xor_sync(~0u, near[half][i], 2);
                near[half][i] = q < 2 ? 0.f : other;
                far[half][i] = q < 2 ? other : 0.f;
            }
        }
    }
}

} // namespace

extern "C" {

// See `narrow`. 1 when channels do not fit (a multiple of 32, at most 128, which is what 99 KB of shared memory hold), or the
// picture is too large.
int lq_vae_narrow(const void *x, const void *weight, void *out, int frames, int height, int width, int channels, void *stream) {
    if (channels % PART || channels > 128 || (size_t)height * width * channels > INT_MAX) return 1;
    const int room = 9 * (channels / 16) * 32 * sizeof(uint4) + 2 * HALO * PITCH * sizeof(bf16);
    const auto set = cudaFuncSetAttribute(narrow, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
    if (set != cudaSuccess) return (int)set;
    const dim3 grid((width + WIDE - 1) / WIDE, (height + HIGH - 1) / HIGH);
    narrow<<<grid, 32 * HIGH, room, (cudaStream_t)stream>>>(
        {(const bf16 *)x, (const bf16 *)weight, (bf16 *)out, frames, height, width, channels});
    LQ_LAUNCHED();
}
}
