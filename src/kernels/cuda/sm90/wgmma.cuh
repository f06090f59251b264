// Warpgroup matrix products (wgmma): d[64 x N] (+)= a[64 x 16] b[16 x N], fp32 accumulators, b in
// shared memory behind a descriptor, a in registers or behind a descriptor. Asynchronous: begin
// with wgmma_fence(), end with wgmma_commit(), and touch neither the accumulators nor a's registers
// before wgmma_wait().
#pragma once

#include <gdn/kernels/cuda/sm90/ptx.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Which dimension of an operand's tile is contiguous in shared memory: the summed one, or rows
/// (of a) and columns (of b).
enum class Major { kSummed = 0, kOuter = 1 };

/// Tiles are rows of 128 bytes, 64 16-bit elements, eight rows to a swizzle atom of 1,024 bytes, in
/// which 16-byte piece p of row r lies at piece p ^ (r % 8). `next_64` is the distance in bytes to
/// the tile of the next 64 elements of the contiguous outer dimension (Major::kOuter, N > 64).
__device__ __forceinline__ uint64_t swizzled_tile(uint32_t address, uint32_t next_64 = 16) {
  constexpr uint64_t kSwizzle128 = 1ULL << 62;
  constexpr uint64_t kAtomBytes = 1024;
  return kSwizzle128 | (kAtomBytes >> 4 << 32) | (static_cast<uint64_t>(next_64 >> 4) << 16) |
         ((address & 0x3ffffU) >> 4);
}

/// The same tile `bytes` further on.
__device__ __forceinline__ uint64_t advance(uint64_t tile, uint32_t bytes) {
  return tile + (bytes >> 4);
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

/// Waits until at most the last `kPending` committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

/// Keeps the compiler from moving uses of these registers across this point.
template <typename Register, int kCount>
__device__ __forceinline__ void pin(Register (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<Register, float>) {
      asm volatile("" : "+f"(registers[i])::"memory");
    } else {
      asm volatile("" : "+r"(registers[i])::"memory");
    }
  }
}

template <typename Register, int kRows, int kCount>
__device__ __forceinline__ void pin(Register (&registers)[kRows][kCount]) {
#pragma unroll
  for (int i = 0; i < kRows; ++i) pin(registers[i]);
}

// An asm statement takes its instruction as a literal and numbers its operands, so the register
// lists below are spelled out.
#define GDN_REGISTERS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define GDN_REGISTERS_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define GDN_REGISTERS_24                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23"
#define GDN_REGISTERS_32                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GDN_REGISTERS_64                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, " \
  "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, " \
  "%34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define GDN_OUT_8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define GDN_OUT_16(i) GDN_OUT_8(i), GDN_OUT_8(i + 8)
#define GDN_OUT_24(i) GDN_OUT_16(i), GDN_OUT_8(i + 16)
#define GDN_OUT_32(i) GDN_OUT_16(i), GDN_OUT_16(i + 16)
#define GDN_OUT_64(i) GDN_OUT_32(i), GDN_OUT_32(i + 32)

// COUNT accumulators per thread, then the numbers of the operands behind them.
#define GDN_WGMMA_A_REGISTERS(TYPE, N, COUNT, A, B, ACCUMULATE, MAJOR)                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                         \
               ", 0;\n"                                                               \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE        \
               " {" GDN_REGISTERS_##COUNT "}, {" A "}, " B ", p, 1, 1, " MAJOR ";\n}" \
               : GDN_OUT_##COUNT(0)                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), \
                 "n"(static_cast<int>(kMajor)))
#define GDN_WGMMA_A_SHARED(TYPE, N, COUNT, A, B, ACCUMULATE, MAJOR)                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " ACCUMULATE                          \
               ", 0;\n"                                                                \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE         \
               " {" GDN_REGISTERS_##COUNT "}, " A ", " B ", p, 1, 1, 0, " MAJOR ";\n}" \
               : GDN_OUT_##COUNT(0)                                                    \
               : "l"(a), "l"(b), "r"(accumulate), "n"(static_cast<int>(kMajor)))

