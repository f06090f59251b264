// Element types, strided views and work spreading: what every kernel's parameter struct is made of.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace gdn::kernels {

/// Element type behind an untyped pointer. f64 is understood by the reference kernels only.
enum class DType { f32, bf16, f16, f64 };

/// A [B, T, H, D] tensor in memory. The last dimension is contiguous; strides count elements.
template <typename Void>
struct View4 {
  Void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_t = 0;
  int64_t stride_h = 0;
};
using ConstView4 = View4<const void>;
using MutableView4 = View4<void>;

/// A [B, T, D] tensor in memory. The last dimension is contiguous; strides count elements.
template <typename Void>
struct View3 {
  Void* data = nullptr;
  int64_t stride_b = 0;
  int64_t stride_t = 0;
};
using ConstView3 = View3<const void>;
using MutableView3 = View3<void>;

/// An [M, D] tensor in memory. The last dimension is contiguous; the stride counts elements.
template <typename Void>
struct View2 {
  Void* data = nullptr;
  int64_t stride = 0;
};
using ConstView2 = View2<const void>;
using MutableView2 = View2<void>;

/// Reference to a callable that outlives the call it is passed to (std::function without the copy).
template <typename Signature>
class FunctionRef;

template <typename Result, typename... Args>
class FunctionRef<Result(Args...)> {
 public:
  template <typename Callable>
  requires(!std::is_same_v<std::remove_cvref_t<Callable>, FunctionRef>) FunctionRef(
      Callable&& callable)  // NOLINT(google-explicit-constructor): passed as an argument
      : object_(const_cast<void*>(static_cast<const void*>(std::addressof(callable)))),
        call_([](void* object, Args... args) -> Result {
          return (*static_cast<std::remove_reference_t<Callable>*>(object))(
              std::forward<Args>(args)...);
        }) {}

  Result operator()(Args... args) const { return call_(object_, std::forward<Args>(args)...); }

 private:
  void* object_;
  Result (*call_)(void*, Args...);
};

/// Calls body(begin, end) for disjoint ranges that cover [0, count), possibly from several threads
/// at once, and returns when all are done. No result may depend on how the ranges are cut.
using ParallelFor = void (*)(int64_t count, FunctionRef<void(int64_t begin, int64_t end)> body);

/// The ParallelFor of a single thread.
inline void serial_for(int64_t count, FunctionRef<void(int64_t begin, int64_t end)> body) {
  if (count > 0) body(0, count);
}

}  // namespace gdn::kernels
