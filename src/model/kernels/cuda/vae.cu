// What stands between the convolutions of the video autoencoder. Video is [frames, pixels, channels] in bf16.
#include "common.cuh"

using namespace lq;
typedef __nv_bfloat16 bf16;

namespace {

// Vectors of eight that a lane holds of one pixel.
constexpr int EACH = 3;

// How the first summand lies: as `vae.rs` has it (`Form`).
enum Form : int { FRAMES, QUARTERS, PRODUCTS };

// a + sign · b, of eight.
__device__ __forceinline__ void store_sum(bf16 *to, const uint4 &a, float sign, const uint4 &b) {
    float v[8], more[8];
    load8((const bf16 *)&a, v), load8((const bf16 *)&b, more);
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] += sign * more[j];
    store8(to, v);
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

// Sum, RMS norm over channels, SiLU or ReLU, and the causal past in front: all that lies between two convolutions in one pass.
// `LANES` lanes share a pixel and walk through its frames, so that a cache can be read and replaced by the same lane.
//
// When `PAIRED`, the next convolution gives frames by pairs (`Convolution::paired`): instead of a pair's two frames and the
// two before them, d0 … d3, it gets d0 − d2, d1 + d2, d2 − d1 and d1 − d3. They are made of what is stored elsewhere, so
// that where a video is cut makes no difference. The products of such a convolution, m0 … m3, are summed when they are
// read: a pair is m0 + m1 + m2 and m1 − m2 − m3.
template <int LANES, int FORM, bool PAIRED> __global__ void __launch_bounds__(256) pass(Pass p) {
    const int lane = threadIdx.x % LANES;
    const int pixel = (blockIdx.x * blockDim.x + threadIdx.x) / LANES;
    if (pixel >= p.pixels) return;
    const unsigned mates = LANES == 32 ? ~0u : ((1u << LANES) - 1) << ((threadIdx.x & 31) / LANES * LANES);
    const int vectors = p.channels / 8;
    const size_t plane = (size_t)p.pixels * p.channels, at = (size_t)pixel * p.channels;
    // The pixel's place in a frame of `x`, and from frame to frame.
    size_t from = at, step = plane;
    if (FORM == QUARTERS) {
        // A small picture's windows, one more than it has rows and columns; each gives the four pixels around its middle.
        const int row = pixel / p.width, column = pixel % p.width, wide = p.width / 2 + 1;
        const size_t window = (size_t)(row + 1) / 2 * wide + (column + 1) / 2;
        from = (window * 4 + row % 2 * 2 + column % 2) * p.channels;
        step = (size_t)(p.pixels / p.width / 2 + 1) * wide * 4 * p.channels;
    }
    const size_t group = p.frames / 2 * plane;
    uint4 d0[EACH], d1[EACH], d2[EACH];
    float second[EACH][8];
    if (PAIRED) {
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int i = lane + k * LANES;
            if (i < vectors) {
                d0[k] = *(const uint4 *)(p.cache + at + i * 8);
                d1[k] = *(const uint4 *)(p.cache + plane + at + i * 8);
            }
        }
    }
    for (int f = 0; !PAIRED && f < p.past; f++) {
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int i = lane + k * LANES;
            if (i < vectors) {
                const size_t here = f * plane + at + i * 8;
                *(uint4 *)(p.out + here) = *(const uint4 *)(p.cache + here);
                // What moves forward when fewer frames come than are remembered.
                const int to = f - p.frames;
                if (to >= 0) *(uint4 *)(p.cache + to * plane + at + i * 8) = *(const uint4 *)(p.cache + here);
            }
        }
    }
    for (int f = 0; f < p.frames; f++) {
        float v[EACH][8];
        float square = 0.f;
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int i = lane + k * LANES;
            if (i < vectors) {
                const size_t here = f * plane + at + i * 8;
                if (FORM != PRODUCTS) {
                    load8(p.x + f * step + from + i * 8, v[k]);
                } else if (f % 2 == 0) {
                    float m1[8], m2[8], m3[8];
                    const bf16 *m = p.x + f / 2 * plane + at + i * 8;
                    load8(m, v[k]), load8(m + group, m1), load8(m + 2 * group, m2), load8(m + 3 * group, m3);
#pragma unroll
                    for (int j = 0; j < 8; j++) v[k][j] += m1[j] + m2[j], second[k][j] = m1[j] - m2[j] - m3[j];
                } else {
#pragma unroll
                    for (int j = 0; j < 8; j++) v[k][j] = second[k][j];
                }
                if (p.y) {
                    float more[8];
                    load8(p.y + here, more);
#pragma unroll
                    for (int j = 0; j < 8; j++) v[k][j] += more[j];
                }
                if (p.bias) {
                    float more[8];
                    load8(p.bias + i * 8, more);
#pragma unroll
                    for (int j = 0; j < 8; j++) v[k][j] += more[j];
                }
                // The norm sees what is stored.
#pragma unroll
                for (int j = 0; j < 8; j++) v[k][j] = __bfloat162float(__float2bfloat16_rn(v[k][j]));
                if (p.sum) store8(p.sum + here, v[k]);
#pragma unroll
                for (int j = 0; j < 8; j++) square += v[k][j] * v[k][j];
            }
        }
        if (!p.out) continue;
        float scale = 1.f;
        if (p.gain) {
#pragma unroll
            for (int o = LANES / 2; o > 0; o >>= 1) square += __shfl_xor_sync(mates, square, o);
            scale = 1.f / fmaxf(sqrtf(square), 1e-12f);
        }
