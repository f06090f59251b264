#include <gdn/kernels/reference/element.h>
#include <gdn/kernels/reference/swiglu.h>

namespace gdn::kernels::reference {

template <typename Real>
void swiglu(const SwigluForward& p) {
  for (int64_t m = 0; m < p.M; ++m) {
    for (int64_t i = 0; i < p.D; ++i) {
      const Real gate = load_element<Real>(p.gate.data, p.dtype, m * p.gate.stride + i);
      const Real up = load_element<Real>(p.up.data, p.dtype, m * p.up.stride + i);
      store_element(p.y.data, p.dtype, m * p.y.stride + i, silu(gate) * up);
    }
  }
}

template <typename Real>
void swiglu_backward(const SwigluBackward& p) {
  for (int64_t m = 0; m < p.M; ++m) {
    for (int64_t i = 0; i < p.D; ++i) {
      const Real gate = load_element<Real>(p.gate.data, p.dtype, m * p.gate.stride + i);
      const Real up = load_element<Real>(p.up.data, p.dtype, m * p.up.stride + i);
      const Real d_y = load_element<Real>(p.d_y.data, p.dtype, m * p.d_y.stride + i);
      const Real d_gate = d_y * up * silu_gradient(gate);
      store_element(p.d_gate.data, p.dtype, m * p.d_gate.stride + i, d_gate);
      store_element(p.d_up.data, p.dtype, m * p.d_up.stride + i, d_y * silu(gate));
    }
  }
}

template void swiglu<float>(const SwigluForward&);
template void swiglu<double>(const SwigluForward&);
template void swiglu_backward<float>(const SwigluBackward&);
template void swiglu_backward<double>(const SwigluBackward&);

}  // namespace gdn::kernels::reference
