// Attention in bf16 for Hopper, heads of 128 channels, no causal mask.
//
// A block of threads is a producer (one thread that orders copies) and three groups of 128 threads with 64 queries each, so
// that a scheduler has three warps whose softmax, products and waits lie beside each other. A group hands in the next
// tile's q·kᵀ and the last tile's product with the values, and computes the softmax of the one while the other runs. Tiles
// of 80 keys are the largest whose scores, softmax values and results fit into the registers of three groups.
//
// Softmax values are 1 at a score that is raised only when they would pass 2^8; their sum is taken before they are rounded
// to bf16, in f32.
//
// Other architectures get empty kernels, which nobody launches.
#include "attention.cuh"

namespace lq::attention16 {

constexpr int HALF = 64;    // channels of a row of 128 bytes, the width of the swizzle: a head is two
constexpr int GROUPS = 3;   // groups of a block
constexpr int TILE = 80;    // keys of a tile
constexpr int STAGES = 4;   // tiles of keys, and of values, on their way
constexpr int S = TILE / 2; // registers of scores
constexpr int TILE_BYTES = TILE * HEAD * 2;
constexpr int THREADS = 128 * (GROUPS + 1);
constexpr float LAZY = 8.f; // octaves by which scores grow before everything is rescaled

// Where the n-th tile lies, and which of a barrier's two phases is its.
__device__ __forceinline__ int stage(uint32_t n) { return n % STAGES; }
__device__ __forceinline__ uint32_t phase(uint32_t n) { return n / STAGES & 1; }

// Two floats to two bf16, the first lower.
__device__ __forceinline__ uint32_t pack(float a, float b) {
    uint32_t r = 0;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(r) : "f"(a), "f"(b));
#endif
    return r;
}

struct Shared {
    uint8_t q[2][GROUPS * ROWS * 128]; // the first 64 channels, the others
    uint8_t k[STAGES][TILE_BYTES];     // each: all rows' first 64 channels, then the others
    uint8_t v[STAGES][TILE_BYTES];
    uint64_t q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    int valid;
    Plan<GROUPS, TILE> plan;
};

