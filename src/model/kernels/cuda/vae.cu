// What stands between the convolutions of the video autoencoder. Video is [frames, pixels, channels] in bf16.
#include "common.cuh"

#include <cuda_pipeline.h>

using namespace lq;
typedef __nv_bfloat16 bf16;

namespace {

// Vectors of eight that a lane holds of one pixel, and threads of a block that passes over video.
constexpr int EACH = 3, THREADS = 128;

// How the first summand lies: as `vae.rs` has it (`Form`).
enum Form : int { FRAMES, QUARTERS, PRODUCTS };

// a ± b, of eight: rounded once, and so are sums in f32 that are rounded then (24 bits are no fewer than 2 · 8 + 2).
template <bool LESS> __device__ __forceinline__ void store_sum(bf16 *to, const uint4 &a, const uint4 &b) {
    uint4 o;
    auto *first = (const __nv_bfloat162 *)&a, *second = (const __nv_bfloat162 *)&b;
#pragma unroll
    for (int j = 0; j < 4; j++)
        ((__nv_bfloat162 *)&o)[j] = LESS ? __hsub2(first[j], second[j]) : __hadd2(first[j], second[j]);
    *(uint4 *)to = o;
}

__device__ __forceinline__ void unpack(const uint4 &raw, float v[8]) { load8((const bf16 *)&raw, v); }

// v / (1 + e^−v) for |v| ≤ TAME, where no step leaves what f32 holds: without the exceptions of a division, and the same
// bits once it is rounded to bf16.
constexpr float TAME = 80.f;
__device__ __forceinline__ float silu(float v) {
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(v * -1.4426950408889634f));
    const float d = 1.f + e;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(d));
    const float q = v * r, over = __fmaf_rn(q, d, -v);
    return __fmaf_rn(-over, r, q);
}

struct Pass {
    const bf16 *x, *y;   // summed; `y` may be null
    const float *bias;   // [channels], added; may be null
    bf16 *sum;           // where the sum goes; may be null
    const float *gain;   // [channels] with √channels in it; null: no norm
    bf16 *out;           // [past + frames, pixels, channels], or [4, frames/2, pixels, channels]; may be null
    bf16 *cache;         // [past, pixels, channels]: read as what came before, replaced by what now came last
    int frames, past, pixels, channels, bend;   // bend: 1 SiLU, 2 ReLU
    int width;           // of the picture
};

// Frames that go together, and how many are read for them.
constexpr int step(int form, bool paired) { return paired || form == PRODUCTS ? 2 : 1; }
constexpr int parts(int form, bool paired) { return form == PRODUCTS ? 4 : step(form, paired); }

