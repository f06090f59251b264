// Intel's matrix unit (AMX, bf16): whether this machine has one, and whether it may be used.
#pragma once

namespace gdn::kernels::cpu {

/// Whether products go to the matrix unit: the processor has one, the system lets this process use
/// it, and nobody has forbidden it.
bool uses_matrix_unit();

/// For tests and measurements; not while kernels run.
void allow_matrix_unit(bool allowed);

}  // namespace gdn::kernels::cpu
