// Softmax over the accumulators of q·kᵀ, as the attentions for Hopper hold them (`attention.cuh`).
//
// A group of 128 threads has 64 queries. Thread t of a warp holds, of 16 rows, columns 8j + 2(t % 4) + {0, 1} of rows t / 4
// (s[4j], s[4j + 1]) and t / 4 + 8 (s[4j + 2], s[4j + 3]), both of scores and of results.
#pragma once
#include "hopper.cuh"

namespace lq {

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

} // namespace lq