// Sum, RMS norm over channels, SiLU or ReLU, and the causal past in front: all that lies between two convolutions in one pass.
// `LANES` lanes share a pixel and walk through its frames, so that a cache can be read and replaced by the same lane. While
// they work on a frame or a pair, the next is on its way into shared memory, where a thread reads what it asked for itself.
//
// When `PAIRED`, the next convolution gives frames by pairs (`Convolution::paired`): instead of a pair's two frames and the
// two before them, d0 … d3, it gets d0 − d2, d1 + d2, d2 − d1 and d1 − d3. They are made of what is stored elsewhere, so
// that where a video is cut makes no difference. The products of such a convolution, m0 … m3, are summed when they are
// read: a pair is m0 + m1 + m2 and m1 − m2 − m3.
template <int LANES, int FORM, bool PAIRED> __global__ void __launch_bounds__(THREADS, 4) pass(Pass p) {
    constexpr int STEP = step(FORM, PAIRED), PARTS = parts(FORM, PAIRED);
    const int lane = threadIdx.x % LANES;
    const int pixel = (blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (pixel >= p.pixels) return;
    const unsigned mates = LANES == 32 ? ~0u : ((1u << LANES) - 1) << ((threadIdx.x & 31) / LANES * LANES);
    const int vectors = p.channels / 8;
    const size_t plane = (size_t)p.pixels * p.channels, at = (size_t)pixel * p.channels + lane * 8;
    constexpr int NEXT = LANES * 8;
    bool has[EACH];
#pragma unroll
    for (int k = 0; k < EACH; k++) has[k] = lane + k * LANES < vectors;
    // The pixel's place in a frame of `x`, and from frame to frame.
    size_t from = at, far = plane;
    if (FORM == QUARTERS) {
        // A small picture's windows, one more than it has rows and columns; each gives the four pixels around its middle.
        const int row = pixel / p.width, column = pixel % p.width, wide = p.width / 2 + 1;
        const size_t window = (size_t)(row + 1) / 2 * wide + (column + 1) / 2;
        from = (window * 4 + row % 2 * 2 + column % 2) * p.channels + lane * 8;
        far = (size_t)(p.pixels / p.width / 2 + 1) * wide * 4 * p.channels;
    }
    const size_t group = p.frames / 2 * plane;
    uint4 d0[EACH], d1[EACH];
    // A normed value is no larger than its gain.
    bool tame = p.bend == 1 && p.gain;
#pragma unroll
    for (int k = 0; k < EACH; k++) {
        if (!has[k]) continue;
        if (PAIRED) {
            d0[k] = *(const uint4 *)(p.cache + at + k * NEXT);
            d1[k] = *(const uint4 *)(p.cache + plane + at + k * NEXT);
        }
        if (p.gain) {
            float g[8];
            load8(p.gain + lane * 8 + k * NEXT, g);
#pragma unroll
            for (int j = 0; j < 8; j++) tame = tame && fabsf(g[j]) <= TAME;
        }
    }
    for (int f = 0; !PAIRED && f < p.past; f++) {
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            if (has[k]) {
                const size_t here = f * plane + at + k * NEXT;
                const uint4 old = *(const uint4 *)(p.cache + here);
                *(uint4 *)(p.out + here) = old;
                // What moves forward when fewer frames come than are remembered.
                const int to = f - p.frames;
                if (to >= 0) *(uint4 *)(p.cache + to * plane + at + k * NEXT) = old;
            }
        }
    }
    const bf16 *x = p.x + from, *y = p.y + at;
    const size_t apart = FORM == PRODUCTS ? group : far, onward = FORM == PRODUCTS ? plane : STEP * far;
    extern __shared__ uint4 stage[];
    auto slot = [&](int n) { return stage + n * THREADS + threadIdx.x; };
    auto fetch = [&]() {
#pragma unroll
        for (int s = 0; s < PARTS; s++)
#pragma unroll
            for (int k = 0; k < EACH; k++)
                if (has[k]) __pipeline_memcpy_async(slot(s * EACH + k), x + s * apart + k * NEXT, 16);
        if (p.y) {
#pragma unroll
            for (int s = 0; s < STEP; s++)
#pragma unroll
                for (int k = 0; k < EACH; k++)
                    if (has[k]) __pipeline_memcpy_async(slot((PARTS + s) * EACH + k), y + s * plane + k * NEXT, 16);
        }
        x += onward, y += STEP * plane;
        __pipeline_commit();
    };
    fetch();
    for (int f = 0; f < p.frames; f += STEP) {
        __pipeline_wait_prior(0);
        auto part = [&](int s, int k) { return has[k] ? *slot(s * EACH + k) : uint4{}; };
        auto other = [&](int s, int k) { return has[k] ? *slot((PARTS + s) * EACH + k) : uint4{}; };
        uint4 all[STEP][EACH];
        float square[STEP];
#pragma unroll
        for (int s = 0; s < STEP; s++) square[s] = 0.f;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            float v[STEP][8], more[8];
            unpack(part(0, k), v[0]);
            if (FORM == PRODUCTS) {
                float m2[8], m3[8];
                unpack(part(1, k), more), unpack(part(2, k), m2), unpack(part(PARTS - 1, k), m3);
#pragma unroll
                for (int j = 0; j < 8; j++) v[0][j] += more[j] + m2[j], v[STEP - 1][j] = more[j] - m2[j] - m3[j];
            } else if (STEP == 2) {
                unpack(part(STEP - 1, k), v[STEP - 1]);
            }
            if (p.y) {
#pragma unroll
                for (int s = 0; s < STEP; s++) {
                    unpack(other(s, k), more);
#pragma unroll
                    for (int j = 0; j < 8; j++) v[s][j] += more[j];
                }
            }
            if (p.bias && has[k]) {
                load8(p.bias + lane * 8 + k * NEXT, more);
#pragma unroll
                for (int s = 0; s < STEP; s++)
#pragma unroll
                    for (int j = 0; j < 8; j++) v[s][j] += more[j];
            }
            // The norm sees what is stored.
#pragma unroll
            for (int s = 0; s < STEP; s++) {
                store8((bf16 *)&all[s][k], v[s]);
                load8((const bf16 *)&all[s][k], v[s]);
#pragma unroll
                for (int j = 0; j < 8; j++) square[s] += v[s][j] * v[s][j];
                if (p.sum && has[k]) *(uint4 *)(p.sum + (f + s) * plane + at + k * NEXT) = all[s][k];
            }
        }
        if (f + STEP < p.frames) fetch();
        if (!p.out) continue;
        float scale[STEP];
#pragma unroll
        for (int s = 0; s < STEP; s++) {
            scale[s] = 1.f;
            if (p.gain) {
#pragma unroll
                for (int o = LANES / 2; o > 0; o >>= 1) square[s] += __shfl_xor_sync(mates, square[s], o);
                scale[s] = 1.f / fmaxf(sqrtf(square[s]), 1e-12f);
            }
        }
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            if (!has[k]) continue;
            float g[8];
            if (p.gain) load8(p.gain + lane * 8 + k * NEXT, g);
            uint4 d[STEP];
#pragma unroll
            for (int s = 0; s < STEP; s++) {
                float v[8];
                load8((const bf16 *)&all[s][k], v);
                if (p.gain) {
#pragma unroll
                    for (int j = 0; j < 8; j++) v[j] *= scale[s] * g[j];
                }
                if (tame) {
#pragma unroll
                    for (int j = 0; j < 8; j++) v[j] = silu(v[j]);
                } else if (p.bend == 1) {
#pragma unroll
                    for (int j = 0; j < 8; j++) v[j] = v[j] / (1.f + __expf(-v[j]));
                } else if (p.bend == 2) {
#pragma unroll
                    for (int j = 0; j < 8; j++) v[j] = fmaxf(v[j], 0.f);
                }
                store8((bf16 *)&d[s], v);
                const int to = f + s - p.frames + p.past;
                if (to >= 0) *(uint4 *)(p.cache + to * plane + at + k * NEXT) = d[s];
            }
            const size_t here = at + k * NEXT;
            if (PAIRED) {
                bf16 *to = p.out + f / 2 * plane + here;
                store_sum<true>(to, d0[k], d[0]);
                store_sum<false>(to + group, d1[k], d[0]);
                store_sum<true>(to + 2 * group, d[0], d1[k]);
                store_sum<true>(to + 3 * group, d1[k], d[STEP - 1]);
                d0[k] = d[0], d1[k] = d[STEP - 1];
            } else {
#pragma unroll
                for (int s = 0; s < STEP; s++) *(uint4 *)(p.out + (size_t)(p.past + f + s) * plane + here) = d[s];
            }
        }
    }
}

