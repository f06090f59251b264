// What the commands that use a trained model have in common.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include <gdn/models/causal_lm.h>
#include <gdn/training/tokenizer.h>

namespace CLI {
class App;
}

namespace gdn::cli {

struct ModelOptions {
  std::string model;
  std::string tokenizer;  ///< empty: the model folder's
  std::string device = "auto";
  std::string dtype = "fp32";
  std::string weight_dtype;  ///< empty: dtype
  int64_t weight_group = 128;
  int64_t threads = 0;

  void declare(CLI::App& app);
  /// Sets the number of threads, chooses the device, loads the model in evaluation mode, and tells
  /// a terminal what "auto" has chosen and how large weights of int8 are.
  GatedDeltaNetForCausalLM load_model() const;
  std::unique_ptr<Tokenizer> make_tokenizer_for(const GatedDeltaNetConfig& config) const;
};

}  // namespace gdn::cli