/// a in registers: those of lane l of warp w hold rows 16 w + l / 4 (0, 2) and 8 further (1, 3),
/// columns 2 (l % 4) and the next (0, 1) and 8 further (2, 3): as two neighbouring 8-column pieces
/// of an accumulator do, packed.
template <typename Element, int N, Major kMajor = Major::kSummed>
__device__ __forceinline__ void wgmma(float* d, const uint32_t (&a)[4], uint64_t b,
                                      int accumulate) {
  static_assert(N == 16 || N == 32 || N == 48 || N == 64 || N == 128);
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
#define GDN_CASE(N_, COUNT, A, B, P, M) \
  if constexpr (N == N_) GDN_WGMMA_A_REGISTERS("bf16", N_, COUNT, A, B, P, M)
    GDN_CASE(16, 8, "%8, %9, %10, %11", "%12", "%13", "%14");
    GDN_CASE(32, 16, "%16, %17, %18, %19", "%20", "%21", "%22");
    GDN_CASE(48, 24, "%24, %25, %26, %27", "%28", "%29", "%30");
    GDN_CASE(64, 32, "%32, %33, %34, %35", "%36", "%37", "%38");
    GDN_CASE(128, 64, "%64, %65, %66, %67", "%68", "%69", "%70");
  } else {
#undef GDN_CASE
#define GDN_CASE(N_, COUNT, A, B, P, M) \
  if constexpr (N == N_) GDN_WGMMA_A_REGISTERS("f16", N_, COUNT, A, B, P, M)
    GDN_CASE(16, 8, "%8, %9, %10, %11", "%12", "%13", "%14");
    GDN_CASE(32, 16, "%16, %17, %18, %19", "%20", "%21", "%22");
    GDN_CASE(48, 24, "%24, %25, %26, %27", "%28", "%29", "%30");
    GDN_CASE(64, 32, "%32, %33, %34, %35", "%36", "%37", "%38");
    GDN_CASE(128, 64, "%64, %65, %66, %67", "%68", "%69", "%70");
  }
#undef GDN_CASE
}

/// a behind a descriptor, its summed dimension contiguous.
template <typename Element, int N, Major kMajor = Major::kSummed>
__device__ __forceinline__ void wgmma(float* d, uint64_t a, uint64_t b, int accumulate) {
  static_assert(N == 16 || N == 32 || N == 48 || N == 64 || N == 128);
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
#define GDN_CASE(N_, COUNT, A, B, P, M) \
  if constexpr (N == N_) GDN_WGMMA_A_SHARED("bf16", N_, COUNT, A, B, P, M)
    GDN_CASE(16, 8, "%8", "%9", "%10", "%11");
    GDN_CASE(32, 16, "%16", "%17", "%18", "%19");
    GDN_CASE(48, 24, "%24", "%25", "%26", "%27");
    GDN_CASE(64, 32, "%32", "%33", "%34", "%35");
    GDN_CASE(128, 64, "%64", "%65", "%66", "%67");
  } else {
#undef GDN_CASE
#define GDN_CASE(N_, COUNT, A, B, P, M) \
  if constexpr (N == N_) GDN_WGMMA_A_SHARED("f16", N_, COUNT, A, B, P, M)
    GDN_CASE(16, 8, "%8", "%9", "%10", "%11");
    GDN_CASE(32, 16, "%16", "%17", "%18", "%19");
    GDN_CASE(48, 24, "%24", "%25", "%26", "%27");
    GDN_CASE(64, 32, "%32", "%33", "%34", "%35");
    GDN_CASE(128, 64, "%64", "%65", "%66", "%67");
  }
#undef GDN_CASE
}

#undef GDN_WGMMA_A_REGISTERS
#undef GDN_WGMMA_A_SHARED
#undef GDN_REGISTERS_8
#undef GDN_OUT_8
#undef GDN_REGISTERS_16
#undef GDN_OUT_16
#undef GDN_REGISTERS_24
#undef GDN_OUT_24
#undef GDN_REGISTERS_32
#undef GDN_OUT_32
#undef GDN_REGISTERS_64
#undef GDN_OUT_64

}  // namespace gdn::kernels::cuda::sm90
