// Attention for Hopper, heads of 128 channels, no causal mask, whatever the numbers are (`attention90.cu`, `attention16.cu`):
// who works on what, the loop, results that are put together.
//
// A block of threads is a producer (one thread that orders copies) and three groups of 128 threads with 64 queries each, so
// that a scheduler has three warps whose softmax, products and waits lie beside each other. A group hands in the next
// tile's q·kᵀ and the last tile's product with the values, and computes the softmax of the one while the other runs.
//
// What numbers do their own way is a `Form`:
//
//     Element, TYPE        of queries, keys and results; to the accelerator
//     TILE, STAGES         keys of a tile; tiles of keys, and of values, on their way
//     STRETCH, LAZY        p is 2^STRETCH at the largest score seen when it was last set, up to 2^(STRETCH + LAZY) before
//                          everything is rescaled
//     Values, copy_values  where values come from; orders a tile of them, whose keys behind `room` need not be written
//     values_at            the operand for `weigh` of a tile in shared memory
//     score<ADD>           s (+)= q · kᵀ over 32 bytes of channels
//     convert              softmax values to the first operand of `weigh`
//     weigh                o += p · v over a tile
//     store                a group's rows of the result
//
// Other architectures get empty kernels, which nobody launches.
#pragma once
#include "softmax.cuh"