// Rows of a group's result.
__device__ __forceinline__ void store_rows(const float *o, const float (&sum)[2], __nv_bfloat16 *out, int row, int queries,
                                           int dim, int column) {
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

// *keys count, or all of them where none is given.
__device__ __forceinline__ int counted(const uint32_t *keys, int room) { return keys ? valid_of(keys, room) : room; }

__global__ void __launch_bounds__(THREADS, 1)
    attend16(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
             const __grid_constant__ CUtensorMap v_map, __nv_bfloat16 *out, int queries, int room, int heads,
             const uint32_t *keys, float scale, float *parts) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL // other cards never get here
    extern __shared__ __align__(1024) uint8_t raw[]; // the period of the swizzle
    Shared &sh = *reinterpret_cast<Shared *>(raw);
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1; // the same in a warp, as the compiler may see
    if (threadIdx.x == 0) {
        if (shared_address(raw) % 1024) __trap();
        // In shared memory, because the loop below leaves no registers.
        sh.valid = counted(keys, room);
        sh.plan.make(heads, queries, sh.valid, gridDim.x);
        barrier_init(&sh.q_full, 1), barrier_init(&sh.q_empty, GROUPS * 4);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&sh.k_full[i], 1), barrier_init(&sh.k_empty[i], GROUPS * 4);
            barrier_init(&sh.v_full[i], 1), barrier_init(&sh.v_empty[i], GROUPS * 4);
        }
    }
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();
    const auto &plan = sh.plan;

    if (group < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x != 0) return;
        uint32_t k = 0, v = 0; // tiles ordered so far
        auto copy = [&](uint8_t *to, const CUtensorMap *map, int column, int row, uint64_t *full) {
            barrier_expect(full, TILE_BYTES);
            for (int h = 0; h < 2; h++) copy_tile(to + h * (TILE_BYTES / 2), map, column + h * HALF, row, full);
        };
        Piece p;
        for (int n = 0; piece(plan, n, p); n++) {
            const int head = p.unit / plan.tiles_q, tile = p.unit % plan.tiles_q;
            barrier_wait(&sh.q_empty, (n & 1) ^ 1);
            barrier_expect(&sh.q_full, sizeof(sh.q));
            for (int h = 0; h < 2; h++)
                copy_tile(sh.q[h], &q_map, head * HEAD + h * HALF, tile * GROUPS * ROWS, &sh.q_full);
            // Keys are one tile ahead of values, as they are waited for.
#pragma unroll 1
            for (int i = p.last - 1; i >= p.first - 1; i--) {
                if (i >= p.first) {
                    barrier_wait(&sh.k_empty[stage(k)], phase(k) ^ 1);
                    copy(sh.k[stage(k)], &k_map, head * HEAD, i * TILE, &sh.k_full[stage(k)]);
                    k++;
                }
                if (i + 1 < p.last) {
                    barrier_wait(&sh.v_empty[stage(v)], phase(v) ^ 1);
                    copy(sh.v[stage(v)], &v_map, head * HEAD, (i + 1) * TILE, &sh.v_full[stage(v)]);
                    v++;
                }
            }
        }
        return;
    }

    asm volatile("setmaxnreg.inc.sync.aligned.u32 160;");
    const int lane = threadIdx.x & 31;
    auto free_place = [&](uint64_t *b) {
        if (lane == 0) barrier_arrive(b);
    };
    const uint32_t q_operand = rows_at(sh.q[0] + group * ROWS * 128), k_operand = rows_at(sh.k);
    const uint32_t v_operand = halves_at<TILE_BYTES / 2>(sh.v);
    float o[64], s[S];
    uint32_t p16[TILE / 4];
    Softmax x;
    auto scores = [&](uint32_t tile) {
        const uint32_t k = k_operand + stage(tile) * (TILE_BYTES / 16);
#pragma unroll
        for (int j = 0; j < 8; j++) { // 16 channels each
            const uint32_t a = q_operand + j / 4 * (sizeof(sh.q[0]) / 16) + j % 4 * 2;
            const uint32_t b = k + j / 4 * (TILE_BYTES / 2 / 16) + j % 4 * 2;
            if (j == 0) product16<0>(s, a, b);
            else product16<1>(s, a, b);
        }
    };
    auto weighted = [&](uint32_t tile) {
        const uint32_t v = v_operand + stage(tile) * (TILE_BYTES / 16);
#pragma unroll
        for (int j = 0; j < TILE / 16; j++) product16(o, p16 + 4 * j, v + j * (16 * 128 / 16));
    };
    auto convert = [&]() {
#pragma unroll
        for (int j = 0; j < TILE / 4; j++) p16[j] = pack(s[2 * j], s[2 * j + 1]);
        pin(p16);
    };
    uint32_t t = 0; // the tile that is multiplied with its values next, of all tiles so far
    Piece p;
    for (int n = 0; piece(plan, n, p); n++) {
        const uint32_t end = t + p.last - p.first;
        auto wait_values = [&](uint32_t tile) { barrier_wait(&sh.v_full[stage(tile)], phase(tile)); };
        auto free_keys = [&](uint32_t tile) {
            free_place(&sh.k_empty[stage(tile)]);
            if (tile + 1 == end) free_place(&sh.q_empty);
        };
        barrier_wait(&sh.q_full, n & 1);
        barrier_wait(&sh.k_full[stage(t)], phase(t));
        products_begin();
        scores(t);
        products_commit();
#pragma unroll
        for (int i = 0; i < 64; i++) o[i] = 0.f;
        x.most[0] = x.most[1] = -INFINITY, x.sum[0] = x.sum[1] = 0.f;
        products_wait<0>();
        pin(s);
        free_keys(t);
        if (p.last * TILE > sh.valid) { // the last tile of keys comes first
            const int border = sh.valid - (p.last - 1) * TILE - 2 * (lane & 3);
#pragma unroll
            for (int i = 0; i < S; i++)
                if (i / 4 * 8 + (i & 1) >= border) s[i] = -INFINITY;
        }
        raise(s, x, scale, LAZY);
        soften(s, x, scale, 0.f);
        convert();
        wait_values(t);
        if (t + 1 < end) barrier_wait(&sh.k_full[stage(t + 1)], phase(t + 1));
        // Tile t + 1's scores, then tile t with its values; meanwhile the softmax of tile t + 1.
#pragma unroll 1
        while (t + 1 != end) {
            products_begin();
            scores(t + 1);
            products_commit();
            weighted(t);
            products_commit();
            products_wait<1>();
            pin(s);
            free_keys(t + 1);
            const bool shrink = raise(s, x, scale, LAZY);
            soften(s, x, scale, 0.f);
            pin(s);
            // The compiler's scheduler would have the softmax after the products, but may not move it over a loop that
            // depends on it: no sum is negative, in truth.
            wait_values(t + 1 + (x.sum[0] + x.sum[1] < 0.f));
            if (t + 2 < end) barrier_wait(&sh.k_full[stage(t + 2)], phase(t + 2));
            products_wait<0>();
            pin(o);
            pin(p16);
            free_place(&sh.v_empty[stage(t)]);
            if (shrink)
#pragma unroll
                for (int j = 0; j < 64; j++) o[j] *= x.shrink[j / 2 & 1];
            convert();
            t++;
        }
        products_begin();
        weighted(t);
        products_commit();
        products_wait<0>();
        pin(o);
        free_place(&sh.v_empty[stage(t++)]);
        // All that follows is worked out anew, or the compiler would keep parts of it in registers, which the loop has not.
        int self;
        asm volatile("mov.u32 %0, %%tid.x;" : "=r"(self));
        const int group = self / 128 - 1, thread = self & 127;
        piece(plan, n, p);

#pragma unroll
        for (int r = 0; r < 2; r++) {
            x.sum[r] += __shfl_xor_sync(~0u, x.sum[r], 1);
            x.sum[r] += __shfl_xor_sync(~0u, x.sum[r], 2);
        }
        const int dim = heads * HEAD, head = p.unit / plan.tiles_q;
        const int row = (p.unit % plan.tiles_q * GROUPS + group) * ROWS + thread / 32 * 16;
        if (p.part < 0) {
            store_rows(o, x.sum, out, row, queries, dim, head * HEAD);
            continue;
        }
        float *part = parts + (size_t)((blockIdx.x * 2 + p.part) * GROUPS + group) * PART + thread;
#pragma unroll
        for (int i = 0; i < 64; i++) part[i * 128] = o[i];
#pragma unroll
        for (int r = 0; r < 2; r++) part[(64 + r) * 128] = x.most[r], part[(66 + r) * 128] = x.sum[r];
    }
