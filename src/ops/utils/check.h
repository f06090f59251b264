// The one way in which operators and layers reject an argument.
#pragma once

#include <string>
#include <string_view>

#include <ATen/core/Tensor.h>

namespace gdn {

/// "float32 [2, 64, 4, 128] on cpu".
std::string describe(const at::Tensor& tensor);

/// Throws c10::ValueError (Python: ValueError) "OP: ARGUMENT must be EXPECTED, got GOT".
[[noreturn]] void reject(std::string_view op, std::string_view argument, std::string_view expected,
                         std::string_view got);

/// reject() with describe(tensor) unless its sizes are `sizes`; -1 stands for any size. `expected`
/// names the dimensions, as in "[B, T, HV, V]". Sizes may be symbolic, as under torch.compile.
void check_shape(std::string_view op, std::string_view argument, const at::Tensor& tensor,
                 c10::SymIntArrayRef sizes, std::string_view expected);

}  // namespace gdn
