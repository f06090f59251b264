// The safetensors format: round trips, hostile files, and writing that survives anything.
#include <chrono>
#include <csignal>
#include <cstring>
#include <sys/resource.h>
#include <sys/wait.h>
#include <thread>

#include <gdn/models/atomic_file.h>
#include <gdn/models/safetensors.h>

#include "models/tiny_models.h"

namespace gdn::testing {
namespace {

/// A file of this header and `data_bytes` zeros.
std::string with_header(const std::string& header, size_t data_bytes) {
  const uint64_t length = header.size();
  std::string bytes(reinterpret_cast<const char*>(&length), sizeof length);
  return bytes + header + std::string(data_bytes, '\0');
}

TEST(Safetensors, RoundTripsEveryDtype) {
  const TestFolder folder;
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto type :
       {torch::kBool, torch::kByte, torch::kChar, torch::kShort, torch::kInt, torch::kLong,
        torch::kHalf, torch::kBFloat16, torch::kFloat, torch::kDouble}) {
    tensors.emplace_back(c10::toString(type), (torch::randn({3, 5}) * 9).to(type));
  }
  tensors.emplace_back("scalar", torch::tensor(2.5));
  tensors.emplace_back("empty", torch::empty({0, 4}));
  tensors.emplace_back("transposed", torch::randn({4, 3}).t());
  write_safetensors(folder / "x.safetensors", tensors, {{"format", "pt"}, {"note", "\"ä\""}});
  const SafetensorsFile file(folder / "x.safetensors");
  EXPECT_EQ(file.names().size(), tensors.size());
  EXPECT_EQ(file.metadata().at("note"), "\"ä\"");
  for (const auto& [name, tensor] : tensors) {
    ASSERT_TRUE(file.contains(name));
    EXPECT_EQ(file.tensor(name).scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(torch::equal(file.tensor(name), tensor)) << name;
  }
}

TEST(Safetensors, TensorsOutliveTheFileObject) {
  const TestFolder folder;
  const at::Tensor x = torch::randn({100});
  write_safetensors(folder / "x", {{"x", x}});
  at::Tensor kept;
  {
    const SafetensorsFile file(folder / "x");
    kept = file.tensor("x");
  }
  EXPECT_TRUE(torch::equal(kept, x));
}

TEST(Safetensors, ReadsUnalignedData) {
  const TestFolder folder;
  const std::string header = R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} )";
  ASSERT_NE(header.size() % 4, 0U);
  std::string bytes = with_header(header, 8);
  const float values[2] = {1.5F, -2.0F};
  std::memcpy(bytes.data() + bytes.size() - 8, values, 8);
  folder.write("x", bytes);
  const at::Tensor x = SafetensorsFile(folder / "x").tensor("x");
  EXPECT_TRUE(torch::equal(x, torch::tensor({1.5F, -2.0F})));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(x.const_data_ptr()) % alignof(float), 0U);
}

struct Hostile {
  std::string header;
  size_t data_bytes;
  const char* message;  // must appear
};

void PrintTo(const Hostile& hostile, std::ostream* out) { *out << hostile.message; }

class HostileFile : public ::testing::TestWithParam<Hostile> {};

TEST_P(HostileFile, GivesOneErrorThatNamesIt) {
  const TestFolder folder;
  const std::string path =
      folder.write("bad.safetensors", with_header(GetParam().header, GetParam().data_bytes));
  const std::string message =
      message_of<std::runtime_error>([&] { const SafetensorsFile file(path); });
  EXPECT_EQ(message.rfind(path + ": ", 0), 0U) << message;
  EXPECT_NE(message.find(GetParam().message), std::string::npos) << message;
}

std::string one(const std::string& dtype, const std::string& shape, const std::string& offsets) {
  return R"({"x":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
         "}}";
}