#endif
}

__global__ void __launch_bounds__(128)
    join16(__nv_bfloat16 *out, int queries, int room, int heads, const uint32_t *keys, float scale, const float *parts,
           int grid) {
    Plan<GROUPS, TILE> plan;
    plan.make(heads, queries, counted(keys, room), grid);
    float o[64], sum[2];
    const int unit = joined<GROUPS>(plan, parts, scale, o, sum);
    if (unit < 0) return;
    const int row = (unit % plan.tiles_q * GROUPS + blockIdx.y) * ROWS + threadIdx.x / 32 * 16;
    store_rows(o, sum, out, row, queries, heads * HEAD, unit / plan.tiles_q * HEAD);
}

} // namespace lq::attention16

using namespace lq;
using namespace lq::attention16;

extern "C" {

// Queries, keys and values `[rows, heads · 128]` in bf16, rows a multiple of eight elements apart, the result in rows
// without gaps. *keys of `room` count, one at least; all of them if `keys` is none. `parts`: room for unfinished results.
// All that changes from call to call is read on the card, so that a graph may hold the launches.
int lq_attention16(const void *q, int q_stride, const void *k, int k_stride, const void *v, int v_stride, void *out,
                   int queries, int room, int heads, const uint32_t *keys, float *parts, uint64_t bytes, void *stream) {
    int device = 0, grid = 0;
    if (auto e = cudaGetDevice(&device)) return e;
    if (auto e = cudaDeviceGetAttribute(&grid, cudaDevAttrMultiProcessorCount, device)) return e;
    if (queries < 1 || room < 1 || heads < 1 || grid < 2 || sizeof(float) * grid * 2 * GROUPS * PART > bytes)
        return cudaErrorInvalidValue;
    CUtensorMap maps[3];
    const int dim = heads * HEAD;
    const auto type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    if (int e = tiles_of(&maps[0], type, q, dim, queries, 2ull * q_stride, GROUPS * ROWS)) return e;
    if (int e = tiles_of(&maps[1], type, k, dim, room, 2ull * k_stride, TILE)) return e;
    if (int e = tiles_of(&maps[2], type, v, dim, room, 2ull * v_stride, TILE)) return e;
    const int shared = sizeof(Shared);
    if (auto e = cudaFuncSetAttribute(attend16, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return e;
    const float scale = 1.4426950408889634f / sqrtf((float)HEAD);
    const auto to = (__nv_bfloat16 *)out;
    attend16<<<grid, THREADS, shared, (cudaStream_t)stream>>>(maps[0], maps[1], maps[2], to, queries, room, heads, keys,
                                                              scale, parts);
    if (auto e = cudaGetLastError()) return e;
    join16<<<dim3(grid - 1, GROUPS), 128, 0, (cudaStream_t)stream>>>(to, queries, room, heads, keys, scale, parts, grid);
    LQ_LAUNCHED();
}
}
