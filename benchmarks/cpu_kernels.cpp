// The gated delta rule's CPU kernels without torch, beside what the machine's caches copy: medians,
// GFLOP/s of the leanest chunked algorithm, GB/s of the decode step. `--pass X --repeats 1` runs
// one pass alone, for a profiler or an instruction count.
//
//   gdn_bench_cpu_kernels [--target AVX2] [--threads 2] [--tokens 2048] [--key-heads 16]
//       [--value-heads 32] [--head-dim 128] [--chunk 64] [--dtype f32|bf16]
//       [--pass forward|backward|decode|copy] [--repeats 15]

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include <hwy/aligned_allocator.h>
#include <hwy/base.h>
#include <hwy/targets.h>

#include <gdn/kernels/cpu/gated_delta_rule.h>
#include <gdn/kernels/shares.h>

namespace {

using namespace gdn::kernels;

/// Threads that wait by spinning, so that a step of some 20 us can be timed.
class Pool {
 public:
  using Body = FunctionRef<void(int64_t, int64_t)>;

  void start(int64_t threads) {
    for (int64_t i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    stop_ = true;
    for (std::thread& worker : workers_) worker.join();
  }
  void run(int64_t count, Body body) {
    const auto threads = static_cast<int64_t>(workers_.size()) + 1;
    if (threads == 1) return body(0, count);
    Shares shares(count, threads);
    shares_ = &shares;
    body_ = &body;
    busy_ = threads - 1;
    ++generation_;
    shares.work(0, body);
    while (busy_ > 0) pause();
  }

 private:
  void work(int64_t thread) {
    for (int64_t seen = 0; !stop_;) {
      if (generation_ == seen) {
        pause();
        continue;
      }
      seen = generation_;
      shares_->work(thread, *body_);
      --busy_;
    }
  }
  static void pause() {
#if HWY_ARCH_X86
    __builtin_ia32_pause();
#endif
  }

  std::vector<std::thread> workers_;
  std::atomic<bool> stop_ = false;
  std::atomic<int64_t> generation_ = 0, busy_ = 0;
  Shares* shares_ = nullptr;
  const Body* body_ = nullptr;
};

Pool pool;
void pool_for(int64_t count, Pool::Body body) { pool.run(count, body); }

struct Options {
  std::string target, dtype, pass;
  int64_t threads = 1, tokens = 2048, key_heads = 16, value_heads = 32, head_dim = 128;
  int64_t chunk = 64, repeats = 15;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string_view name = argv[i];
    if (i + 1 == argc) throw std::invalid_argument(std::string(name) + " needs a value");
    const std::string value = argv[i + 1];
    if (name == "--target") {
      options.target = value;
    } else if (name == "--dtype") {
      options.dtype = value;
    } else if (name == "--pass") {
      options.pass = value;
    } else if (name == "--threads") {
      options.threads = std::stoll(value);
    } else if (name == "--tokens") {
      options.tokens = std::stoll(value);
    } else if (name == "--key-heads") {
      options.key_heads = std::stoll(value);
    } else if (name == "--value-heads") {
      options.value_heads = std::stoll(value);
    } else if (name == "--head-dim") {
      options.head_dim = std::stoll(value);
    } else if (name == "--chunk") {
      options.chunk = std::stoll(value);
    } else if (name == "--repeats") {
      options.repeats = std::stoll(value);
    } else {
      throw std::invalid_argument("unknown option " + std::string(name));
    }
  }
  return options;
}

/// The instruction set `name` and no other; the best that the machine has when empty.
void choose_target(const std::string& name) {
  for (const int64_t target : hwy::SupportedAndGeneratedTargets()) {
    if (name.empty() || name == hwy::TargetName(target)) {
      hwy::SetSupportedTargetsForTest(target);
      hwy::GetChosenTarget().Update(hwy::SupportedTargets());
      return;
    }
  }
  throw std::invalid_argument("this machine or this build has no " + name);
}

/// Median and least of the times of `repeats` calls after one that warms up, in seconds.
struct Time {
  double median, least;
};
Time time_of(int64_t repeats, const std::function<void()>& call) {
  std::vector<double> times;
  for (int64_t i = 0; i < repeats + (repeats > 1 ? 1 : 0); ++i) {
    const auto start = std::chrono::steady_clock::now();
    call();
    times.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  if (repeats > 1) times.erase(times.begin());
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times[0]};
}

/// A zeroed or random array of fp32 or bf16.
class Memory {
 public:
  Memory(int64_t count, DType dtype) : Memory(count, dtype, 0, [] { return 0.0F; }) {}
  template <typename Draw>
  Memory(int64_t count, DType dtype, int /*drawn*/, const Draw& draw)
      : bytes_(hwy::AllocateAligned<uint8_t>(static_cast<size_t>(count) *
                                             (dtype == DType::f32 ? 4 : 2))) {
    for (int64_t i = 0; i < count; ++i) {
      const float value = draw();
      if (dtype == DType::f32) {
        reinterpret_cast<float*>(bytes_.get())[i] = value;
      } else {
        uint32_t bits;
        std::memcpy(&bits, &value, sizeof(bits));
        reinterpret_cast<uint16_t*>(bytes_.get())[i] = static_cast<uint16_t>(bits >> 16);
      }
    }
  }
  void* data() const { return bytes_.get(); }

