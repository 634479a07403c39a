// What the attentions for Hopper (`attention90.cu`, `attention16.cu`) share: softmax over the accumulators of q·kᵀ, who works
// on what, results that are put together.
//
// A group of 128 threads has 64 queries. Thread t of a warp holds, of 16 rows, columns 8j + 2(t % 4) + {0, 1} of rows t / 4
// (s[4j], s[4j + 1]) and t / 4 + 8 (s[4j + 2], s[4j + 3]), both of scores and of results.
#pragma once
#include "hopper.cuh"

namespace lq {

constexpr int HEAD = 128; // channels of a head
constexpr int ROWS = 64;  // queries of a group
constexpr int PART = ROWS * HEAD + 4 * 128; // floats of an unfinished result: sums of 128 threads, their maxima and totals

__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two rows of a thread: largest score (what p is relative to), sum of p over the thread's keys.
struct Softmax {
    float most[2], sum[2], shrink[2];
};

// Largest score of a thread's row r: three at a time as integers, which orders floats unless all are negative.
template <int S> __device__ __forceinline__ float largest(const float (&s)[S], int r) {
    auto bits = [&](int j) { return __float_as_int(s[j / 2 * 4 + 2 * r + j % 2]); };
    int a = __vimax3_s32(bits(0), bits(1), bits(2)), b = __vimax3_s32(bits(3), bits(4), bits(5));
    static_assert(S % 8 == 0 && S >= 16, "");
#pragma unroll
    for (int j = 6; j < S / 2 - 2; j += 4) {
        a = __vimax3_s32(a, bits(j), bits(j + 1));
        if (j + 2 < S / 2 - 2) b = __vimax3_s32(b, bits(j + 2), bits(j + 3));
    }
    return __int_as_float(max(__vimax3_s32(a, bits(S / 2 - 2), bits(S / 2 - 1)), b));
}
template <int S> __device__ __forceinline__ float largest_of_all(const float (&s)[S], int r) {
    float a = s[2 * r];
#pragma unroll
    for (int j = 1; j < S / 2; j++) a = fmaxf(a, s[j / 2 * 4 + 2 * r + j % 2]);
    return a;
}

// What p is relative to, given new scores, where they are more than `lazy` octaves larger; whether what was summed before
// must be multiplied by `shrink`.
template <int S> __device__ __forceinline__ bool raise(const float (&s)[S], Softmax &x, float scale, float lazy) {
    float top[2] = {largest(s, 0), largest(s, 1)};
    if (__any_sync(~0u, (__float_as_int(top[0]) | __float_as_int(top[1])) < 0))
        top[0] = largest_of_all(s, 0), top[1] = largest_of_all(s, 1);
#pragma unroll
    for (int r = 0; r < 2; r++) {
        top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(~0u, top[r], 2));
    }
    const bool up[2] = {(top[0] - x.most[0]) * scale > lazy, (top[1] - x.most[1]) * scale > lazy};
    const bool any = __any_sync(~0u, up[0] || up[1]);
    if (any) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            x.shrink[r] = up[r] ? exp2_approximate((x.most[r] - top[r]) * scale) : 1.f;
            x.most[r] = up[r] ? top[r] : x.most[r];
            x.sum[r] *= x.shrink[r];
        }
    }
    return any;
}

// Scores to p in place; p is 2^stretch at what it is relative to.
template <int S> __device__ __forceinline__ void soften(float (&s)[S], Softmax &x, float scale, float stretch) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const float shift = stretch - x.most[r] * scale;
        float sums[2] = {x.sum[r], 0.f};
#pragma unroll
        for (int j = 0; j < S / 2; j++) {
            float &p = s[j / 2 * 4 + 2 * r + j % 2];
            p = exp2_approximate(__fmaf_rn(p, scale, shift));
            sums[j & 1] = j == 1 ? p : sums[j & 1] + p;
        }
        x.sum[r] = sums[0] + sums[1];
    }
}

// Keys that count: what the card says, but of those there are.
__device__ __forceinline__ int valid_of(const uint32_t *keys, int room) { return min(max((int)*keys, 1), room); }

// Where the blocks' work lies. Units are (head, tile of GROUPS · 64 queries); whole rounds of the grid first, a unit for each
// block, neighbours in the same head so that its keys come from the cache once; what is left, less than a unit for each
// block, is cut into equal runs of tiles of TILE keys. A run touches two units at most.
template <int GROUPS, int TILE> struct Plan {
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
template <int GROUPS, class Plan>
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

} // namespace lq
