// Row-wise operations of the transformer, one block per row, the row in registers: memory is read once and written once.
#include "common.cuh"

#include <type_traits>

using namespace lq;

namespace {

// Writes a normed row. e4m3 rows have the unit that is given, or get a scale of their own: value = stored · scale.
template <int HELD, class Out>
__device__ __forceinline__ void put_row(float (*v)[8], Out *out, const float *unit, float *scale, int row, int width,
                                        float *room) {
    float factor = 1.f;
    if (sizeof(Out) == 1 && unit) factor = 1.f / *unit;
    else if constexpr (sizeof(Out) == 1) {
        float most = 0.f;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            if (int i = (threadIdx.x + k * blockDim.x) * 8; i < width)
#pragma unroll
                for (int j = 0; j < 8; j++) most = fmaxf(most, fabsf(v[k][j]));
        }
        float all[1] = {most};
        over_block<Largest>(all, room);
        most = fmaxf(all[0], 1e-12f);
        factor = LARGEST / most;
        if (threadIdx.x == 0) scale[row] = most / LARGEST;
    }
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        if (int i = (threadIdx.x + k * blockDim.x) * 8; i < width) {
            if constexpr (sizeof(Out) == 1)
#pragma unroll
                for (int j = 0; j < 8; j++) v[k][j] *= factor;
            store8(out + (size_t)row * width + i, v[k]);
        }
    }
}

// x += y · gate (x in place, rounded to its type), then LayerNorm of the rounded x, · scale + shift. Mean and variance in
// one pass, of the row less its first element: without that shift squares of a far mean would swallow the variance.
template <int HELD, class X, class Out, bool ADD, bool NORM>
__global__ void residual_norm(X *x, const __nv_bfloat16 *y, const float *gate, Runs gate_runs, const float *scale,
                              const float *shift, Runs norm_runs, float eps, Out *out, const float *unit,
                              float *row_scale, int width) {
    __shared__ float room[3 * 32];
    __shared__ float first;
    const int row = blockIdx.x;
    float v[HELD][8];
    const float *g = gate ? gate + (size_t)gate_runs.of(row) * width : nullptr;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int i = (threadIdx.x + k * blockDim.x) * 8;
        if (i >= width) continue;
        X *at = x + (size_t)row * width + i;
        load8(at, v[k]);
        if constexpr (ADD) {
            float a[8], b[8];
            load8(y + (size_t)row * width + i, a);
            if (g) load8(g + i, b);
#pragma unroll
            for (int j = 0; j < 8; j++) v[k][j] += g ? a[j] * b[j] : a[j];
            store8(at, v[k]);
            if constexpr (sizeof(X) == 2)
#pragma unroll
                for (int j = 0; j < 8; j++) v[k][j] = __bfloat162float(__float2bfloat16_rn(v[k][j]));
        }
    }
    if constexpr (NORM) {
        if (threadIdx.x == 0) first = v[0][0];
        __syncthreads();
        const float pivot = first;
        float sums[2] = {0.f, 0.f};
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if ((threadIdx.x + k * blockDim.x) * 8 < width)
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    v[k][j] -= pivot;
                    sums[0] += v[k][j];
                    sums[1] += v[k][j] * v[k][j];
                }
        over_block<Sum>(sums, room);
        const float mean = sums[0] / width;
        const float inverse = rsqrtf(fmaxf(sums[1] / width - mean * mean, 0.f) + eps);
        const size_t run = (size_t)norm_runs.of(row) * width;
#pragma unroll
        for (int k = 0; k < HELD; k++) {
            const int i = (threadIdx.x + k * blockDim.x) * 8;
            if (i >= width) continue;
            float a[8], b[8];
            load8(scale + run + i, a);
            load8(shift + run + i, b);
#pragma unroll
            for (int j = 0; j < 8; j++) v[k][j] = (v[k][j] - mean) * inverse * a[j] + b[j];
        }
        put_row<HELD>(v, out, unit, row_scale, row, width, room + 64);
    }
}

