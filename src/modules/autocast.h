// One cast for several linear maps of the same input.
#pragma once

#include <ATen/core/Tensor.h>

namespace gdn {

/// x in autocast's dtype where autocast is on, else x. Each linear map would cast, and keep for its
/// backward, a copy of its own.
at::Tensor cast_for_autocast(const at::Tensor& x);

}  // namespace gdn