// Channels [halves, channels] unfold into `halves` frames; rows and columns are doubled by repeating if `doubled`. One
// thread per vector.
__global__ void __launch_bounds__(256)
    spread(const bf16 *x, const bf16 *y, const float *bias, bf16 *out, int frames, int height, int width, int channels,
           int halves, int doubled) {
    const size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int vectors = channels / 8, all = vectors * halves;
    if (n >= (size_t)frames * height * width * all) return;
    const int i = n % all;
    const size_t pixel = n / all;
    const int column = pixel % width, row = pixel / width % height, frame = pixel / width / height;
    float v[8];
    load8(x + n * 8, v);
    if (y) {
        float more[8];
        load8(y + n * 8, more);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] += more[j];
    }
    if (bias) {
        float more[8];
        load8(bias + i * 8, more);
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] += more[j];
    }
    const int half = i / vectors, c = i % vectors * 8;
    const int times = doubled ? 2 : 1;
    const size_t base = (((size_t)frame * halves + half) * times * height + times * row) * times * width + times * column;
    bf16 *to = out + base * channels + c;
    store8(to, v);
    if (!doubled) return;
    store8(to + channels, v);
    store8(to + (size_t)2 * width * channels, v);
    store8(to + (size_t)2 * width * channels + channels, v);
}

constexpr int LATENT = 16;