// Rows of 5120 in bf16 have kernels of their own. There a row stays in registers as it came, so more are on their way
// at once: as many blocks a multiprocessor as spill nothing.
constexpr int WIDE = 5120, WIDE_THREADS = 128;

__device__ __forceinline__ float low(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// Part of a row, past L1, which is for what rows share.
__device__ __forceinline__ void load_past(const __nv_bfloat16 *p, uint2 &raw) {
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(raw.x), "=r"(raw.y) : "l"(p));
}
__device__ __forceinline__ void load_past(const __nv_bfloat16 *p, uint4 &raw) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
                 : "l"(p));
}

__device__ __forceinline__ void unpack(const uint4 &raw, float (&v)[8]) {
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int j = 0; j < 4; j++) v[2 * j] = low(pairs[j]), v[2 * j + 1] = high(pairs[j]);
}

// As `over_block`, for blocks of a known number of warps, four or more; `room` is STEP float4 for each value.
template <int WARPS, class Op, int N> __device__ __forceinline__ void over_warps(float (&v)[N], float4 *room) {
    static_assert(WARPS >= 4);
    constexpr int STEP = (WARPS + 3) / 4;
#pragma unroll
    for (int n = 0; n < N; n++) {
#pragma unroll
        for (int o = 16; o > 0; o >>= 1) v[n] = Op::of(v[n], __shfl_xor_sync(~0u, v[n], o));
        if ((threadIdx.x & 31) == 0) reinterpret_cast<float *>(room + n * STEP)[threadIdx.x >> 5] = v[n];
    }
    __syncthreads();
#pragma unroll
    for (int n = 0; n < N; n++) {
        const float4 f = room[n * STEP];
        v[n] = Op::of(Op::of(f.x, f.y), Op::of(f.z, f.w));
#pragma unroll
        for (int w = 4; w < WARPS; w++) v[n] = Op::of(v[n], reinterpret_cast<const float *>(room + n * STEP)[w]);
    }
}

// `residual_norm` of such rows to which nothing is added, to e4m3 with a unit (UNIT) or a scale each. Each thread loads
// 8 bytes of a row, 16 of scale and shift, beside its neighbour's.
template <bool UNIT>
__global__ void __launch_bounds__(WIDE_THREADS, UNIT ? 8 : 5)
    wide_norm(const __nv_bfloat16 *x, const float *scale, const float *shift, const __grid_constant__ Runs runs,
              float eps, __nv_fp8_e4m3 *out, const float *unit, float *row_scale) {
    constexpr int STEP = WIDE_THREADS * 4, HELD = WIDE / STEP; // four neighbours a load
    static_assert(HELD * STEP == WIDE && WIDE_THREADS == 4 * 32);
    __shared__ float4 room[3];
    const int row = blockIdx.x, column = threadIdx.x * 4;
    const __nv_bfloat16 *in = x + (size_t)row * WIDE;
    uint2 raw[HELD];
#pragma unroll
    for (int k = 0; k < HELD; k++) load_past(in + column + k * STEP, raw[k]);
    const float pivot = __bfloat162float(*in);
    float factor = UNIT ? 1.f / *unit : 1.f;
    float sums[2] = {0.f, 0.f};
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const float v[4] = {low(raw[k].x) - pivot, high(raw[k].x) - pivot, low(raw[k].y) - pivot,
                            high(raw[k].y) - pivot};
#pragma unroll
        for (int j = 0; j < 4; j++) sums[0] += v[j], sums[1] += v[j] * v[j];
    }
    over_warps<4, Sum>(sums, room);
    const float mean = sums[0] / WIDE;
    const float inverse = rsqrtf(fmaxf(sums[1] / WIDE - mean * mean, 0.f) + eps), start = -mean * inverse;
    const size_t run = (size_t)runs.of(row) * WIDE;
    float y[HELD][4], most[1] = {1e-12f};
    auto put = [&](int k, const float (&v)[4]) {
        reinterpret_cast<__nv_fp8x4_e4m3 *>(out + (size_t)row * WIDE + column)[k * WIDE_THREADS] =
            __nv_fp8x4_e4m3(make_float4(v[0] * factor, v[1] * factor, v[2] * factor, v[3] * factor));
    };
