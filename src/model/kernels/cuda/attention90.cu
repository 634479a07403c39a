// Attention in e4m3 for Hopper, heads of 128 channels, no causal mask.
//
// Two things make it faster than a library that takes rows of values: values are stored when they are written
// (`lq_store_transposed`) as the tensor cores want them, keys inside, so no tile is transposed here; and the keys of each 16
// are stored in the order in which the accumulators of q·kᵀ lie in registers, so softmax values become the next product's
// operand without any exchange.
//
// A block of threads is a producer (one thread that orders copies) and three groups of 128 threads with 64 queries each, so
// that a scheduler has three warps whose softmax, products and waits lie beside each other. A group hands in the next
// tile's q·kᵀ and the last tile's product with the values, and computes the softmax of the one while the other runs.
//
// Softmax values are stretched to 2^7 ... 2^8.75 and rounded to e4m3; their sum is taken before rounding, in f32. (Sums by
// eight columns of ones in the second product are faster and wrong: a step of e4m3 products cuts its 32 addends off some 13
// bits below the sum. Exponentials by a polynomial beside the special function unit's are slower.)
//
// Other architectures get empty kernels, which nobody launches.
#include "attention.cuh"

namespace lq::attention90 {

constexpr int GROUPS = 3;   // groups of a block
constexpr int TILE = 96;    // keys of a tile
constexpr int STAGES = 8;   // tiles of keys, and of values, on their way
constexpr int S = TILE / 2; // registers of scores
constexpr int TILE_BYTES = TILE * HEAD;
constexpr int THREADS = 128 * (GROUPS + 1);

// Where the n-th tile lies, and which of a barrier's two phases is its.
__device__ __forceinline__ int stage(uint32_t n) { return n % STAGES; }
__device__ __forceinline__ uint32_t phase(uint32_t n) { return n / STAGES & 1; }

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

constexpr float STRETCH = 7.f; // p = 2^7 at the largest score seen when it was last set, up to ...
constexpr float LAZY = 1.75f;  // ... 2^8.75 < 448 before everything is rescaled

struct Shared {
    uint8_t q[GROUPS * ROWS * HEAD];
    uint8_t k[STAGES][TILE_BYTES];
    uint8_t v[STAGES][TILE_BYTES];
    uint64_t q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES];
    int valid;
    Plan<GROUPS, TILE> plan;
};

// Rows of a group's result.
__device__ __forceinline__ void store_rows(const float *o, const float (&sum)[2], uint8_t *out, int row, int queries, int dim,
                                           int column) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float inverse = 1.f / sum[r];
        const int at = row + lane / 4 + 8 * r;
        const bool odd = lane & 1;
        uint8_t *to = out + (size_t)at * dim + column + (odd ? 8 : 0) + (lane & 2) * 2;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            // Neighbours exchange halves so that each writes four bytes: even threads of a pair the first block of eight
            // columns, odd threads the second.
            const float *e = o + 8 * j + 2 * r;
            uint32_t w = pack(e[0] * inverse, e[1] * inverse, e[4] * inverse, e[5] * inverse);
            const uint32_t other = __shfl_xor_sync(~0u, w, 1);
            w = odd ? (other >> 16) | (w & 0xffff0000u) : (w & 0xffffu) | (other << 16);
            if (at < queries) *reinterpret_cast<uint32_t *>(to + 16 * j) = w;
        }
    }
}