 private:
  hwy::AlignedFreeUniquePtr<uint8_t[]> bytes_;
};

/// One problem with all of its arrays.
struct Bench {
  const Options& o;
  DType dtype;
  std::mt19937 engine{1};
  Memory q, k, v, g, beta, initial, d_o, d_final;
  Memory out, final, segments, d_q, d_k, d_v, d_g, d_beta, d_initial;

  int64_t key_size() const { return o.tokens * o.key_heads * o.head_dim; }
  int64_t value_size() const { return o.tokens * o.value_heads * o.head_dim; }
  int64_t gate_size() const { return o.tokens * o.value_heads; }
  int64_t state_size() const { return o.value_heads * o.head_dim * o.head_dim; }
  int64_t segments_size() const {
    return (o.tokens + kSegmentTokens - 1) / kSegmentTokens * state_size();
  }
  Memory normal(int64_t count, DType type) {
    std::normal_distribution<float> distribution;
    return {count, type, 0, [&] { return distribution(engine); }};
  }
  Memory uniform(float low, float high) {
    std::uniform_real_distribution<float> distribution(low, high);
    return {gate_size(), DType::f32, 0, [&] { return distribution(engine); }};
  }

  Bench(const Options& options, DType type)
      : o(options),
        dtype(type),
        q(normal(key_size(), type)),
        k(normal(key_size(), type)),
        v(normal(value_size(), type)),
        g(uniform(-0.1F, 0.0F)),
        beta(uniform(0.0F, 1.0F)),
        initial(normal(state_size(), DType::f32)),
        d_o(normal(value_size(), type)),
        d_final(normal(state_size(), DType::f32)),
        out(value_size(), type),
        final(state_size(), DType::f32),
        segments(segments_size(), DType::f32),
        d_q(key_size(), type),
        d_k(key_size(), type),
        d_v(value_size(), type),
        d_g(gate_size(), DType::f32),
        d_beta(gate_size(), DType::f32),
        d_initial(state_size(), DType::f32) {}