#pragma unroll
    for (int k = 0; k < HELD; k++) asm volatile("" : "+r"(raw[k].x), "+r"(raw[k].y)); // not kept as floats
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const float4 a = __ldg(reinterpret_cast<const float4 *>(scale + run + column + k * STEP));
        const float4 b = __ldg(reinterpret_cast<const float4 *>(shift + run + column + k * STEP));
        y[k][0] = fmaf(fmaf(low(raw[k].x) - pivot, inverse, start), a.x, b.x);
        y[k][1] = fmaf(fmaf(high(raw[k].x) - pivot, inverse, start), a.y, b.y);
        y[k][2] = fmaf(fmaf(low(raw[k].y) - pivot, inverse, start), a.z, b.z);
        y[k][3] = fmaf(fmaf(high(raw[k].y) - pivot, inverse, start), a.w, b.w);
        if constexpr (UNIT) put(k, y[k]);
        else
#pragma unroll
            for (int j = 0; j < 4; j++) most[0] = fmaxf(most[0], fabsf(y[k][j]));
    }
    if constexpr (!UNIT) {
        over_warps<4, Largest>(most, room + 2);
        factor = LARGEST / most[0];
        if (threadIdx.x == 0) row_scale[row] = most[0] / LARGEST;
#pragma unroll
        for (int k = 0; k < HELD; k++) put(k, y[k]);
    }
}

// Calls `go` with the number of vectors a thread holds as a constant.
template <class Go> int with_held(int width, Go go) {
    switch (held_for(width)) {
    case 1: go(std::integral_constant<int, 1>{}); break;
    case 2: go(std::integral_constant<int, 2>{}); break;
    case 3: go(std::integral_constant<int, 3>{}); break;
    case 4: go(std::integral_constant<int, 4>{}); break;
    default: return cudaErrorInvalidValue;
    }
    LQ_LAUNCHED();
}

template <class X, class Out>
int residual_norm_with(bool add, bool norm, void *x, const void *y, const float *gate, const Runs *gate_runs,
                       const float *scale, const float *shift, const Runs *norm_runs, float eps, void *out,
                       const float *unit, float *row_scale, int rows, int width, cudaStream_t stream) {
    const int threads = threads_for(width);
    auto go = [&](auto kernel) {
        kernel<<<rows, threads, 0, stream>>>((X *)x, (const __nv_bfloat16 *)y, gate, *gate_runs, scale, shift,
                                             *norm_runs, eps, (Out *)out, unit, row_scale, width);
    };
    return with_held(width, [&](auto held) {
        if (add && norm) go(residual_norm<held(), X, Out, true, true>);
        else if (add) go(residual_norm<held(), X, Out, true, false>);
        else go(residual_norm<held(), X, Out, false, true>);
    });
}

// One of up to three projections that lie side by side in a row.
struct Lane {
    const void *in;              // first element; bf16
    const __nv_bfloat16 *weight; // of the RMS norm; none = no norm
    int rotate;                  // whether the table turns it
    void *out;                   // [.., width]
    const float *unit;           // e4m3: what one stored unit is worth, on the device; none = 1
    int slot;                    // whether rows start at *offset instead of 0
};
struct Lanes {
    Lane lane[3];
};

