// The log of what was chosen to serve a request.
#pragma once

#include <string_view>

namespace gdn {

/// Writes a choice to torch's log (TORCH_CPP_LOG_LEVEL=INFO), each distinct one once.
void log_choice(std::string_view name, std::string_view reason);

}  // namespace gdn
