#include <cuda_runtime_api.h>

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAEvent.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/cuda/CUDAGuard.h>

#include <gdn/ops/cuda/graph.h>

namespace gdn::cuda {

struct Graph::State {
  c10::Device device;
  at::cuda::CUDAGraph graph;
};

Graph::Graph(c10::Device device) : state_(new State{.device = device, .graph = {}}) {}

Graph::~Graph() {
  // What was replayed may still run, and the graph owns its memory.
  const c10::cuda::CUDAGuard device(state_->device);
  c10::cuda::getCurrentCUDAStream().synchronize();
}

void Graph::capture(const std::function<void()>& body) {
  const c10::cuda::CUDAGuard device(state_->device);
  const c10::cuda::CUDAStream outer = c10::cuda::getCurrentCUDAStream();
  at::cuda::CUDAEvent before, after;
  before.record(outer);
  {
    // Capture needs a stream of its own. Work there is ordered between what the caller has queued
    // and what it will.
    const c10::cuda::CUDAStream side = c10::cuda::getStreamFromPool(false, state_->device.index());
    const c10::cuda::CUDAStreamGuard guard(side);
    before.block(side);
    body();
    state_->graph.capture_begin({0, 0}, cudaStreamCaptureModeThreadLocal);
    body();
    state_->graph.capture_end();
    after.record(side);
  }
  after.block(outer);
}

void Graph::replay() { state_->graph.replay(); }

struct HostCopy::State {
  at::cuda::CUDAEvent done;
};

HostCopy::HostCopy(const at::Tensor& like)
    : host_(at::empty(like.sizes(), like.options().device(at::kCPU).pinned_memory(true))),
      state_(new State) {}

HostCopy::~HostCopy() = default;

void HostCopy::start(const at::Tensor& tensor) {
  const c10::cuda::CUDAGuard device(tensor.device());
  host_.copy_(tensor, /*non_blocking=*/true);
  state_->done.record(c10::cuda::getCurrentCUDAStream());
}

const at::Tensor& HostCopy::wait() {
  state_->done.synchronize();
  return host_;
}

}  // namespace gdn::cuda