// RMS norm, rotation of adjacent pairs, quantisation with one scale, into row *offset + r of a buffer.
template <int HELD, class Out>
__global__ void norm_rotate(Lanes lanes, int stride, const float *table, int head, const int *offset, float eps, int width) {
    __shared__ float room[32];
    const Lane &lane = lanes.lane[blockIdx.y];
    const int row = blockIdx.x;
    const __nv_bfloat16 *in = (const __nv_bfloat16 *)lane.in + (size_t)row * stride;
    float v[HELD][8];
    float squares = 0.f;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int i = (threadIdx.x + k * blockDim.x) * 8;
        if (i >= width) continue;
        load8(in + i, v[k]);
#pragma unroll
        for (int j = 0; j < 8; j++) squares += v[k][j] * v[k][j];
    }
    float inverse = 1.f;
    if (lane.weight) {
        float all[1] = {squares};
        over_block<Sum>(all, room);
        inverse = rsqrtf(all[0] / width + eps);
    }
    const float unit = sizeof(Out) == 1 && lane.unit ? 1.f / *lane.unit : 1.f;
    Out *out = (Out *)lane.out + (size_t)(row + (lane.slot && offset ? *offset : 0)) * width;
    const float *turn = table + (size_t)row * head;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int i = (threadIdx.x + k * blockDim.x) * 8;
        if (i >= width) continue;
        if (lane.weight) {
            float w[8];
            load8(lane.weight + i, w);
#pragma unroll
            for (int j = 0; j < 8; j++) v[k][j] *= inverse * w[j];
        }
        if (lane.rotate) {
            const int pair = (i % head) / 2;
            float4 c = *reinterpret_cast<const float4 *>(turn + pair);
            float4 s = *reinterpret_cast<const float4 *>(turn + head / 2 + pair);
            const float cc[4] = {c.x, c.y, c.z, c.w}, ss[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float a = v[k][2 * j], b = v[k][2 * j + 1];
                v[k][2 * j] = a * cc[j] - b * ss[j];
                v[k][2 * j + 1] = a * ss[j] + b * cc[j];
            }
        }
        if constexpr (sizeof(Out) == 1)
#pragma unroll
            for (int j = 0; j < 8; j++) v[k][j] *= unit;
        store8(out + i, v[k]);
    }
}

// The same for lanes of 40 heads of 128 that are normed and turned, to e4m3. What a thread holds stands at one place of
// its heads, so it needs four pairs of the table, into which the norm and the unit are multiplied.
constexpr int WIDE_HEAD = 128, TURN_THREADS = 160;

__global__ void __launch_bounds__(TURN_THREADS, 8)
    wide_norm_rotate(const __grid_constant__ Lanes lanes, int stride, const float *table, const int *offset,
                     float eps) {
    constexpr int STEP = TURN_THREADS * 8, HELD = WIDE / STEP, WARPS = TURN_THREADS / 32;
    static_assert(HELD * STEP == WIDE && STEP % WIDE_HEAD == 0);
    __shared__ float4 room[(WARPS + 3) / 4];
    const Lane &lane = lanes.lane[blockIdx.y];
    const int row = blockIdx.x, column = threadIdx.x * 8;
    const __nv_bfloat16 *in = (const __nv_bfloat16 *)lane.in + (size_t)row * stride + column;
    uint4 raw[HELD];
#pragma unroll
    for (int k = 0; k < HELD; k++) load_past(in + k * STEP, raw[k]);
    const int first = lane.slot && offset ? *offset : 0;
    const float *turn = table + (size_t)row * WIDE_HEAD + column % WIDE_HEAD / 2;
    const float4 c = __ldg(reinterpret_cast<const float4 *>(turn));
    const float4 s = __ldg(reinterpret_cast<const float4 *>(turn + WIDE_HEAD / 2));
    float squares[1] = {0.f}, odd = 0.f;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        float v[8];
        unpack(raw[k], v);
#pragma unroll
        for (int j = 0; j < 8; j += 2) squares[0] += v[j] * v[j], odd += v[j + 1] * v[j + 1];
    }
    squares[0] += odd;
    over_warps<WARPS, Sum>(squares, room);
    const float factor = rsqrtf(squares[0] / WIDE + eps) * (lane.unit ? 1.f / *lane.unit : 1.f);
    const float cc[4] = {c.x * factor, c.y * factor, c.z * factor, c.w * factor};
    const float ss[4] = {s.x * factor, s.y * factor, s.z * factor, s.w * factor};
    __nv_fp8_e4m3 *out = (__nv_fp8_e4m3 *)lane.out + (size_t)(row + first) * WIDE + column;
