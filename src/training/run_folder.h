// What a run keeps in its folder: checkpoints to resume from, and the finished model.
//
// A checkpoint is a model folder (config.json, model.safetensors, tokenizer) with
// optimizer.safetensors and trainer.json beside the weights. It is written under a hidden name,
// synced and renamed: a folder checkpoints/step-N is complete, whatever happened.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>

#include <gdn/models/causal_lm.h>
#include <gdn/training/files.h>
#include <gdn/training/optimizer.h>

namespace gdn {

class Tokenizer;

/// What a resumed run needs beside weights and optimiser. seq_len, seed and the data's size fix the
/// order in which `position` counts.
struct TrainerState {
  int64_t step = 0;
  int64_t position = 0;  ///< of the sampler
  int64_t seq_len = 0;
  uint64_t seed = 0;
  int64_t data_documents = 0, data_tokens = 0;
};

class RunFolder {
 public:
  explicit RunFolder(std::filesystem::path out) : out_(std::move(out)) {}

  const std::filesystem::path& path() const { return out_; }

  /// Throws std::runtime_error when the folder holds what a run would write, such as a model.
  void require_no_run() const;

  /// Makes the folder where there is none, and holds it until this object is gone. Throws
  /// std::runtime_error when another process holds it.
  void lock();

  std::optional<std::filesystem::path> latest_checkpoint() const;

  /// Saves the state after `state.step` steps, then removes all but the `keep` newest checkpoints
  /// (0: none). Does nothing when that step's checkpoint exists.
  void save_checkpoint(GatedDeltaNetForCausalLM& model, const Tokenizer& tokenizer,
                       const AdamW& optimizer, const TrainerState& state, int64_t keep) const;

  static TrainerState read_state(const std::filesystem::path& checkpoint);
  /// Sets the optimiser's state and torch's random generator.
  static void restore(const std::filesystem::path& checkpoint, AdamW& optimizer);

 private:
  std::filesystem::path checkpoints() const { return out_ / "checkpoints"; }
  void remove_old_checkpoints(int64_t keep) const;

  std::filesystem::path out_;
  std::optional<FileLock> lock_;
};

}  // namespace gdn