#pragma unroll
        for (int k = 0; k < EACH; k++) {
            const int i = lane + k * LANES;
            if (i < vectors) {
                if (p.gain) {
                    float g[8];
                    load8(p.gain + i * 8, g);
#pragma unroll
                    for (int j = 0; j < 8; j++) v[k][j] *= scale * g[j];
                }
                if (p.bend == 2) {
#pragma unroll
                    for (int j = 0; j < 8; j++) v[k][j] = fmaxf(v[k][j], 0.f);
                } else if (p.bend) {
#pragma unroll
                    for (int j = 0; j < 8; j++) v[k][j] = v[k][j] / (1.f + __expf(-v[k][j]));
                }
                const size_t here = at + i * 8;
                if (PAIRED) {
                    uint4 d3;
                    store8((bf16 *)&d3, v[k]);
                    bf16 *to = p.out + f / 2 * plane + here;
                    if (f % 2 == 0) {
                        d2[k] = d3;
                        store_sum(to, d0[k], -1.f, d2[k]);
                        store_sum(to + group, d1[k], 1.f, d2[k]);
                        store_sum(to + 2 * group, d2[k], -1.f, d1[k]);
                    } else {
                        store_sum(to + 3 * group, d1[k], -1.f, d3);
                        d0[k] = d2[k], d1[k] = d3;
                    }
                } else {
                    store8(p.out + (size_t)(p.past + f) * plane + here, v[k]);
                }
                const int to = f - p.frames + p.past;
                if (to >= 0) store8(p.cache + to * plane + here, v[k]);
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

template <int FORM, bool PAIRED> void launch(const Pass &p, cudaStream_t s) {
    const int need = (p.channels / 8 + EACH - 1) / EACH;
    auto grid = [&](int lanes) { return blocks((size_t)p.pixels * lanes, 256); };
    if (need <= 1) pass<1, FORM, PAIRED><<<grid(1), 256, 0, s>>>(p);
    else if (need <= 2) pass<2, FORM, PAIRED><<<grid(2), 256, 0, s>>>(p);
    else if (need <= 4) pass<4, FORM, PAIRED><<<grid(4), 256, 0, s>>>(p);
    else if (need <= 8) pass<8, FORM, PAIRED><<<grid(8), 256, 0, s>>>(p);
    else if (need <= 16) pass<16, FORM, PAIRED><<<grid(16), 256, 0, s>>>(p);
    else pass<32, FORM, PAIRED><<<grid(32), 256, 0, s>>>(p);
}

} // namespace

extern "C" {

// See `pass`. 1 when channels do not fit (a multiple of 8, at most 768), or frames that go by pairs.
int lq_vae_pass(const void *x, const void *y, const float *bias, void *sum, const float *gain, void *out, void *cache,
                int frames, int past, int height, int width, int channels, int bend, int form, int paired, void *stream) {
    if (channels % 8 || channels > 8 * EACH * 32) return 1;
    if ((paired || form == PRODUCTS) && frames % 2 || paired && past != 2) return 1;
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
