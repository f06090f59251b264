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
  std::string device = "cpu";
  std::string dtype = "fp32";
  int64_t threads = 0;

  void declare(CLI::App& app);
  /// Sets the number of threads and loads the model, without gradients and in evaluation mode.
  GatedDeltaNetForCausalLM load_model() const;
  std::unique_ptr<Tokenizer> make_tokenizer_for(const GatedDeltaNetConfig& config) const;
};

}  // namespace gdn::cli