#pragma unroll
    for (int k = 0; k < HELD; k++) // not kept as floats
        asm volatile("" : "+r"(raw[k].x), "+r"(raw[k].y), "+r"(raw[k].z), "+r"(raw[k].w));
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        float v[8], w[8];
        unpack(raw[k], v);
        unpack(__ldg(reinterpret_cast<const uint4 *>(lane.weight + column + k * STEP)), w);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float a = v[2 * j] * w[2 * j], b = v[2 * j + 1] * w[2 * j + 1];
            v[2 * j] = a * cc[j] - b * ss[j];
            v[2 * j + 1] = a * ss[j] + b * cc[j];
        }
        store8(out + k * STEP, v);
    }
}

__device__ __forceinline__ float gelu_tanh(float x) {
    // x · σ(2u), the same function as 0.5 x (1 + tanh u)
    const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return __fdividef(x, 1.f + __expf(-2.f * u));
}

// Rows of bf16 to e4m3 with the unit given or a scale each, through GELU if wanted. Weights are quantised by the same.
template <int HELD, bool GELU>
__global__ void quantise(const __nv_bfloat16 *x, __nv_fp8_e4m3 *out, const float *unit, float *row_scale, int width) {
    __shared__ float room[32];
    const int row = blockIdx.x;
    float v[HELD][8];
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int i = (threadIdx.x + k * blockDim.x) * 8;
        if (i >= width) continue;
        load8(x + (size_t)row * width + i, v[k]);
        if constexpr (GELU)
#pragma unroll
            for (int j = 0; j < 8; j++) v[k][j] = gelu_tanh(v[k][j]);
    }
    put_row<HELD>(v, out, unit, row_scale, row, width, room);
}

// The largest size that each output of an e4m3 matrix can have for rows z · scale + shift with |z|² <= width that were
// rounded to e4m3 with `unit`: Cauchy and Schwarz for z, then what rounding adds, a sixteenth of a number or half the
// smallest step. A block sees some outputs, so that scale and shift are read once for all of them.
constexpr int OUTPUTS = 8;
__global__ void bounds(const __nv_fp8_e4m3 *weight, const float *worth, const __nv_bfloat16 *bias, const float *scale,
                       const float *shift, const float *unit, float *out, int width, int outputs) {
    __shared__ float room[3 * OUTPUTS * 32];
    const int first = blockIdx.x * OUTPUTS;
    const size_t run = (size_t)blockIdx.y * width;
    const float step = *unit / 1024.f;
    float sums[3 * OUTPUTS] = {};
    for (int i = threadIdx.x * 8; i < width; i += blockDim.x * 8) {
        float a[8], b[8], w[8];
        load8(scale + run + i, a);
        load8(shift + run + i, b);
#pragma unroll
        for (int n = 0; n < OUTPUTS; n++) {
            load8(weight + (size_t)(first + n) * width + i, w);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                sums[3 * n] += w[j] * w[j] * a[j] * a[j];
                sums[3 * n + 1] += w[j] * b[j];
                sums[3 * n + 2] += fabsf(w[j]) * (fabsf(b[j]) / 16.f + step);
            }
        }
    }
    over_block<Sum>(sums, room);
#pragma unroll
    for (int n = 0; n < OUTPUTS; n++) {
        if (threadIdx.x != n) continue;
        const int o = first + n;
        const float known = sums[3 * n + 1] * worth[o] + (bias ? __bfloat162float(bias[o]) : 0.f);
        const float moved = 17.f / 16.f * sqrtf(sums[3 * n] * width) + sums[3 * n + 2];
        out[(size_t)blockIdx.y * outputs + o] = moved * worth[o] + fabsf(known);
    }
}

