#include <ATen/ATen.h>
#include <ATen/autocast_mode.h>

#include <gdn/modules/autocast.h>

namespace gdn {

at::Tensor cast_for_autocast(const at::Tensor& x) {
  const auto device = x.device().type();
  if (!at::autocast::is_autocast_enabled(device) || x.scalar_type() == at::kDouble) return x;
  return x.to(at::autocast::get_autocast_dtype(device));
}

}  // namespace gdn