// Latents [16, frames, pixels] in f32 through a matrix [16, 16] (statistics and the 1×1×1 convolution in one) to
// [2 + frames, pixels, 16] with the past in front.
__global__ void __launch_bounds__(128)
    latents(const float *z, const float *matrix, const float *bias, bf16 *out, bf16 *cache, int frames, int pixels) {
    __shared__ float m[LATENT * LATENT], b[LATENT];
    for (int i = threadIdx.x; i < LATENT * LATENT; i += blockDim.x) m[i] = matrix[i];
    if (threadIdx.x < LATENT) b[threadIdx.x] = bias[threadIdx.x];
    __syncthreads();
    const int pixel = blockIdx.x * blockDim.x + threadIdx.x;
    if (pixel >= pixels) return;
    const size_t plane = (size_t)pixels * LATENT, at = (size_t)pixel * LATENT;
    for (int f = 0; f < 2; f++)
        for (int k = 0; k < LATENT; k += 8) {
            const uint4 old = *(const uint4 *)(cache + f * plane + at + k);
            *(uint4 *)(out + f * plane + at + k) = old;
            if (f - frames >= 0) *(uint4 *)(cache + (f - frames) * plane + at + k) = old;
        }
    for (int f = 0; f < frames; f++) {
        float v[LATENT];
        for (int c = 0; c < LATENT; c++) v[c] = z[((size_t)c * frames + f) * pixels + pixel];
        for (int k = 0; k < LATENT; k += 8) {
            float o[8];
#pragma unroll
            for (int j = 0; j < 8; j++) {
                o[j] = b[k + j];
#pragma unroll
                for (int c = 0; c < LATENT; c++) o[j] += m[(k + j) * LATENT + c] * v[c];
            }
            store8(out + (size_t)(2 + f) * plane + at + k, o);
            if (f - frames + 2 >= 0) store8(cache + (size_t)(f - frames + 2) * plane + at + k, o);
        }
    }
}

// Three of eight channels as planes [3, frames, pixels] in −1…1.
__global__ void __launch_bounds__(256) planes(const bf16 *y, const float *bias, float *out, int frames, int pixels) {
    const size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x, all = (size_t)frames * pixels;
    if (n >= all) return;
    float v[8];
    load8(y + n * 8, v);
#pragma unroll
    for (int c = 0; c < 3; c++) out[c * all + n] = fminf(fmaxf(v[c] + bias[c], -1.f), 1.f);
}

// −1…1 to a byte, to nearest, as `model::picture::i420` does it; what is not a number becomes black.
__device__ __forceinline__ int level(float v) {
    return v == v ? (int)__fadd_rn(__fmul_rn(fminf(fmaxf(v, -1.f), 1.f), 127.5f), 128.f) : 0;
}

// Planar YUV 4:2:0, BT.601 limited range, in the fixed point of `codec::colour`: a frame is Y [height, width], then U and
// V [height/2, width/2]. One thread per 2×2 pixels.
__global__ void __launch_bounds__(256)
    i420(const bf16 *y, const float *bias, uint8_t *out, int frames, int height, int width) {
    const int w2 = width / 2, h2 = height / 2;
    const size_t n = (size_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (n >= (size_t)frames * h2 * w2) return;
    const int column = n % w2, row = n / w2 % h2;
    const size_t frame = n / w2 / h2, pixels = (size_t)height * width;
    uint8_t *to = out + frame * (pixels + 2 * (size_t)h2 * w2);
    int sum[3] = {0, 0, 0};
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const size_t pixel = (size_t)(2 * row + k / 2) * width + 2 * column + k % 2;
        float v[8];
        load8(y + (frame * pixels + pixel) * 8, v);
        const int r = level(v[0] + bias[0]), g = level(v[1] + bias[1]), b = level(v[2] + bias[2]);
        sum[0] += r, sum[1] += g, sum[2] += b;
        to[pixel] = (16829 * r + 33039 * g + 6416 * b + (16 << 16) + (1 << 15)) >> 16;
    }
    uint8_t *chroma = to + pixels + (size_t)row * w2 + column;
    chroma[0] = (-9714 * sum[0] - 19071 * sum[1] + 28785 * sum[2] + (128 << 18) + (1 << 17)) >> 18;
    chroma[(size_t)h2 * w2] = (28784 * sum[0] - 24103 * sum[1] - 4681 * sum[2] + (128 << 18) + (1 << 17)) >> 18;
}

// Softmax of rows of f32 that stand `step` apart, as bf16 rows the same distance apart; `scale` is applied first.
__global__ void __launch_bounds__(512) softmax(const float *x, bf16 *out, int columns, int step, float scale) {
    __shared__ float room[32];
    const float *row = x + (size_t)blockIdx.x * step;
    bf16 *to = out + (size_t)blockIdx.x * step;
    float most = -INFINITY;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) most = fmaxf(most, row[i]);
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) most = fmaxf(most, __shfl_xor_sync(~0u, most, o));
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = most;
    __syncthreads();
    most = room[0];
    for (int i = 1; i < blockDim.x / 32; i++) most = fmaxf(most, room[i]);
    __syncthreads();
    float sum[1] = {0.f};
    for (int i = threadIdx.x; i < columns; i += blockDim.x) sum[0] += __expf((row[i] - most) * scale);
    over_block<Sum>(sum, room);
    const float inverse = 1.f / sum[0];
    for (int i = threadIdx.x; i < columns; i += blockDim.x) to[i] = __float2bfloat16_rn(__expf((row[i] - most) * scale) * inverse);
}