// Queries normed, then attention to the few keys of the row's group, the whole row in one block. The lanes that share a
// head (head / 8 of them, a power of two) hold eight channels each.
constexpr int MOST_KEYS = 8;
template <int HELD, class Out>
__global__ void few_keys(const __nv_bfloat16 *q, const __nv_bfloat16 *weight, const __nv_bfloat16 *keys,
                         const __nv_bfloat16 *values, Out *out, float *row_scale, int rows_in_group, int count,
                         int lanes, int width, float eps, float scale) {
    __shared__ float room[2 * 32];
    const int row = blockIdx.x, group = row / rows_in_group;
    float v[HELD][8];
    float all[1] = {0.f};
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int i = (threadIdx.x + k * blockDim.x) * 8;
        if (i >= width) continue;
        load8(q + (size_t)row * width + i, v[k]);
#pragma unroll
        for (int j = 0; j < 8; j++) all[0] += v[k][j] * v[k][j];
    }
    over_block<Sum>(all, room);
    const float inverse = rsqrtf(all[0] / width + eps) * scale;
    const size_t first = (size_t)group * count * width;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int i = (threadIdx.x + k * blockDim.x) * 8;
        const bool mine = i < width; // whole heads are, so shuffles within a head are among such
        float a[8], score[MOST_KEYS], most = -INFINITY, sum = 0.f;
        if (mine) {
            load8(weight + i, a);
#pragma unroll
            for (int j = 0; j < 8; j++) v[k][j] *= inverse * a[j];
        }
#pragma unroll
        for (int t = 0; t < MOST_KEYS; t++) {
            if (t >= count) break;
            float dot = 0.f;
            if (mine) {
                load8(keys + first + (size_t)t * width + i, a);
#pragma unroll
                for (int j = 0; j < 8; j++) dot += v[k][j] * a[j];
            }
            for (int o = lanes / 2; o > 0; o >>= 1) dot += __shfl_xor_sync(~0u, dot, o);
            score[t] = dot;
            most = fmaxf(most, dot);
        }
#pragma unroll
        for (int j = 0; j < 8; j++) v[k][j] = 0.f;
#pragma unroll
        for (int t = 0; t < MOST_KEYS; t++) {
            if (t >= count) break;
            const float p = __expf(score[t] - most);
            sum += p;
            if (mine) {
                load8(values + first + (size_t)t * width + i, a);
#pragma unroll
                for (int j = 0; j < 8; j++) v[k][j] += p * a[j];
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) v[k][j] /= sum;
    }
    put_row<HELD>(v, out, (const float *)nullptr, row_scale, row, width, room + 32);
}

} // namespace

