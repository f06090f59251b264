// How a warp of a scan writes what it holds in registers to global memory: it stages 2 KB in shared
// memory of its own and writes them with ordinary stores of 16 bytes a lane. No fence for the copy
// engine, which takes hundreds of cycles, and no meeting of warps.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/chunk_matrices.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/state.cuh>

namespace gdn::kernels::cuda::sm90 {

inline constexpr int kWarpStoreBytes = 16 * 128;  // 16 rows of a tile

/// 16 rows of 64 columns, operands `first` to `first` + 3, to `out`: as they lie in a tile in
/// shared memory, swizzled.
template <int kCount>
__device__ __forceinline__ void store_rows(const uint32_t (&operand)[kCount][4], int first,
                                           uint32_t staged, uint8_t* out, int lane, bool wanted) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint32_t(&matrices)[4] = operand[first + j];
    store_matrices(block_row(staged, 0, j, lane), matrices[0], matrices[1], matrices[2],
                   matrices[3]);
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const uint32_t offset = 16 * (32 * r + lane);
    store_global_16_bytes(out + offset, load_16_bytes(staged + offset), wanted);
  }
  __syncwarp();
}

/// A [16 of V, 64 tokens] piece, transposed, to rows of tokens: row(token) is where the warp's
/// first of V goes, of which there are `columns`. Staged as rows of 32 bytes, 16-byte pieces
/// swizzled so that eight rows lie in different banks.
template <typename Row>
__device__ __forceinline__ void store_tokens(const uint32_t (&packed)[4][4], uint32_t staged,
                                             int tokens, int columns, int lane, Row row) {
  const auto address = [&](int token, int piece) {
    return staged + static_cast<uint32_t>(token * 32 + ((piece ^ (token / 4 % 2)) << 4));
  };
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    const int matrix = lane / 8;
    store_matrices_transposed(address(16 * block + 8 * (matrix / 2) + lane % 8, matrix % 2),
                              packed[block][0], packed[block][1], packed[block][2],
                              packed[block][3]);
  }
  __syncwarp();
  const int column = 8 * (lane % 2);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int token = 16 * r + lane / 2;
    store_global_16_bytes(row(token) + column, load_16_bytes(address(token, lane % 2)),
                          token < tokens && column < columns);
  }
  __syncwarp();
}

}  // namespace gdn::kernels::cuda::sm90
