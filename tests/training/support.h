// What the training tests share: some text, and a small run on it.
#pragma once

#include <random>
#include <string>
#include <support/files.h>

#include <gdn/training/options.h>

namespace gdn::testing {

using test::message_of;
using test::read_file;
using test::TestFolder;

/// Words of a small language, so that there is something to learn.
inline std::string some_text(size_t bytes, unsigned seed) {
  static const char* const kWords[] = {"the", "delta", "rule",   "writes",
                                       "a",   "state", "decays", "by"};
  std::mt19937 random(seed);
  std::string text;
  while (text.size() < bytes)
    text += std::string(kWords[random() % 8]) + (random() % 9 ? " " : ".\n");
  text.resize(bytes);
  return text;
}

/// A model and a run that take about a second, on data in folder / "data".
inline TrainOptions small_run(const TestFolder& folder) {
  for (unsigned i = 0; i < 24; ++i) {
    folder.write("data/" + std::to_string(i) + ".txt", some_text(100 + 37 * i, i));
  }
  TrainOptions options;
  options.data = {(folder / "data").string()};
  options.out = (folder / "run").string();
  options.hidden_size = 32;
  options.layers = 2;
  options.heads = 2;
  options.head_dim = 16;
  options.expand_v = 1.0;
  options.steps = 12;
  options.batch_size = 2;
  options.seq_len = 64;
  options.warmup = 3;
  options.log_every = 1;
  options.eval_every = 0;
  options.save_every = 0;
  options.threads = 1;
  return options;
}

}  // namespace gdn::testing