inline unsigned blocks(size_t n, int threads) { return (unsigned)((n + threads - 1) / threads); }

template <int LANES, int FORM, bool PAIRED> void start(const Pass &p, cudaStream_t s) {
    // At most 36 KB: what every card gives without being asked.
    const size_t room = (parts(FORM, PAIRED) + (p.y ? step(FORM, PAIRED) : 0)) * EACH * THREADS * sizeof(uint4);
    pass<LANES, FORM, PAIRED><<<blocks((size_t)p.pixels * LANES, THREADS), THREADS, room, s>>>(p);
}

template <int FORM, bool PAIRED> void launch(const Pass &p, cudaStream_t s) {
    const int need = (p.channels / 8 + EACH - 1) / EACH;
    if (need <= 4) start<4, FORM, PAIRED>(p, s);
    else if (need <= 8) start<8, FORM, PAIRED>(p, s);
    else if (need <= 16) start<16, FORM, PAIRED>(p, s);
    else start<32, FORM, PAIRED>(p, s);
}

} // namespace

extern "C" {

// See `pass`. 1 when channels do not fit (a multiple of 8, at most 768), or frames that go by pairs.
int lq_vae_pass(const void *x, const void *y, const float *bias, void *sum, const float *gain, void *out, void *cache,
                int frames, int past, int height, int width, int channels, int bend, int form, int paired, void *stream) {
    if (channels % 8 || channels > 8 * EACH * 32) return 1;
    if (frames < 1 || frames % step(form, paired) || paired && past != 2) return 1;
    Pass p{(const bf16 *)x, (const bf16 *)y, bias, (bf16 *)sum, gain, (bf16 *)out, (bf16 *)cache,
           frames, past, height * width, channels, bend, width};
    auto s = (cudaStream_t)stream;
    if (form == QUARTERS) paired ? launch<QUARTERS, true>(p, s) : launch<QUARTERS, false>(p, s);
    else if (form == PRODUCTS) paired ? launch<PRODUCTS, true>(p, s) : launch<PRODUCTS, false>(p, s);
    else paired ? launch<FRAMES, true>(p, s) : launch<FRAMES, false>(p, s);
    LQ_LAUNCHED();
}

int lq_vae_spread(const void *x, const void *y, const float *bias, void *out, int frames, int height, int width,
                  int channels, int halves, int doubled, void *stream) {
    if (channels % 8) return 1;
    const size_t n = (size_t)frames * height * width * (channels / 8) * halves;
    spread<<<blocks(n, 256), 256, 0, (cudaStream_t)stream>>>((const bf16 *)x, (const bf16 *)y, bias, (bf16 *)out, frames,
                                                           height, width, channels, halves, doubled);
    LQ_LAUNCHED();
}

int lq_vae_latents(const float *z, const float *matrix, const float *bias, void *out, void *cache, int frames, int pixels,
                   void *stream) {
    latents<<<blocks(pixels, 128), 128, 0, (cudaStream_t)stream>>>(z, matrix, bias, (bf16 *)out, (bf16 *)cache, frames, pixels);
    LQ_LAUNCHED();
}

int lq_vae_planes(const void *y, const float *bias, float *out, int frames, int pixels, void *stream) {
    planes<<<blocks((size_t)frames * pixels, 256), 256, 0, (cudaStream_t)stream>>>((const bf16 *)y, bias, out, frames, pixels);
    LQ_LAUNCHED();
}

int lq_vae_i420(const void *y, const float *bias, void *out, int frames, int height, int width, void *stream) {
    if (height % 2 || width % 2) return 1;
    i420<<<blocks((size_t)frames * height * width / 4, 256), 256, 0, (cudaStream_t)stream>>>((const bf16 *)y, bias,
                                                                                       (uint8_t *)out, frames, height, width);
    LQ_LAUNCHED();
}

int lq_vae_softmax(const float *x, void *out, int rows, int columns, int step, float scale, void *stream) {
    softmax<<<rows, 512, 0, (cudaStream_t)stream>>>(x, (bf16 *)out, columns, step, scale);
    LQ_LAUNCHED();
}
}