  template <typename View>
  View view(const Memory& memory, int64_t heads) const {
    const int64_t stride_t = heads * o.head_dim;
    return {memory.data(), o.tokens * stride_t, stride_t, o.head_dim};
  }
  template <typename Problem>
  Problem problem(int64_t tokens) const {
    Problem p;
    p.B = p.N = 1;
    p.T = tokens;
    p.H = o.key_heads;
    p.HV = o.value_heads;
    p.K = p.V = o.head_dim;
    p.chunk_size = o.chunk;
    p.dtype = dtype;
    p.scale = 0.088;
    p.qk_l2norm = true;
    p.q = view<ConstView4>(q, o.key_heads);
    p.k = view<ConstView4>(k, o.key_heads);
    p.v = view<ConstView4>(v, o.value_heads);
    p.g = g.data();
    p.beta = beta.data();
    p.initial_state = initial.data();
    p.parallel_for = pool_for;
    p.threads = o.threads;
    return p;
  }
  GatedDeltaRuleForward forward(int64_t tokens) const {
    auto p = problem<GatedDeltaRuleForward>(tokens);
    p.o = view<MutableView4>(out, o.value_heads);
    p.final_state = final.data();
    return p;
  }
  GatedDeltaRuleBackward backward() const {
    auto p = problem<GatedDeltaRuleBackward>(o.tokens);
    p.segment_states = static_cast<const float*>(segments.data());
    p.d_o = view<ConstView4>(d_o, o.value_heads);
    p.d_final_state = d_final.data();
    p.d_q = view<MutableView4>(d_q, o.key_heads);
    p.d_k = view<MutableView4>(d_k, o.key_heads);
    p.d_v = view<MutableView4>(d_v, o.value_heads);
    p.d_g = d_g.data();
    p.d_beta = d_beta.data();
    p.d_initial_state = d_initial.data();
    return p;
  }
};

/// Operations of a chunked pass that multiplies nothing twice and only the halves of triangles that
/// are needed (docs/cpu_kernels.md), for chunks of 64 tokens whatever the kernel chooses.
double chunked_operations(const Options& o, bool backward) {
  constexpr double C = 64;
  const auto K = static_cast<double>(o.head_dim), V = K;
  const double group = static_cast<double>(o.value_heads) / static_cast<double>(o.key_heads);
  const double tokens = static_cast<double>(o.tokens) * static_cast<double>(o.value_heads);
  const double scores = C * K / group;  // K K^T or Q K^T
  if (!backward) return tokens * (2 * scores + 6 * K * V + 2 * C * V);
  const double replay = 4 * K * V + C * V;
  return tokens * (replay + 2 * scores + 12 * K * V + 4 * C * V + 4 * scores);
}

void print_pass(const char* pass, const Options& o, DType dtype, const Time& time,
                double operations, double bytes) {
  std::printf("| %s %s | %ld | %.3f | %.3f |", dtype == DType::f32 ? "fp32" : "bf16", pass,
              static_cast<long>(o.threads), time.median * 1e3, time.least * 1e3);
  if (operations > 0) std::printf(" %.0f GFLOP/s |\n", operations / time.median * 1e-9);
  if (bytes > 0) std::printf(" %.0f GB/s |\n", bytes / time.median * 1e-9);
  std::fflush(stdout);
}

/// Copies half of `bytes` onto the other half on each thread, over and over: what the memory level
/// that holds so much moves.
class Copy {
 public:
  Copy(int64_t threads, int64_t bytes)
      : bytes_(bytes), rounds_(std::max<int64_t>(1, (int64_t{1} << 24) / bytes)) {
    for (int64_t i = 0; i < threads; ++i) memory_.emplace_back(bytes / 4, DType::f32);
  }
  void operator()() const {
    pool_for(static_cast<int64_t>(memory_.size()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        auto* data = static_cast<uint8_t*>(memory_[static_cast<size_t>(i)].data());
        for (int64_t round = 0; round < rounds_; ++round) {
          std::memcpy(data, data + bytes_ / 2, static_cast<size_t>(bytes_ / 2));
          asm volatile("" ::"r"(data) : "memory");
        }
      }
    });
  }
  /// Read and written by one call.
  double moved() const {
    return static_cast<double>(bytes_ * rounds_) * static_cast<double>(memory_.size());
  }
  int64_t rounds() const { return rounds_; }

 private:
  int64_t bytes_, rounds_;
  std::vector<Memory> memory_;
};

