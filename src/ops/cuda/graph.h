// Replaying work on a GPU, and reading its results while it goes on. In a build without CUDA the
// constructors throw.
#pragma once

#include <functional>
#include <memory>

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

namespace gdn::cuda {

/// A CUDA graph: what a function queues on a GPU, launched at once again and again.
class Graph {
 public:
  explicit Graph(c10::Device device);
  ~Graph();
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  /// Runs body, and then records what it queues when called once more. It must not wait for the
  /// GPU; replays read and write the tensors that it read and wrote.
  void capture(const std::function<void()>& body);
  /// Queues what was recorded on torch's current stream.
  void replay();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Copies a tensor from a GPU to the host while the GPU goes on.
class HostCopy {
 public:
  /// For tensors of this size and dtype.
  explicit HostCopy(const at::Tensor& like);
  ~HostCopy();
  HostCopy(const HostCopy&) = delete;
  HostCopy& operator=(const HostCopy&) = delete;

  /// Queues the copy on torch's current stream.
  void start(const at::Tensor& tensor);
  /// Waits for it, not for what was queued behind it. The result is valid until the next start().
  const at::Tensor& wait();

 private:
  struct State;
  at::Tensor host_;
  std::unique_ptr<State> state_;
};

}  // namespace gdn::cuda
