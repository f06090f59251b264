#include <sstream>

#include <c10/util/Exception.h>

#include <gdn/ops/utils/check.h>

namespace gdn {

std::string describe(const at::Tensor& tensor) {
  if (!tensor.defined()) return "no tensor";
  std::ostringstream text;
  text << c10::toString(tensor.scalar_type()) << " " << tensor.sym_sizes() << " on "
       << tensor.device();
  return text.str();
}

void reject(std::string_view op, std::string_view argument, std::string_view expected,
            std::string_view got) {
  TORCH_CHECK_VALUE(false, op, ": ", argument, " must be ", expected, ", got ", got);
}

void check_shape(std::string_view op, std::string_view argument, const at::Tensor& tensor,
                 c10::SymIntArrayRef sizes, std::string_view expected) {
  bool fits = tensor.defined() && tensor.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; fits && i < sizes.size(); ++i) {
    fits = sizes[i] == -1 || tensor.sym_size(static_cast<int64_t>(i)) == sizes[i];
  }
  if (!fits) {
    std::ostringstream text;
    text << "of shape " << expected << " = " << sizes;
    reject(op, argument, text.str(), describe(tensor));
  }
}

}  // namespace gdn