void run_copy(const Options& o, int64_t bytes) {
  const Copy copy(o.threads, bytes);
  const Time time = time_of(o.repeats, [&] { copy(); });
  const auto rounds = static_cast<double>(copy.rounds());
  std::printf("| copy within %ld KiB a thread | %ld | %.3f | %.3f | %.0f GB/s |\n",
              static_cast<long>(bytes >> 10), static_cast<long>(o.threads),
              time.median * 1e3 / rounds, time.least * 1e3 / rounds,
              copy.moved() / time.median * 1e-9);
}

/// Decode steps, in turns with copies within as much memory as a thread's share of the state, since
/// a shared machine changes from moment to moment.
void run_decode(const Options& o, DType dtype, const Bench& bench) {
  constexpr int64_t kSteps = 20;  // in a turn
  GatedDeltaRuleForward p = bench.forward(1);
  p.initial_state = p.final_state;
  const auto step = [&] { cpu::recurrent_gated_delta_rule(p); };
  if (o.repeats == 1) return step();
  const Copy copy(o.threads, 4 * bench.state_size() / o.threads);
  std::vector<double> steps, least, copies;
  for (int64_t i = 0; i < 2 * o.repeats; ++i) {
    const Time time = time_of(kSteps, step);
    steps.push_back(time.median);
    least.push_back(time.least);
    copies.push_back(copy.moved() / time_of(3, [&] { copy(); }).median);
  }
  for (auto* times : {&steps, &least, &copies}) std::sort(times->begin(), times->end());
  const double bytes = 8.0 * static_cast<double>(bench.state_size());
  const double median = steps[steps.size() / 2], copied = copies[copies.size() / 2];
  print_pass("decode step", o, dtype, {median, least[0]}, 0, bytes);
  std::printf(
      "  between the steps, copies within as much memory: %.0f GB/s; the step moves %.0f %%\n",
      copied * 1e-9, 100 * bytes / median / copied);
}

void run(const Options& o, DType dtype) {
  const Bench bench(o, dtype);
  const auto wanted = [&](std::string_view pass) { return o.pass.empty() || o.pass == pass; };
  const auto trained = [&] {
    GatedDeltaRuleForward p = bench.forward(o.tokens);
    p.segment_states = static_cast<float*>(bench.segments.data());
    cpu::chunk_gated_delta_rule(p);
  };
  if (wanted("forward")) {
    print_pass("forward", o, dtype, time_of(o.repeats, trained), chunked_operations(o, false), 0);
  }
  if (wanted("backward")) {
    trained();
    const Time time =
        time_of(o.repeats, [&] { cpu::chunk_gated_delta_rule_backward(bench.backward()); });
    print_pass("backward", o, dtype, time, chunked_operations(o, true), 0);
  }
  if (wanted("decode")) run_decode(o, dtype, bench);
}

}  // namespace

int main(int argc, char** argv) try {
  const Options options = parse(argc, argv);
  choose_target(options.target);
  pool.start(options.threads);
  std::printf("%s, H/HV %ld/%ld, K = V = %ld, T %ld\n", cpu::instruction_set(),
              static_cast<long>(options.key_heads), static_cast<long>(options.value_heads),
              static_cast<long>(options.head_dim), static_cast<long>(options.tokens));
  std::printf("| pass | threads | median, ms | least | rate |\n| --- | --- | --- | --- | --- |\n");
  if (options.pass.empty() || options.pass == "copy") {
    for (const int64_t kib : {32, 1024, 16 * 1024, 256 * 1024}) run_copy(options, kib << 10);
  }
  if (options.pass == "copy") return 0;
  for (const DType dtype : {DType::f32, DType::bf16}) {
    const std::string_view name = dtype == DType::f32 ? "f32" : "bf16";
    if (options.dtype.empty() || options.dtype == name) run(options, dtype);
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "gdn_bench_cpu_kernels: %s\n", error.what());
  return 1;
}