INSTANTIATE_TEST_SUITE_P(
    Headers, HostileFile,
    ::testing::Values(Hostile{"{\"x\":", 0, "not JSON"}, Hostile{"[1,2]", 0, "not a JSON object"},
                      Hostile{std::string(100'000, '['), 0, "not JSON"},
                      Hostile{std::string("{\"\xff\xfe\": 1}"), 0, "not JSON"},
                      Hostile{R"({"x":3})", 0, "must have just dtype, shape and data_offsets"},
                      Hostile{R"({"x":{"dtype":"F32","shape":[1]}})", 4, "must have just dtype"},
                      Hostile{one("F31", "[1]", "[0,4]"), 4, "unknown dtype \"F31\""},
                      Hostile{one("F32", "3", "[0,4]"), 4, "shape must be a list"},
                      Hostile{one("F32", "[-1]", "[0,4]"), 4, "not negative, got -1"},
                      Hostile{one("F32", "[1.5]", "[0,4]"), 4, "got 1.5"},
                      Hostile{one("F32", "[\"1\"]", "[0,4]"), 4, "got \"1\""},
                      Hostile{one("F32", "[9223372036854775808]", "[0,4]"), 4, "too large"},
                      Hostile{one("F32", "[4294967296,4294967296]", "[0,0]"), 0, "too large"},
                      Hostile{one("F32", "[4611686018427387905,1]", "[0,4]"), 4, "too large"},
                      Hostile{one("F32", "[1]", "[0]"), 4, "must be [begin, end]"},
                      Hostile{one("F32", "[1]", "[4,0]"), 4, "pass the 4 bytes"},
                      Hostile{one("F32", "[1]", "[0,8]"), 4, "pass the 4 bytes"},
                      Hostile{one("F32", "[1]", "[18446744073709551612,18446744073709551616]"), 4,
                              "integers that are not negative"},
                      Hostile{one("F32", "[1]", "[-4,0]"), 4, "not negative, got -4"},
                      Hostile{one("F32", "[3]", "[0,8]"), 8, "disagree with shape [3]"},
                      Hostile{one("F32", "[1]", "[4,8]"), 8, "leave a gap"},
                      Hostile{one("F32", "[1]", "[0,4]"), 8, "followed by unnamed bytes"},
                      Hostile{R"({"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                              R"("y":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})",
                              6, "overlap"},
                      Hostile{R"({"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                              R"("x":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}})",
                              8, "names \"x\" twice"},
                      Hostile{
                          R"({"x":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}})",
                          4, "names \"dtype\" twice"},
                      Hostile{R"({"__metadata__":{"a":1}})", 0, "__metadata__ must hold strings"},
                      Hostile{R"({"__metadata__":7})", 0, "__metadata__ must hold strings"}));

TEST(Safetensors, RejectsWhatIsNoSuchFile) {
  const TestFolder folder;
  const auto message = [&](const std::filesystem::path& path) {
    return message_of<std::runtime_error>([&] { const SafetensorsFile file(path); });
  };
  EXPECT_EQ(message(folder / "none"),
            (folder / "none").string() + ": cannot be read: No such file or directory");
  EXPECT_EQ(message(folder.path()), folder.path().string() + ": is not a regular file");
  folder.write("empty", "");
  EXPECT_EQ(message(folder / "empty"),
            (folder / "empty").string() + ": is too short to be safetensors");
  for (const uint64_t length : {uint64_t{1}, uint64_t{100'000'001}, UINT64_MAX}) {
    folder.write("long", std::string(reinterpret_cast<const char*>(&length), 8));
    EXPECT_NE(message(folder / "long").find("passes the file's end"), std::string::npos);
  }
}

TEST(Safetensors, EveryTruncationIsAnError) {
  const TestFolder folder;
  write_safetensors(folder / "whole", {{"x", torch::randn({4})}, {"y", torch::randn({3})}});
  const std::string bytes = test::read_file(folder / "whole");
  for (size_t length = 0; length < bytes.size(); ++length) {
    folder.write("cut", bytes.substr(0, length));
    EXPECT_THROW(const SafetensorsFile file(folder / "cut"), std::runtime_error) << length;
  }
}

TEST(Safetensors, WriterRejectsWhatItCannotWrite) {
  const TestFolder folder;
  const at::Tensor x = torch::randn({2});
  EXPECT_NE(message_of<std::runtime_error>([&] {
              write_safetensors(folder / "x", {{"a", x}, {"a", x}});
            }).find("tensor \"a\" is given twice"),
            std::string::npos);
  EXPECT_NE(message_of<std::runtime_error>([&] {
              write_safetensors(folder / "x", {{"a", torch::view_as_complex(x.view({1, 2}))}});
            }).find("which safetensors does not know"),
            std::string::npos);
  EXPECT_NE(message_of<std::runtime_error>([&] {
              write_safetensors(folder / "no" / "x", {{"a", x}});
            }).find("cannot be written: No such file or directory"),
            std::string::npos);
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
}

/// Runs `action` in a child process, which _exits with its status; returns the child.
template <typename Action>
pid_t in_child(Action&& action) {
  const pid_t child = fork();
  if (child == 0) _exit(action());
  return child;
}

TEST(AtomicWriting, KillAtAnyMomentLeavesALoadableFile) {
  const TestFolder folder;
  const auto path = folder / "model.safetensors";
  const at::Tensor first = torch::full({400'000}, 1.0F), second = torch::full({300'000}, 2.0F);
  write_safetensors(path, {{"x", first}});
  std::srand(5);
  for (int round = 0; round < 25; ++round) {
    const pid_t child = in_child([&]() -> int {
      while (true) {
        write_safetensors(path, {{"x", second}});
        write_safetensors(path, {{"x", first}});
      }
    });
    std::this_thread::sleep_for(std::chrono::microseconds(500 + std::rand() % 12'000));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    const at::Tensor x = SafetensorsFile(path).tensor("x");
    EXPECT_TRUE(torch::equal(x, first) || torch::equal(x, second));
  }
  // What the killed ones left neither hinders the next writer nor stays.
  write_safetensors(path, {{"x", second}});
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

TEST(AtomicWriting, FullDiskLeavesTheOldFile) {
  const TestFolder folder;
  const auto path = folder / "model.safetensors";
  write_safetensors(path, {{"x", torch::ones({10})}});
  const std::string before = test::read_file(path);
  const at::Tensor large = torch::zeros({100'000});
  const pid_t child = in_child([&]() -> int {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{10'000, 10'000};
    if (setrlimit(RLIMIT_FSIZE, &limit) != 0) return 2;
    try {
      write_safetensors(path, {{"x", large}});
    } catch (const std::runtime_error& error) {
      return std::string(error.what()) == path.string() + ": cannot be written: File too large" ? 0
                                                                                                : 3;
    }
    return 1;
  });
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  EXPECT_EQ(test::read_file(path), before);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

TEST(AtomicWriting, TwoWritersOfOneFileDoNotMix) {
  const TestFolder folder;
  AtomicFile first(folder / "x");
  EXPECT_EQ(message_of<std::runtime_error>([&] { AtomicFile second(folder / "x"); }),
            (folder / "x").string() + ": another process is writing it");
  first.write("whole");
  first.commit();
  EXPECT_EQ(test::read_file(folder / "x"), "whole");
}

TEST(AtomicWriting, WithoutCommitNothingChanges) {
  const TestFolder folder;
  folder.write("x", "old");
  { AtomicFile(folder / "x").write("new"); }
  EXPECT_EQ(test::read_file(folder / "x"), "old");
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder.path()), {}), 1);
}

}  // namespace
}  // namespace gdn::testing
