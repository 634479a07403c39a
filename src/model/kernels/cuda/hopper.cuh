// Instructions that only Hopper has (sm_90a): barriers that copies arrive at, copies by the tensor memory accelerator, and
// products of a warp group whose operands lie in shared memory.
#pragma once
#include "common.cuh"

#include <cudaTypedefs.h>

namespace lq {

__device__ __forceinline__ uint32_t shared_address(const void *p) { return (uint32_t)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(uint64_t *b, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t *b) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t *b, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t *b, uint32_t parity) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" ::"r"(shared_address(b)),
                 "r"(parity)
                 : "memory");
}
__device__ __forceinline__ void copy_tile(void *to, const CUtensorMap *map, int column, int row, uint64_t *full) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
                 "[%4];" ::"r"(shared_address(to)),
                 "l"(map), "r"(column), "r"(row), "r"(shared_address(full))
                 : "memory");
}

// Bytes that lie together in memory.
__device__ __forceinline__ void copy_run(void *to, const void *from, int bytes, uint64_t *full) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(full))
                 : "memory");
}

// Operands in shared memory for wgmma. Rows: of 128 bytes in the swizzle of 128 bytes, groups of eight rows
// 1024 apart. Halves: the same, multiplied along their rows, whose other 64 channels are APART bytes away. Blocks: of eight
// channels by 16 keys, 128 bytes each; the next channels' follows, the next keys' is 2048 away. The low half names the place
// in units of 16 bytes, and the step between two blocks, or halves, in a row of them.
__device__ __forceinline__ uint32_t place_of(const void *p) { return (shared_address(p) & 0x3ffff) >> 4; }
__device__ __forceinline__ uint32_t rows_at(const void *p) { return place_of(p) | 1 << 16; }
template <int APART> __device__ __forceinline__ uint32_t halves_at(const void *p) { return place_of(p) | APART / 16 << 16; }
__device__ __forceinline__ uint32_t blocks_at(const void *p) { return place_of(p) | (2048 >> 4) << 16; }
__device__ __forceinline__ uint64_t rows_of(uint32_t low) { return low | (uint64_t)(1 << 30 | 1024 >> 4) << 32; }
__device__ __forceinline__ uint64_t blocks_of(uint32_t low) { return low | (uint64_t)(128 >> 4) << 32; }

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
// Keeps the compiler from moving reads or writes of these registers over the wait before.
template <int N> __device__ __forceinline__ void pin(float (&r)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N> __device__ __forceinline__ void pin(uint32_t (&r)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(r[i])::"memory");
}

#define LQ_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define LQ_16(d, i) LQ_4(d, i), LQ_4(d, i + 4), LQ_4(d, i + 8), LQ_4(d, i + 12)
#define LQ_40                                                                                                            \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,"  \
    "%31,%32,%33,%34,%35,%36,%37,%38,%39"
#define LQ_48 LQ_40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define LQ_64 LQ_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d (+)= a · bᵀ over 32 bytes of each row: 64 queries x 96 keys, both from shared memory.
template <int ADD> __device__ __forceinline__ void product(float (&d)[48], uint32_t a, uint32_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n96k32.f32.e4m3.e4m3 {" LQ_48 "}, %48, %49, %50, 1, 1;"
                 : LQ_16(d, 0), LQ_16(d, 16), LQ_16(d, 32)
                 : "l"(rows_of(a)), "l"(rows_of(b)), "n"(ADD));
}
// d += a · b over 32 keys: 64 queries x 128 channels, a from registers.
__device__ __forceinline__ void product(float (&d)[64], const uint32_t *a, uint32_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" LQ_64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1;"
                 : LQ_16(d, 0), LQ_16(d, 16), LQ_16(d, 32), LQ_16(d, 48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(blocks_of(b)));
}

// d (+)= a · bᵀ over 16 channels in bf16: 64 queries x 80 keys, both from shared memory.
template <int ADD> __device__ __forceinline__ void product16(float (&d)[40], uint32_t a, uint32_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n80k16.f32.bf16.bf16 {" LQ_40 "}, %40, %41, %42, 1, 1, 0, 0;"
                 : LQ_16(d, 0), LQ_16(d, 16), LQ_4(d, 32), LQ_4(d, 36)
                 : "l"(rows_of(a)), "l"(rows_of(b)), "n"(ADD));
}
// d += a · b over 16 keys in bf16: 64 queries x 128 channels, a from registers, b in halves.
__device__ __forceinline__ void product16(float (&d)[64], const uint32_t *a, uint32_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" LQ_64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : LQ_16(d, 0), LQ_16(d, 16), LQ_16(d, 32), LQ_16(d, 48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(rows_of(b)));
}

// A matrix as the accelerator sees it, rows `stride` bytes apart, in boxes of 128 bytes of `box` rows.
inline int tiles_of(CUtensorMap *map, CUtensorMapDataType type, const void *at, uint64_t columns, uint64_t rows, uint64_t stride,
                    uint32_t box) {
    static PFN_cuTensorMapEncodeTiled_v12000 encode = [] {
        void *found = nullptr;
        cudaDriverEntryPointQueryResult how;
        if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &how) != cudaSuccess)
            found = nullptr;
        return (PFN_cuTensorMapEncodeTiled_v12000)found;
    }();
    if (!encode) return cudaErrorNotSupported;
    const cuuint64_t sizes[2] = {columns, rows}, pitch[1] = {stride};
    const cuuint32_t boxes[2] = {type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 128u : 64u, box}, steps[2] = {1, 1};
    const CUresult done = encode(map, type, 2, const_cast<void *>(at), sizes, pitch, boxes, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return done == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

} // namespace lq
