#include <csignal>
#include <sstream>
#include <sys/resource.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <torch/torch.h>

#include <gdn/models/checkpoint.h>
#include <gdn/models/safetensors.h>
#include <gdn/training/run_folder.h>
#include <gdn/training/stop_signals.h>
#include <gdn/training/tokenizer.h>
#include <gdn/training/trainer.h>

#include "support.h"

namespace gdn {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::message_of;
using testing::read_file;
using testing::small_run;
using testing::TestFolder;

/// Calls `after_step(step)`.
class StepSink : public MetricsSink {
 public:
  explicit StepSink(std::function<void(int64_t)> after_step = {}) : after_step_(after_step) {}
  void on_step(const StepMetrics& metrics, bool) override {
    losses.push_back(metrics.loss);
    if (after_step_) after_step_(metrics.step);
  }
  void on_message(std::string_view text) override { messages += std::string(text) + "\n"; }

  std::vector<double> losses;
  std::string messages;

 private:
  std::function<void(int64_t)> after_step_;
};

TrainResult run(const TrainOptions& options) {
  StepSink sink;
  return train(options, sink);
}

/// Trains until `steps` are done, and is then stopped.
TrainResult run_until(const TrainOptions& options, int64_t steps) {
  int64_t done = 0;
  StepSink sink([&](int64_t step) { done = step; });
  return train(options, sink, [&] { return done >= steps; });
}

/// step -> loss as written.
std::map<int64_t, std::string> recorded_losses(const fs::path& out) {
  std::map<int64_t, std::string> losses;
  std::istringstream lines(read_file(out / "metrics.jsonl"));
  for (std::string line; std::getline(lines, line);) {
    const json record = json::parse(line);
    if (record.contains("loss")) losses[record["step"]] = record["loss"].dump();
  }
  return losses;
}

TEST(Train, LeavesAModelThatLoads) {
  const TestFolder folder;
  TrainOptions options = small_run(folder);
  options.save_every = 5;
  options.keep_checkpoints = 2;
  options.eval_every = 6;
  StepSink sink;
  const TrainResult result = train(options, sink);
  EXPECT_TRUE(result.finished);
  EXPECT_EQ(result.step, 12);
  ASSERT_EQ(sink.losses.size(), 12U);
  EXPECT_NEAR(sink.losses.front(), std::log(257), 0.5);
  EXPECT_LT(sink.losses.back(), sink.losses.front() - 0.3);
  EXPECT_GT(result.evaluation.value().bits_per_byte.value(), 0);

  const fs::path out = options.out;
  GatedDeltaNetForCausalLM model = load_pretrained(out);
  EXPECT_EQ(model->config().hidden_size, 32);
  EXPECT_EQ(load_tokenizer(out)->description(), "byte");
  EXPECT_EQ(train_options_to_json(recorded_train_options(out)), train_options_to_json(options));
  EXPECT_EQ(recorded_losses(out).size(), 12U);
  EXPECT_FALSE(fs::exists(out / "checkpoints/step-5"));
  EXPECT_TRUE(fs::exists(out / "checkpoints/step-10"));
  EXPECT_EQ(read_file(out / "checkpoints/step-12/model.safetensors"),
            read_file(out / "model.safetensors"));
}

TEST(Train, GivesTheSameBitsTwice) {
  const TestFolder folder;
  TrainOptions options = small_run(folder);
  options.threads = 2;
  run(options);
  const std::string first = read_file(fs::path(options.out) / "model.safetensors");
  options.out = (folder / "again").string();
  run(options);
  EXPECT_EQ(read_file(fs::path(options.out) / "model.safetensors"), first);
  options.out = (folder / "other").string();
  options.seed = 1;
  run(options);
  EXPECT_NE(read_file(fs::path(options.out) / "model.safetensors"), first);
}

void expect_exact_resume(TrainOptions options, const TestFolder& folder) {
  run(options);
  const fs::path whole = options.out;
  options.out = (folder / "parts").string();
  EXPECT_FALSE(run_until(options, 5).finished);
  EXPECT_FALSE(fs::exists(folder / "parts/model.safetensors"));
  options.resume = true;
  EXPECT_TRUE(run(options).finished);
  EXPECT_EQ(recorded_losses(folder / "parts"), recorded_losses(whole));
  EXPECT_EQ(read_file(folder / "parts/model.safetensors"), read_file(whole / "model.safetensors"));
}

TEST(Resume, IsExact) {
  const TestFolder folder;
  expect_exact_resume(small_run(folder), folder);
}

TEST(Resume, IsExactWithEveryOption) {
  const TestFolder folder;
  TrainOptions options = small_run(folder);
  options.dtype = "bf16";
  options.grad_accumulation = 2;
  options.activation_checkpointing = true;
  options.max_grad_norm = 0.1;
  options.eval_every = 2;
  options.save_every = 2;
  expect_exact_resume(options, folder);
}

TEST(Resume, OfAFinishedRunChangesNothing) {
  const TestFolder folder;
  TrainOptions options = small_run(folder);
  run(options);
  const std::string model = read_file(fs::path(options.out) / "model.safetensors");
  options.resume = true;
  EXPECT_TRUE(run(options).finished);
  EXPECT_EQ(read_file(fs::path(options.out) / "model.safetensors"), model);
}

TEST(Resume, RefusesOtherModelsAndData) {
  const TestFolder folder;
  const TrainOptions begun = small_run(folder);
  run_until(begun, 3);
  const auto refusal = [&](auto change) {
    TrainOptions options = begun;
    options.resume = true;
    change(options);
    return message_of<std::invalid_argument>([&] { run(options); });
  };
  const std::string checkpoint = (folder / "run/checkpoints/step-3").string();
  EXPECT_EQ(refusal([](auto& o) { o.hidden_size = 64; }),
            "hidden_size must stay as in " + checkpoint + ", 32, got 64");
  EXPECT_EQ(refusal([](auto& o) { o.layers = 3; }),
            "num_hidden_layers must stay as in " + checkpoint + ", 2, got 3");
  EXPECT_EQ(refusal([](auto& o) { o.seq_len = 32; }),
            "seq_len must stay as in " + checkpoint + ", 64, got 32");
  EXPECT_EQ(refusal([](auto& o) { o.seed = 9; }),
            "seed must stay as in " + checkpoint + ", 0, got 9");
  EXPECT_EQ(refusal([](auto& o) {
              o.eval_data = o.data;
            }).rfind("the number of training documents must stay as in " + checkpoint, 0),
            0U);
  folder.write("data/new.txt", "new");
  TrainOptions options = begun;
  options.resume = true;
  const std::string message = message_of<std::runtime_error>([&] { run(options); });
  EXPECT_NE(message.find("was made from other files"), std::string::npos) << message;
  options.data = {(folder / "run/data/train").string()};  // what the message proposes
  EXPECT_TRUE(run(options).finished);
}

TEST(Train, RefusesAFolderInUseAndLeavesItAlone) {
  const TestFolder folder;
  TrainOptions options = small_run(folder);
  folder.write("run/model.safetensors", "precious");
  const std::string message = message_of<std::runtime_error>([&] { run(options); });
  EXPECT_NE(message.find("already holds model.safetensors"), std::string::npos) << message;
  EXPECT_EQ(read_file(folder / "run/model.safetensors"), "precious");
  options.out = (folder / "nothing").string();
  options.resume = true;
  EXPECT_NE(message_of<std::runtime_error>([&] { run(options); }).find("no run to resume"),
            std::string::npos);
  EXPECT_FALSE(fs::exists(folder / "nothing"));
}

TEST(Train, RefusesAFolderThatAnotherProcessHolds) {
  const TestFolder folder;
  TrainOptions options = small_run(folder);
  run_until(options, 3);
  RunFolder other(options.out);  // a lock belongs to an open file: this is as good as a process
  other.lock();
  options.resume = true;
  EXPECT_EQ(message_of<std::runtime_error>([&] { run(options); }),
            (folder / "run/.lock").string() + ": another process is training in this folder");
  options.resume = false;
  options.out = (folder / "new").string();
  RunFolder newcomer(options.out);
  newcomer.lock();
  EXPECT_EQ(message_of<std::runtime_error>([&] { run(options); }),
            (folder / "new/.lock").string() + ": another process is training in this folder");
}

TEST(Train, NamesBadInputAndLeavesNothingBehind) {
  const TestFolder folder;
  const TrainOptions good = small_run(folder);
  TrainOptions options = good;
  options.seq_len = 100'000;
  std::string message = message_of<std::invalid_argument>([&] { run(options); });
  EXPECT_NE(message.find("seq_len must be at most the training data's"), std::string::npos)
      << message;
  options = good;
  options.out = (folder / "other").string();
  options.data = {(folder / "missing").string()};
  EXPECT_EQ(message_of<std::runtime_error>([&] { run(options); }),
            (folder / "missing").string() + ": does not exist");
  EXPECT_FALSE(fs::exists(options.out));
  options = good;
  options.config = folder.write("config.json", R"({"hiden_size": 32})");
  message = message_of<std::invalid_argument>([&] { run(options); });
  EXPECT_NE(message.find("hiden_size"), std::string::npos) << message;
  options = good;
  options.data = {folder.write("short.txt", "ab")};
  options.seq_len = 2;
  message = message_of<std::invalid_argument>([&] { run(options); });
  EXPECT_NE(message.find("eval_data must be given"), std::string::npos) << message;
}

TEST(Train, TakesHeldOutDataThatIsNamed) {
  const TestFolder folder;
  TrainOptions options = small_run(folder);
  options.eval_data = {folder.write("held-out.txt", testing::some_text(500, 77))};
  options.steps = 2;
  const TrainResult result = run(options);
  EXPECT_EQ(result.evaluation.value().documents, 1);
  EXPECT_EQ(result.evaluation.value().tokens, 501);
  EXPECT_EQ(result.evaluation.value().bytes, 500);
}

/// Puts a value into one weight of the latest checkpoint.
void poison_checkpoint(const fs::path& checkpoint, const std::string& name, float value) {
  GatedDeltaNetForCausalLM model = load_pretrained(checkpoint);
  {
    const torch::NoGradGuard no_grad;
    model->named_parameters()[name].flatten()[1] = value;
  }
  save_pretrained(model, checkpoint);
}

std::string message_of_poisoned_run(const std::string& name, float value) {
  const TestFolder folder;
  TrainOptions options = small_run(folder);
  options.save_every = 3;
  run_until(options, 3);
  const fs::path checkpoint = folder / "run/checkpoints/step-3";
  poison_checkpoint(checkpoint, name, value);
  options.resume = true;
  std::string message = message_of<std::runtime_error>([&] { run(options); });
  EXPECT_TRUE(fs::exists(checkpoint));
  EXPECT_FALSE(fs::exists(folder / "run/model.safetensors"));
  EXPECT_NE(message.find("last good checkpoint: " + checkpoint.string()), std::string::npos)
      << message;
  return message;
}

TEST(NonFinite, NamesAPoisonedParameter) {
  const std::string name = "model.layers.1.mlp.up_proj.weight";
  const std::string message = message_of_poisoned_run(name, std::nanf(""));
  EXPECT_EQ(message.rfind("step 4: the loss is nan", 0), 0U) << message;
  EXPECT_NE(message.find("first tensor that is not finite: " + name + " (1 of "), std::string::npos)
      << message;
  EXPECT_NE(message.find(".txt tokens "), std::string::npos) << message;
}

TEST(NonFinite, NamesTheOperatorThatOverflowed) {
  // A weight of the head, which is tied: finite itself, but not its product with a state above 1.2.
  const std::string name = "model.embeddings.weight";
  const std::string message = message_of_poisoned_run(name, 3e38F);
  EXPECT_EQ(message.rfind("step 4: the loss is ", 0), 0U) << message;
  EXPECT_NE(message.find("first tensor that is not finite: the result of aten::"),
            std::string::npos)
      << message;
  EXPECT_NE(message.find(" with " + name), std::string::npos) << message;
}

// What a signal, a crash or a full disk does to a run is tried on a child process. It is this
// program again, running the next test; forking alone would break the threads of OpenMP.

constexpr char kChildOptions[] = "GDN_TEST_CHILD_OPTIONS";

TEST(DISABLED_Child, Trains) {
  const TrainOptions options = train_options_from_json(json::parse(std::getenv(kChildOptions)));
  StopSignals signals;
  StepSink sink;
  const TrainResult result = train(options, sink, [&] { return signals.requested(); });
  ::_exit(result.finished ? 0 : 3);
}

/// Starts the child. `max_file_bytes` limits the size of files that it can write.
pid_t start_child(const TrainOptions& options, const fs::path& log, rlim_t max_file_bytes = 0) {
  const std::string variable = train_options_to_json(options).dump();
  const pid_t child = ::fork();
  if (child != 0) return child;
  ::setenv(kChildOptions, variable.c_str(), 1);
  if (max_file_bytes > 0) {
    const rlimit limit = {max_file_bytes, max_file_bytes};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    ::signal(SIGXFSZ, SIG_IGN);  // writes fail with an error instead
  }
  if (std::freopen(log.c_str(), "w", stdout) == nullptr) ::_exit(126);
  ::execl("/proc/self/exe", "child", "--gtest_filter=DISABLED_Child.Trains",
          "--gtest_also_run_disabled_tests", nullptr);
  ::_exit(127);
}

int wait_for(pid_t child) {
  int status = 0;
  ::waitpid(child, &status, 0);
  return status;
}

/// Returns once the run has recorded `step`, or the child has ended.
void wait_for_step(const fs::path& out, int64_t step, pid_t child) {
  const auto recorded = [&] {
    std::ifstream lines(out / "metrics.jsonl");
    std::string line;
    int64_t count = 0;
    while (std::getline(lines, line)) ++count;
    return count >= step;
  };
  siginfo_t ended{};
  while (!recorded()) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    ::waitid(P_PID, child, &ended, WEXITED | WNOHANG | WNOWAIT);
    if (ended.si_pid != 0) return;
  }
}

