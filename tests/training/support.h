// What the training tests share: a folder of their own, files in it, and a small run.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <random>
#include <stdexcept>
#include <string>

#include <gtest/gtest.h>

#include <gdn/training/options.h>

namespace gdn::testing {

/// A fresh folder that is removed at the end.
class TestFolder {
 public:
  TestFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "gdn-test-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = pattern;
  }
  ~TestFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;

  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }

  /// Writes a file, and the folders above it; returns its path.
  std::string write(const std::string& name, const std::string& text) const {
    const std::filesystem::path file = path_ / name;
    std::filesystem::create_directories(file.parent_path());
    std::ofstream(file, std::ios::binary) << text;
    return file.string();
  }

 private:
  std::filesystem::path path_;
};

inline std::string read_file(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw std::runtime_error(file.string() + " is missing");
  return {std::istreambuf_iterator<char>(stream), {}};
}

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

/// The message of what `action` throws, which must be an Error.
template <typename Error, typename Action>
std::string message_of(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another kind of error: " << error.what();
    return error.what();
  }
  ADD_FAILURE() << "nothing was thrown";
  return {};
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
