// What every CUDA kernel of this folder is given beside its parameter struct, and promises.
//
// The structs are those of the CPU kernels. Here all pointers of a problem are device memory,
// cu_seqlens too, and the work is queued on a stream: nothing waits for it. parallel_for is not
// used. Where a function takes `scratch`, it is that many bytes of device memory, aligned to 256,
// as the function of the same name with _scratch asks for; its contents mean nothing before and
// after. dtype is f32, bf16 or f16, arithmetic is fp32, and the same inputs give the same bits on
// every run: no sum depends on the order in which blocks run. A CUDA error is thrown as
// std::runtime_error with the kernel's name, a request that cannot be served as
// std::invalid_argument.
#pragma once

struct CUstream_st;

namespace gdn::kernels::cuda {

using Stream = CUstream_st*;

}  // namespace gdn::kernels::cuda