__global__ void __launch_bounds__(THREADS, 1)
    attend90(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map, const uint8_t *values,
             uint8_t *out, int queries, int room, int heads, const uint32_t *keys, float scale, float *parts) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL // other cards never get here
    extern __shared__ __align__(1024) uint8_t raw[]; // the period of the swizzle
    Shared &sh = *reinterpret_cast<Shared *>(raw);
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1; // the same in a warp, as the compiler may see
    if (threadIdx.x == 0) {
        if (shared_address(raw) % 1024) __trap();
        // In shared memory, because the loop below leaves no registers.
        sh.valid = valid_of(keys, room);
        sh.plan.make(heads, queries, sh.valid, gridDim.x);
        barrier_init(&sh.q_full, 1), barrier_init(&sh.q_empty, GROUPS * 4);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(&sh.k_full[i], 1), barrier_init(&sh.k_empty[i], GROUPS * 4);
            barrier_init(&sh.v_full[i], 1), barrier_init(&sh.v_empty[i], GROUPS * 4);
        }
    }
    // Where a tile of values ends behind the buffer's end, nothing is copied; p is 0 there, and 0 · NaN is NaN.
    for (int i = threadIdx.x; i < STAGES * TILE_BYTES / 16; i += THREADS)
        reinterpret_cast<uint4 *>(sh.v)[i] = make_uint4(0, 0, 0, 0);
    asm volatile("fence.proxy.async;" ::: "memory");
    __syncthreads();
    const auto &plan = sh.plan;

    if (group < 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
        if (threadIdx.x != 0) return;
        uint32_t k = 0, v = 0; // tiles ordered so far
        Piece p;
        for (int n = 0; piece(plan, n, p); n++) {
            const int head = p.unit / plan.tiles_q, tile = p.unit % plan.tiles_q;
            barrier_wait(&sh.q_empty, (n & 1) ^ 1);
            barrier_expect(&sh.q_full, sizeof(sh.q));
            copy_tile(sh.q, &q_map, head * HEAD, tile * GROUPS * ROWS, &sh.q_full);
            // Keys are one tile ahead of values, as they are waited for.
#pragma unroll 1
            for (int i = p.last - 1; i >= p.first - 1; i--) {
                if (i >= p.first) {
                    barrier_wait(&sh.k_empty[stage(k)], phase(k) ^ 1);
                    barrier_expect(&sh.k_full[stage(k)], TILE_BYTES);
                    copy_tile(sh.k[stage(k)], &k_map, head * HEAD, i * TILE, &sh.k_full[stage(k)]);
                    k++;
                }
                if (i + 1 < p.last) {
                    const int first = (i + 1) * TILE, bytes = min(TILE, room - first) * HEAD;
                    barrier_wait(&sh.v_empty[stage(v)], phase(v) ^ 1);
                    barrier_expect(&sh.v_full[stage(v)], bytes);
                    copy_run(sh.v[stage(v)], values + ((size_t)head * room + first) * HEAD, bytes, &sh.v_full[stage(v)]);
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
    const uint32_t q_operand = rows_at(sh.q + group * ROWS * HEAD), k_operand = rows_at(sh.k), v_operand = blocks_at(sh.v);
    float o[64], s[S];
    uint32_t p8[TILE / 8];
    Softmax x;
    auto scores = [&](uint32_t tile) {
        const uint32_t k = k_operand + stage(tile) * (TILE_BYTES / 16);
        product<0>(s, q_operand, k);
        product<1>(s, q_operand + 2, k + 2);
        product<1>(s, q_operand + 4, k + 4);
        product<1>(s, q_operand + 6, k + 6);
    };
    auto weighted = [&](uint32_t tile) {
        const uint32_t v = v_operand + stage(tile) * (TILE_BYTES / 16);
#pragma unroll
        for (int j = 0; j < TILE / 32; j++) product(o, p8 + 4 * j, v + j * (32 * HEAD / 16));
    };
    auto convert = [&]() {
#pragma unroll
        for (int j = 0; j < TILE / 8; j++) {
            const float *e = s + j / 2 * 8 + j % 2 * 2; // a row's four of sixteen neighbouring keys
            p8[j] = pack(e[0], e[1], e[4], e[5]);
        }
        pin(p8);
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
        soften(s, x, scale, STRETCH);
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
            soften(s, x, scale, STRETCH);
            pin(s);
            // The compiler's scheduler would have the softmax after the products, but may not move it over a loop that
            // depends on it: no sum is negative, in truth.
            wait_values(t + 1 + (x.sum[0] + x.sum[1] < 0.f));
            if (t + 2 < end) barrier_wait(&sh.k_full[stage(t + 2)], phase(t + 2));
            products_wait<0>();
            pin(o);
            pin(p8);
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
        const int row = p.unit % plan.tiles_q * GROUPS * ROWS + group * ROWS + thread / 32 * 16;
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
    join90(uint8_t *out, int queries, int room, int heads, const uint32_t *keys, float scale, const float *parts,
           int grid) {
    Plan<GROUPS, TILE> plan;
    plan.make(heads, queries, valid_of(keys, room), grid);
    float o[64], sum[2];
    const int unit = joined<GROUPS>(plan, parts, scale, o, sum);
    if (unit < 0) return;
    const int row = (unit % plan.tiles_q * GROUPS + blockIdx.y) * ROWS + threadIdx.x / 32 * 16;
    store_rows(o, sum, out, row, queries, heads * HEAD, unit / plan.tiles_q * HEAD);
}

// Eight neighbours in e4m3; those that are so already are in the right unit.
__device__ __forceinline__ uint2 stored8(const __nv_bfloat16 *p, float factor) {
    float v[8];
    load8(p, v);
#pragma unroll
    for (float &f : v) f *= factor;
    uint2 e;
    store8(reinterpret_cast<__nv_fp8_e4m3 *>(&e), v);
    return e;
}
__device__ __forceinline__ uint2 stored8(const __nv_fp8_e4m3 *p, float) { return *reinterpret_cast<const uint2 *>(p); }

// Values `[rows, width]` (rows `stride` apart) as e4m3 from key row + *offset on, in the order in which they are copied and
// multiplied: by head, 16 keys, 8 channels; then a channel's 16 keys, key 8h + 2c + b of them at 4c + 2h + b. A block:
// 128 keys of the result, 64 channels.
template <class In>
__global__ void __launch_bounds__(256) store_transposed(const In *v, int stride, uint8_t *out, int room, const int *offset,
                                                        int row, const float *unit, int rows) {
    __shared__ uint32_t tile[64][33]; // [channel][four keys]
    const int slot = row + (offset ? *offset : 0), first = (slot & ~127) + blockIdx.x * 128, channel = blockIdx.y * 64;
    if (first >= slot + rows) return;
    const float factor = 1.f / *unit;
    const int t = threadIdx.x, c8 = t & 7, word = t >> 3; // word: which four keys
    const int key = first + (word / 4) * 16 + (word & 3) * 2;
    uint2 e[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int row = key + (i >> 1) * 8 + (i & 1) - slot;
        e[i] = row >= 0 && row < rows ? stored8(v + (size_t)row * stride + channel + c8 * 8, factor) : make_uint2(0, 0);
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

// Queries and keys `[rows, heads · 128]`, values for `room` keys from lq_store_transposed, all e4m3; *keys count, one
// at least. `parts`: room for unfinished results. All that changes from call to call is read on the card, so that a graph
// may hold the launches.
int lq_attention90(const void *q, const void *k, const void *v, void *out, int queries, int room, int heads,
                   const uint32_t *keys, float *parts, uint64_t bytes, void *stream) {
    int device = 0, grid = 0;
    if (auto e = cudaGetDevice(&device)) return e;
    if (auto e = cudaDeviceGetAttribute(&grid, cudaDevAttrMultiProcessorCount, device)) return e;
    if (queries < 1 || room < 1 || room % 16 || heads < 1 || grid < 2 || sizeof(float) * grid * 2 * GROUPS * PART > bytes)
        return cudaErrorInvalidValue;
    CUtensorMap maps[2];
    const int dim = heads * HEAD;
    if (int e = tiles_of(&maps[0], CU_TENSOR_MAP_DATA_TYPE_UINT8, q, dim, queries, dim, GROUPS * ROWS)) return e;
    if (int e = tiles_of(&maps[1], CU_TENSOR_MAP_DATA_TYPE_UINT8, k, dim, room, dim, TILE)) return e;
    const int shared = sizeof(Shared);
    if (auto e = cudaFuncSetAttribute(attend90, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return e;
    const float scale = 1.4426950408889634f / sqrtf((float)HEAD);
    attend90<<<grid, THREADS, shared, (cudaStream_t)stream>>>(maps[0], maps[1], (const uint8_t *)v, (uint8_t *)out, queries,
                                                              room, heads, keys, scale, parts);
    if (auto e = cudaGetLastError()) return e;
    join90<<<dim3(grid - 1, GROUPS), 128, 0, (cudaStream_t)stream>>>((uint8_t *)out, queries, room, heads, keys, scale, parts,
                                                                     grid);
    LQ_LAUNCHED();
}

// `kind`: BF16, or E4M3 where values are in their unit already.
int lq_store_transposed(int kind, const void *v, int stride, void *out, int room, const int *offset, int row,
                        const float *unit, int rows, int width, void *stream) {
    if (rows < 1 || room % 16 || width % HEAD || stride % 8) return cudaErrorInvalidValue;
    const auto go = [&](auto *v) {
        const dim3 grid((rows + 127) / 128 + 1, width / 64);
        store_transposed<<<grid, 256, 0, (cudaStream_t)stream>>>(v, stride, (uint8_t *)out, room, offset, row, unit, rows);
    };
    if (kind == BF16) go((const __nv_bfloat16 *)v);
    else go((const __nv_fp8_e4m3 *)v);
    LQ_LAUNCHED();
}
}
