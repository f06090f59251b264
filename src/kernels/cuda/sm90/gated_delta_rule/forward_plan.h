// How the Hopper forward divides a problem over blocks: a function of shapes and of the number of
// multiprocessors alone, so that the same problem gives the same bits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include <gdn/kernels/cuda/stream.h>
#include <gdn/kernels/gated_delta_rule.h>

namespace gdn::kernels::cuda::sm90 {

/// One kernel (forward.cuh), or several (split.cuh) in which sequences may be cut into spans.
struct ForwardPlan {
  bool split = false;
  // Of the several kernels alone:
  int64_t span_chunks = 0;     // 64 tokens each; 0: sequences are whole
  int end_halves = 2;          // halves of V, 64 columns each, of a block: spans' ends,
  int output_halves = 2;       // outputs
  bool fused_outputs = false;  // by blocks that make T and P themselves, both halves each; of spans
  int64_t matrix_chunks = 16;  // of a block of the matrices' kernel
};

/// Expected time of plans, in microseconds, from measurements on one GPU (docs/hopper.md). A block
/// needs so much for each chunk; a multiprocessor has one block at a time, or two of the matrices'
/// kernel; and no kernel moves its bytes faster than memory does.
class ForwardCost {
 public:
  /// Of the lengths only the sum and the largest are known to the host: the other sequences are
  /// taken to be equal.
  ForwardCost(const GatedDeltaRuleProblem& p, int64_t longest, int multiprocessors)
      : sequences_(p.N),
        heads_(p.HV),
        halves_((p.V + 63) / 64),
        multiprocessors_(multiprocessors),
        longest_(chunks(longest)),
        other_(p.N > 1 ? chunks((p.B * p.T - longest + p.N - 2) / (p.N - 1)) : 0),
        key_tiles_(p.HV > 0 ? static_cast<double>(p.H) / static_cast<double>(p.HV) : 1),
        value_tiles_(static_cast<double>(p.V) / 128) {}

  int64_t longest_chunks() const { return longest_; }
  int64_t total_chunks() const { return heads_ * (longest_ + (sequences_ - 1) * other_); }

  double of(const ForwardPlan& plan) const {
    const double io = 2 * key_tiles_ + 2 * value_tiles_;  // Q, K; V, O
    if (!plan.split) {
      return kFixed + std::max(memory(io), time(sequences_ * heads_ * parts(2),
                                                total_chunks() * parts(2), longest_, 1, kFused));
    }
    const int64_t span = plan.span_chunks > 0 ? plan.span_chunks : longest_;
    // T and P are a tile.
    double sum = 2 * kFixed;
    const double inverses =  // T alone, of all spans but the last ones
        plan.fused_outputs ? 1 - 1 / static_cast<double>(pieces(longest_, span)) : 1;
    const auto matrices = static_cast<int64_t>(inverses * static_cast<double>(total_chunks()));
    sum += std::max(
        plan.fused_outputs ? inverses * memory(key_tiles_ + 0.5) : memory(2 * key_tiles_ + 1),
        time((matrices + plan.matrix_chunks - 1) / plan.matrix_chunks, matrices, plan.matrix_chunks,
             2, plan.fused_outputs ? kInverses : kMatrices));
    if (plan.span_chunks > 0) {
      const int64_t spans = pieces(longest_, span);
      const int64_t blocks = heads_ * (end_blocks(spans, plan) +
                                       (sequences_ - 1) * end_blocks(pieces(other_, span), plan));
      sum += 2 * kFixed + kCompose * static_cast<double>(spans) +
             std::max(memory(key_tiles_ + value_tiles_ + 0.5),
                      time(blocks, blocks * span, span, 1, kEnd[plan.end_halves - 1]));
    }
    const bool fused = plan.fused_outputs;
    const int64_t columns = parts(fused ? 2 : plan.output_halves);
    const int64_t blocks =
        heads_ * columns * (pieces(longest_, span) + (sequences_ - 1) * pieces(other_, span));
    return sum + std::max(memory(fused ? io : io + 1),
                          time(blocks, total_chunks() * columns, std::min(span, longest_), 1,
                               fused ? kFused : kOutput[plan.output_halves - 1]));
  }