extern "C" {

// Whether rows of this width fit the kernels of this file.
int lq_row_fits(int width) { return threads_for(width) > 0; }

// x_kind: F32 or BF16. y none = nothing is added; scale none = nothing is normed. out_kind: BF16, F32 or E4M3, the last
// with `unit`, or with a scale for each row where there is none.
int lq_residual_norm(int x_kind, int out_kind, void *x, const void *y, const float *gate, const Runs *gate_runs,
                     const float *scale, const float *shift, const Runs *norm_runs, float eps, void *out,
                     const float *unit, float *row_scale, int rows, int width, void *stream) {
    if (!threads_for(width) || (!y && !scale)) return cudaErrorInvalidValue;
    if (!y && x_kind == BF16 && out_kind == E4M3 && width == WIDE) {
        auto kernel = unit ? wide_norm<true> : wide_norm<false>;
        kernel<<<rows, WIDE_THREADS, 0, (cudaStream_t)stream>>>((const __nv_bfloat16 *)x, scale, shift, *norm_runs, eps,
                                                                (__nv_fp8_e4m3 *)out, unit, row_scale);
        LQ_LAUNCHED();
    }
    auto go = [&](auto x_type, auto out_type) {
        return residual_norm_with<decltype(x_type), decltype(out_type)>(y != nullptr, scale != nullptr, x, y, gate,
                                                                        gate_runs, scale, shift, norm_runs, eps, out,
                                                                        unit, row_scale, rows, width,
                                                                        (cudaStream_t)stream);
    };
    auto with = [&](auto x_type) {
        if (out_kind == F32) return go(x_type, float{});
        if (out_kind == BF16) return go(x_type, __nv_bfloat16{});
        return go(x_type, __nv_fp8_e4m3{});
    };
    return x_kind == F32 ? with(float{}) : with(__nv_bfloat16{});
}

int lq_norm_rotate(int out_kind, const Lanes *lanes, int count, int stride, const float *table, int head,
                   const int *offset, float eps, int rows, int width, void *stream) {
    const int threads = threads_for(width);
    if (!threads || head % 8 || count < 1 || count > 3) return cudaErrorInvalidValue;
    const bool wide = out_kind == E4M3 && width == WIDE && head == WIDE_HEAD;
    Lanes turned{}, others{};
    int turns = 0, left = 0;
    for (int i = 0; i < count; i++) {
        const Lane &lane = lanes->lane[i];
        if (wide && lane.weight && lane.rotate) turned.lane[turns++] = lane;
        else others.lane[left++] = lane;
    }
    if (turns)
        wide_norm_rotate<<<dim3(rows, turns), TURN_THREADS, 0, (cudaStream_t)stream>>>(turned, stride, table, offset,
                                                                                       eps);
    if (!left) LQ_LAUNCHED();
    auto go = [&](auto kernel) {
        kernel<<<dim3(rows, left), threads, 0, (cudaStream_t)stream>>>(others, stride, table, head, offset, eps, width);
    };
    return with_held(width, [&](auto held) {
        if (out_kind == BF16) go(norm_rotate<held(), __nv_bfloat16>);
        else go(norm_rotate<held(), __nv_fp8_e4m3>);
    });
}

int lq_quantise(int gelu, const void *x, void *out, const float *unit, float *row_scale, int rows, int width,
                void *stream) {
    const int threads = threads_for(width);
    if (!threads) return cudaErrorInvalidValue;
    auto go = [&](auto kernel) {
        kernel<<<rows, threads, 0, (cudaStream_t)stream>>>((const __nv_bfloat16 *)x, (__nv_fp8_e4m3 *)out, unit,
                                                           row_scale, width);
    };
    return with_held(width, [&](auto held) {
        if (gelu) go(quantise<held(), true>);
        else go(quantise<held(), false>);
    });
}

int lq_bounds(const void *weight, const float *worth, const void *bias, const float *scale, const float *shift,
              const float *unit, float *out, int runs, int outputs, int width, void *stream) {
    if (runs < 1 || outputs < 1 || outputs % OUTPUTS || width < 8 || width % 8) return cudaErrorInvalidValue;
    bounds<<<dim3(outputs / OUTPUTS, runs), 128, 0, (cudaStream_t)stream>>>(
        (const __nv_fp8_e4m3 *)weight, worth, (const __nv_bfloat16 *)bias, scale, shift, unit, out, width, outputs);
    LQ_LAUNCHED();
}

int lq_few_keys(int out_kind, const void *q, const void *weight, const void *keys, const void *values, void *out,
                float *row_scale, int rows, int groups, int count, int head, int width, float eps, void *stream) {
    const int threads = threads_for(width);
    const int lanes = head / 8;
    if (!threads || count < 1 || count > MOST_KEYS || groups < 1 || rows % groups || head < 8 || head % 8 ||
        width % head || lanes > 32 || (lanes & (lanes - 1)))
        return cudaErrorInvalidValue;
    return with_held(width, [&](auto held) {
        auto go = [&](auto type) {
            using Out = decltype(type);
            few_keys<held(), Out><<<rows, threads, 0, (cudaStream_t)stream>>>(
                (const __nv_bfloat16 *)q, (const __nv_bfloat16 *)weight, (const __nv_bfloat16 *)keys,
                (const __nv_bfloat16 *)values, (Out *)out, row_scale, rows / groups, count, lanes, width, eps,
                1.f / sqrtf((float)head));
        };
        if (out_kind == BF16) go(__nv_bfloat16{});
        else go(__nv_fp8_e4m3{});
    });
}
}
