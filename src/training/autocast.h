// bf16 autocast as a scope: matrix products in bf16 from fp32 weights.
#pragma once

#include <ATen/autocast_mode.h>

namespace gdn {

class Bf16Autocast {
 public:
  Bf16Autocast(bool on, c10::DeviceType device)
      : on_(on),
        device_(device),
        was_on_(at::autocast::is_autocast_enabled(device)),
        dtype_(at::autocast::get_autocast_dtype(device)) {
    if (!on_) return;
    at::autocast::set_autocast_enabled(device_, true);
    at::autocast::set_autocast_dtype(device_, at::kBFloat16);
    at::autocast::increment_nesting();
  }
  ~Bf16Autocast() {
    if (!on_) return;
    // The cache holds casts of weights, which the optimiser is about to change.
    if (at::autocast::decrement_nesting() == 0) at::autocast::clear_cache();
    at::autocast::set_autocast_enabled(device_, was_on_);
    at::autocast::set_autocast_dtype(device_, dtype_);
  }
  Bf16Autocast(const Bf16Autocast&) = delete;
  Bf16Autocast& operator=(const Bf16Autocast&) = delete;

 private:
  bool on_;
  c10::DeviceType device_;
  bool was_on_;
  at::ScalarType dtype_;
};

}  // namespace gdn
