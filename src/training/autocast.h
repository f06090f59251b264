// bf16 autocast as a scope: matrix products in bf16 from fp32 weights.
#pragma once

#include <ATen/autocast_mode.h>

namespace gdn {

class Bf16Autocast {
 public:
  explicit Bf16Autocast(bool on)
      : on_(on),
        was_on_(at::autocast::is_autocast_enabled(at::kCPU)),
        dtype_(at::autocast::get_autocast_dtype(at::kCPU)) {
    if (!on_) return;
    at::autocast::set_autocast_enabled(at::kCPU, true);
    at::autocast::set_autocast_dtype(at::kCPU, at::kBFloat16);
    at::autocast::increment_nesting();
  }
  ~Bf16Autocast() {
    if (!on_) return;
    // The cache holds casts of weights, which the optimiser is about to change.
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(at::kCPU, was_on_);
    at::autocast::set_autocast_dtype(at::kCPU, dtype_);
  }
  Bf16Autocast(const Bf16Autocast&) = delete;
  Bf16Autocast& operator=(const Bf16Autocast&) = delete;

 private:
  bool on_, was_on_;
  at::ScalarType dtype_;
};

}  // namespace gdn