TEST(Resume, AfterKillGivesTheSameFile) {
  const TestFolder folder;
  TrainOptions options = small_run(folder);
  options.steps = 60;
  options.save_every = 1;  // most of the time is spent saving, so kills hit it
  run(options);
  const std::string expected = read_file(fs::path(options.out) / "model.safetensors");
  options.out = (folder / "killed").string();
  std::mt19937 random(std::random_device{}());
  int64_t step = 0;
  for (int kill = 0; kill < 4; ++kill) {
    const pid_t child = start_child(options, folder / "log");
    step += 1 + random() % 12;
    wait_for_step(options.out, step, child);
    std::this_thread::sleep_for(std::chrono::microseconds(random() % 30'000));
    ::kill(child, SIGKILL);
    const int status = wait_for(child);
    EXPECT_TRUE(WIFSIGNALED(status)) << "ended before it was killed: " << read_file(folder / "log");
    options.resume = true;
  }
  run(options);
  EXPECT_EQ(read_file(folder / "killed/model.safetensors"), expected) << "killed at step " << step;
}

TEST(Signals, SaveAndLeave) {
  for (const int signal : {SIGTERM, SIGINT}) {
    const TestFolder folder;
    TrainOptions options = small_run(folder);
    options.steps = 100'000;
    const pid_t child = start_child(options, folder / "log");
    wait_for_step(options.out, 3, child);
    ::kill(child, signal);
    const int status = wait_for(child);
    ASSERT_TRUE(WIFEXITED(status)) << read_file(folder / "log");
    EXPECT_EQ(WEXITSTATUS(status), 3);
    const auto checkpoint = fs::directory_iterator(folder / "run/checkpoints")->path();
    const std::string name = checkpoint.filename().string();
    EXPECT_EQ(std::to_string(recorded_losses(options.out).rbegin()->first), name.substr(5));
    options.resume = true;
    EXPECT_FALSE(run_until(options, 1).finished);
  }
}

TEST(Signals, EndTheProcessTheSecondTime) {
  const pid_t child = ::fork();
  if (child == 0) {
    const StopSignals signals;
    ::raise(SIGINT);
    if (!signals.requested()) ::_exit(1);
    ::raise(SIGTERM);
    ::_exit(2);
  }
  const int status = wait_for(child);
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGTERM);
}

TEST(Train, KeepsTheLastCheckpointWhenTheDiskIsFull) {
  const TestFolder folder;
  TrainOptions options = small_run(folder);
  run_until(options, 3);
  const fs::path checkpoint = folder / "run/checkpoints/step-3";
  const std::string model = read_file(checkpoint / "model.safetensors");
  options.resume = true;
  options.save_every = 1;
  const pid_t child = start_child(options, folder / "log", model.size() / 2);
  const int status = wait_for(child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 1);
  const std::string log = read_file(folder / "log");
  EXPECT_NE(log.find("model.safetensors: cannot be written: File too large"), std::string::npos)
      << log;
  EXPECT_EQ(read_file(checkpoint / "model.safetensors"), model);
  int entries = 0;
  for (const auto& entry : fs::directory_iterator(folder / "run/checkpoints")) {
    EXPECT_EQ(entry.path(), checkpoint);
    ++entries;
  }
  EXPECT_EQ(entries, 1);
  EXPECT_TRUE(run(options).finished);  // with room again
}

}  // namespace
}  // namespace gdn