 private:
  static constexpr double kFixed = 4;  // of a kernel
  static constexpr double kFused = 2.6;
  static constexpr double kMatrices = 3.2;
  static constexpr double kInverses = 2.4;           // T alone
  static constexpr double kEnd[2] = {0.92, 1.42};    // one half, two halves
  static constexpr double kOutput[2] = {1.5, 2.15};  // the same
  static constexpr double kCompose = 1.9;            // a span
  static constexpr double kTile = 16384 / 2.4e6;     // 64 tokens x 128 elements at 2.4 TB/s

  /// So many tiles a chunk and value head through memory.
  double memory(double tiles) const { return static_cast<double>(total_chunks()) * tiles * kTile; }
  static int64_t chunks(int64_t tokens) { return (tokens + 63) / 64; }
  static int64_t pieces(int64_t chunks, int64_t span) {
    return std::max<int64_t>(1, (chunks + span - 1) / span);
  }
  int64_t parts(int64_t halves) const { return (halves_ + halves - 1) / halves; }

  /// Blocks of one sequence and head in the first pass: R of all spans but the last, M of those
  /// but the first as well.
  int64_t end_blocks(int64_t spans, const ForwardPlan& plan) const {
    return std::max<int64_t>(0, spans - 1) * parts(plan.end_halves) +
           std::max<int64_t>(0, spans - 2) * (2 / plan.end_halves);
  }

  /// Blocks of `chunks` chunks together, the longest of `most`, `resident` at a time on each
  /// multiprocessor.
  double time(int64_t blocks, int64_t chunks, int64_t most, int resident, double each) const {
    if (blocks == 0) return 0;
    const int64_t places = int64_t{multiprocessors_} * resident;
    const int64_t waves = (blocks + places - 1) / places;
    const double mean = static_cast<double>(chunks) / static_cast<double>(blocks);
    return each * std::max(static_cast<double>(most), static_cast<double>(waves) * mean);
  }

  int64_t sequences_, heads_, halves_, multiprocessors_;
  int64_t longest_, other_;         // chunks of a sequence
  double key_tiles_, value_tiles_;  // of K or V, a chunk and value head
};

/// The plan of least expected time. `longest`: tokens of the longest sequence.
inline ForwardPlan plan_forward(const GatedDeltaRuleProblem& p, int64_t longest,
                                int multiprocessors) {
  constexpr int64_t kMostSpans = 64;
  const ForwardCost cost(p, longest, multiprocessors);
  ForwardPlan best;
  double least = cost.of(best);
  ForwardPlan plan{.split = true};
  // Blocks of the matrices' kernel: one round of them if they are short enough to be balanced.
  const int64_t each = (cost.total_chunks() + 2 * multiprocessors - 1) / (2 * multiprocessors);
  plan.matrix_chunks = std::clamp<int64_t>(each, 1, 16);
  const int64_t longest_chunks = cost.longest_chunks();
  const auto consider = [&] {
    if (const double time = cost.of(plan); time < least) {
      least = time;
      best = plan;
    }
  };
  for (int64_t spans = 1; spans <= std::min(kMostSpans, longest_chunks); ++spans) {
    plan.span_chunks = spans > 1 ? (longest_chunks + spans - 1) / spans : 0;
    for (plan.end_halves = 1; plan.end_halves <= 2; ++plan.end_halves) {
      for (plan.output_halves = 1; plan.output_halves <= 2; ++plan.output_halves) consider();
      plan.output_halves = 2;
      plan.fused_outputs = spans > 1;
      consider();
      plan.fused_outputs = false;
    }
  }
  return best;
}

/// Bytes of scratch memory that a plan takes; the lengths are bounded by their sum.
size_t forward_scratch(const GatedDeltaRuleProblem& p, const ForwardPlan& plan);

/// The forward by a given plan; `scratch` as gated_delta_rule_forward_sm90's.
void run_forward(const GatedDeltaRuleForward& p, const ForwardPlan& plan, void* scratch,
                 Stream stream);

}  // namespace gdn::kernels::cuda::sm90