namespace lq {

constexpr int HEAD = 128;                   // channels of a head
constexpr int ROWS = 64;                    // queries of a group
constexpr int GROUPS = 3;                   // groups of a block
constexpr int THREADS = 128 * (GROUPS + 1); // of a block
constexpr int PART = ROWS * HEAD + 4 * 128; // floats of an unfinished result: sums of 128 threads, their maxima and totals

// Keys that count: what the card says, but of those there are; all of them where it says nothing.
__device__ __forceinline__ int valid_of(const uint32_t *keys, int room) {
    return keys ? min(max((int)*keys, 1), room) : room;
}

// Where the blocks' work lies. Units are (head, tile of GROUPS · 64 queries); whole rounds of the grid first, a unit for each
// block, neighbours in the same head so that its keys come from the cache once; what is left, less than a unit for each
// block, is cut into equal runs of tiles of TILE keys. A run touches two units at most.
template <int TILE> struct Plan {
    int units, tiles_q, tiles_k, rounds, grid;
    int rest;    // key tiles of all units left
    int workers; // blocks that share them

    __device__ __forceinline__ void make(int heads, int queries, int keys, int blocks) {
        grid = blocks;
        tiles_q = (queries + GROUPS * ROWS - 1) / (GROUPS * ROWS);
        tiles_k = (keys + TILE - 1) / TILE;
        units = heads * tiles_q;
        rounds = units / grid;
        rest = units % grid * tiles_k;
        workers = min(grid, rest);
    }
    __device__ __forceinline__ int start(int block) const { return (int)((unsigned)rest * block / workers); }
};
struct Piece {
    int unit, first, last; // key tiles first ... last - 1
    int part;              // which of the block's unfinished results; -1: the unit is whole
};
// The block's n-th piece; false: no more.
template <class Plan> __device__ __forceinline__ bool piece(const Plan &plan, int n, Piece &p) {
    const int block = blockIdx.x;
    if (n < plan.rounds) {
        p = {n * plan.grid + block, 0, plan.tiles_k, -1};
        return p.unit < plan.units;
    }
    const int part = n - plan.rounds;
    if (part > 1 || block >= plan.workers) return false;
    const int from = plan.start(block), to = plan.start(block + 1);
    const int border = (from / plan.tiles_k + 1) * plan.tiles_k;
    const int a = part ? border : from, b = part ? to : min(border, to);
    if (a >= b) return false;
    const int left = a / plan.tiles_k, first = a % plan.tiles_k, last = first + b - a;
    p = {plan.rounds * plan.grid + left, first, last, first == 0 && last == plan.tiles_k ? -1 : part};
    return true;
}

// Puts the parts of unit `blockIdx.x` of those that were split together, in their order; a block is the group `blockIdx.y`.
// The unit's number; -1: it was whole, or there is none.
template <class Plan>
__device__ __forceinline__ int joined(const Plan &plan, const float *parts, float scale, float (&o)[64], float (&sum)[2]) {
    const int group = blockIdx.y, left = blockIdx.x, begin = left * plan.tiles_k, end = begin + plan.tiles_k;
    if (begin >= plan.rest) return -1;
    int first = left * plan.workers / (plan.units % plan.grid), last; // a worker near the unit's first
    while (first > 0 && plan.start(first) > begin) first--;
    while (plan.start(first + 1) <= begin) first++;
    for (last = first; plan.start(last + 1) < end;) last++;
    if (first == last) return -1; // its only block has stored it
    auto part_of = [&](int block) {
        const int part = plan.start(block) < begin;
        return parts + (size_t)((block * 2 + part) * GROUPS + group) * PART + threadIdx.x;
    };
    float most[2] = {-INFINITY, -INFINITY};
    sum[0] = sum[1] = 0.f;
    for (int block = first; block <= last; block++)
        for (int r = 0; r < 2; r++) most[r] = fmaxf(most[r], part_of(block)[(64 + r) * 128]);
#pragma unroll
    for (int i = 0; i < 64; i++) o[i] = 0.f;
    for (int block = first; block <= last; block++) {
        const float *part = part_of(block);
        float factor[2];
        for (int r = 0; r < 2; r++) {
            factor[r] = exp2_approximate((part[(64 + r) * 128] - most[r]) * scale);
            sum[r] += part[(66 + r) * 128] * factor[r];
        }
#pragma unroll
        for (int i = 0; i < 64; i++) o[i] += part[i * 128] * factor[i / 2 & 1];
    }
    return plan.rounds * plan.grid + left;
}

template <class Form> struct Shared {
    static constexpr int BYTES = sizeof(typename Form::Element);
    static constexpr int TILE_BYTES = Form::TILE * HEAD * BYTES;
    // Rows of 128 bytes, the width of the swizzle: of two halves all rows' first channels come first.
    uint8_t q[BYTES][GROUPS * ROWS * 128];
    uint8_t k[Form::STAGES][TILE_BYTES];
    uint8_t v[Form::STAGES][TILE_BYTES];
    uint64_t q_full, q_empty, k_full[Form::STAGES], k_empty[Form::STAGES], v_full[Form::STAGES], v_empty[Form::STAGES];
    int valid;
    Plan<Form::TILE> plan;
};

// Rows of a head, in boxes of 128 bytes.
template <class Form>
__device__ __forceinline__ void copy_rows(void *to, const CUtensorMap *map, int head, int row, int rows, uint64_t *full) {
    constexpr int HALVES = Shared<Form>::BYTES;
#pragma unroll
    for (int h = 0; h < HALVES; h++)
        copy_tile((uint8_t *)to + h * rows * 128, map, head * HEAD + h * (HEAD / HALVES), row, full);
}

template <class Form>
__global__ void __launch_bounds__(THREADS, 1)
    attend(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
           const __grid_constant__ typename Form::Values values, typename Form::Element *out, int queries, int room, int heads,
           const uint32_t *keys, float scale, float *parts) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL // other cards never get here
    constexpr int TILE = Form::TILE, S = TILE / 2; // S: registers of scores
    constexpr int BYTES = Shared<Form>::BYTES, TILE_BYTES = Shared<Form>::TILE_BYTES;
    // Where the n-th tile lies, and which of a barrier's two phases is its.
    auto stage = [](uint32_t n) -> int { return n % Form::STAGES; };
    auto phase = [](uint32_t n) -> uint32_t { return n / Form::STAGES & 1; };
    extern __shared__ __align__(1024) uint8_t raw[]; // the period of the swizzle
    auto &sh = *reinterpret_cast<Shared<Form> *>(raw);
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1; // the same in a warp, as the compiler may see
    if (threadIdx.x == 0) {
        if (shared_address(raw) % 1024) __trap();
        // In shared memory, because the loop below leaves no registers.
        sh.valid = valid_of(keys, room);
        sh.plan.make(heads, queries, sh.valid, gridDim.x);
        barrier_init(&sh.q_full, 1), barrier_init(&sh.q_empty, GROUPS * 4);
        for (int i = 0; i < Form::STAGES; i++) {
            barrier_init(&sh.k_full[i], 1), barrier_init(&sh.k_empty[i], GROUPS * 4);
            barrier_init(&sh.v_full[i], 1), barrier_init(&sh.v_empty[i], GROUPS * 4);
        }
    }
    // Keys behind the buffer's end may have no values; p is 0 there, and 0 · NaN is NaN.
    for (int i = threadIdx.x; i < Form::STAGES * TILE_BYTES / 16; i += THREADS)
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
            copy_rows<Form>(sh.q, &q_map, head, tile * GROUPS * ROWS, GROUPS * ROWS, &sh.q_full);
            // Keys are one tile ahead of values, as they are waited for.
#pragma unroll 1
            for (int i = p.last - 1; i >= p.first - 1; i--) {
                if (i >= p.first) {
                    barrier_wait(&sh.k_empty[stage(k)], phase(k) ^ 1);
                    barrier_expect(&sh.k_full[stage(k)], TILE_BYTES);
                    copy_rows<Form>(sh.k[stage(k)], &k_map, head, i * TILE, TILE, &sh.k_full[stage(k)]);
                    k++;
                }
                if (i + 1 < p.last) {
                    barrier_wait(&sh.v_empty[stage(v)], phase(v) ^ 1);
                    Form::copy_values(sh.v[stage(v)], values, head, (i + 1) * TILE, room, &sh.v_full[stage(v)]);
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
    const uint32_t v_operand = Form::values_at(sh.v);
    float o[64], s[S];
    uint32_t operand[TILE * BYTES / 8]; // softmax values
    Softmax x;
    auto scores = [&](uint32_t tile) {
        const uint32_t k = k_operand + stage(tile) * (TILE_BYTES / 16);
#pragma unroll
        for (int j = 0; j < 4 * BYTES; j++) { // 32 bytes of channels each
            const uint32_t a = q_operand + j / 4 * (sizeof(sh.q[0]) / 16) + j % 4 * 2;
            const uint32_t b = k + j / 4 * (TILE * 128 / 16) + j % 4 * 2;
            if (j == 0) Form::template score<0>(s, a, b);
            else Form::template score<1>(s, a, b);
        }
    };
    auto weighted = [&](uint32_t tile) { Form::weigh(o, operand, v_operand + stage(tile) * (TILE_BYTES / 16)); };
    auto convert = [&]() {
        Form::convert(s, operand);
        pin(operand);
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
        raise(s, x, scale, Form::LAZY);
        soften(s, x, scale, Form::STRETCH);
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
            const bool shrink = raise(s, x, scale, Form::LAZY);
            soften(s, x, scale, Form::STRETCH);
            pin(s);
            // The compiler's scheduler would have the softmax after the products, but may not move it over a loop that
            // depends on it: no sum is negative, in truth.
            wait_values(t + 1 + (x.sum[0] + x.sum[1] < 0.f));
            if (t + 2 < end) barrier_wait(&sh.k_full[stage(t + 2)], phase(t + 2));
            products_wait<0>();
            pin(o);
            pin(operand);
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
            Form::store(o, x.sum, values, out, row, queries, dim, head * HEAD);
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

// Puts split units together (`joined`).
template <class Form>
__global__ void __launch_bounds__(128)
    join(const __grid_constant__ typename Form::Values values, typename Form::Element *out, int queries, int room, int heads,
         const uint32_t *keys, float scale, const float *parts, int grid) {
    Plan<Form::TILE> plan;
    plan.make(heads, queries, valid_of(keys, room), grid);
    float o[64], sum[2];
    const int unit = joined(plan, parts, scale, o, sum);
    if (unit < 0) return;
    const int row = (unit % plan.tiles_q * GROUPS + blockIdx.y) * ROWS + threadIdx.x / 32 * 16;
    Form::store(o, sum, values, out, row, queries, heads * HEAD, unit / plan.tiles_q * HEAD);
}

// Rows of queries and keys `q_pitch` and `k_pitch` bytes apart, the result's without gaps; *keys of `room` count, one at
// least, all where `keys` is none. `parts`: room for unfinished results, `bytes` of it. All that changes from call to call
// is read on the card, so that a graph may hold the launches.
template <class Form>
int launch(const void *q, uint64_t q_pitch, const void *k, uint64_t k_pitch, const typename Form::Values &values, void *out,
           int queries, int room, int heads, const uint32_t *keys, float *parts, uint64_t bytes, void *stream) {
    int device = 0, grid = 0;
    if (auto e = cudaGetDevice(&device)) return e;
    if (auto e = cudaDeviceGetAttribute(&grid, cudaDevAttrMultiProcessorCount, device)) return e;
    if (queries < 1 || room < 1 || heads < 1 || grid < 2 || sizeof(float) * grid * 2 * GROUPS * PART > bytes)
        return cudaErrorInvalidValue;
    CUtensorMap q_map, k_map;
    if (int e = tiles_of(&q_map, Form::TYPE, q, heads * HEAD, queries, q_pitch, GROUPS * ROWS)) return e;
    if (int e = tiles_of(&k_map, Form::TYPE, k, heads * HEAD, room, k_pitch, Form::TILE)) return e;
    const int shared = sizeof(Shared<Form>);
    if (auto e = cudaFuncSetAttribute(attend<Form>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return e;
    const float scale = 1.4426950408889634f / sqrtf((float)HEAD);
    const auto to = (typename Form::Element *)out;
    attend<Form><<<grid, THREADS, shared, (cudaStream_t)stream>>>(q_map, k_map, values, to, queries, room, heads, keys, scale,
                                                                  parts);
    if (auto e = cudaGetLastError()) return e;
    join<Form><<<dim3(grid - 1, GROUPS), 128, 0, (cudaStream_t)stream>>>(values, to, queries, room, heads, keys, scale, parts,
                                                                         grid);
    LQ_LAUNCHED();
}

} // namespace lq
