// How the Hopper forward divides a problem over blocks: a function of shapes and of the number of
// multiprocessors alone, so that the same problem gives the same bits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>

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
  bool fused_outputs = false;  // of spans, by blocks that make T and P themselves: both halves
  int64_t lead_chunks = 0;     // by which a sequence's first span is longer then
  int64_t matrix_chunks = 16;  // of a block of the matrices' kernel
};

/// When the last of blocks is done that multiprocessors take in order, one at a time each.
class Queue {
 public:
  explicit Queue(int64_t multiprocessors) : free_({{0.0, multiprocessors}}) {}

  void add(int64_t blocks, double time) {
    while (blocks > 0) {
      const auto first = free_.begin();
      const int64_t count = std::min(blocks, first->second);
      const double end = first->first + time;
      if ((first->second -= count) == 0) free_.erase(first);
      free_[end] += count;
      end_ = std::max(end_, end);
      blocks -= count;
    }
  }
  double end() const { return end_; }

 private:
  std::map<double, int64_t> free_;  // how many multiprocessors, from when on
  double end_ = 0;
};

/// Expected time of plans, in microseconds, from measurements on one GPU (docs/hopper.md). A block
/// needs so much to begin and for each chunk; a multiprocessor has one block at a time, or two of
/// the matrices' kernel; and no kernel moves its bytes faster than memory does.
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
    if (!plan.split) {
      return kFixed + std::max(memory(total_chunks(), in_out()),
                               time(sequences_ * heads_ * parts(2), total_chunks() * parts(2),
                                    longest_, kFused));
    }
    return plan.fused_outputs ? fused(plan) : apart(plan);
  }

  /// Spans after the first whose outputs make no more than two rounds of blocks: what more would
  /// gain in evenness composing costs.
  int64_t most_later() const {
    return 2 * multiprocessors_ / std::max<int64_t>(1, sequences_ * heads_ * parts(2));
  }

  /// A plan of spans with fused outputs: `later` spans after each sequence's first, which takes
  /// about as long as the ends of `ends` of them.
  ForwardPlan fused_plan(int64_t later, int64_t ends) const {
    // (later + each) spans and `start` chunks make the longest sequence.
    const double each = static_cast<double>(ends) * kEnd[1] / kFused;
    const double start = static_cast<double>(ends - 1) * kStart / kFused;
    const double even =
        (static_cast<double>(longest_) - start) / (static_cast<double>(later) + each);
    const int64_t span =
        std::clamp<int64_t>(static_cast<int64_t>(even) + 1, 1, pieces(longest_, later + 1));
    ForwardPlan plan{.split = true, .span_chunks = span, .fused_outputs = true};
    plan.lead_chunks = std::max<int64_t>(0, longest_ - (later + 1) * span);
    plan.matrix_chunks = matrix_chunks(middle_spans(plan), span);
    return plan;
  }

  /// Chunks of a block of the matrices' kernel for so many stretches of `chunks` chunks: those that
  /// make the fewest and shortest rounds.
  int64_t matrix_chunks(int64_t stretches, int64_t chunks) const {
    constexpr int64_t kMost = 16;
    int64_t best = kMost;
    int64_t least = INT64_MAX;
    for (int64_t each = std::min(kMost, chunks); each >= 1; --each) {
      const int64_t time = matrix_rounds(stretches, chunks, each) * (each + kMatrixStart);
      if (time < least) {
        least = time;
        best = each;
      }
    }
    return best;
  }

 private:
  static constexpr double kFixed = 2;                 // of a kernel
  static constexpr double kStart = 7;                 // of a block, to begin
  static constexpr double kFused = 2.7;               // of a chunk; so are those that follow
  static constexpr double kEnd[2] = {0.75, 1.2};      // one half, two halves
  static constexpr double kOutput[2] = {1.15, 1.68};  // the same
  static constexpr double kMatrices = 2.8;
  static constexpr double kInverses = 2.2;        // T alone
  static constexpr int64_t kMatrixStart = 1;      // of a block of the two, in chunks
  static constexpr double kCompose = 2;           // of a span and round of blocks
  static constexpr double kTile = 16384 / 2.4e6;  // 64 tokens x 128 elements at 2.4 TB/s

  /// Four kernels: T and P; R and M; their composition; outputs.
  double apart(const ForwardPlan& plan) const {
    const int64_t span = plan.span_chunks > 0 ? plan.span_chunks : longest_;
    const int64_t total = total_chunks();
    double sum = 2 * kFixed + std::max(memory(total, 2 * key_tiles_ + 1),  // T and P are a tile
                                       matrices(1, total, plan, kMatrices));
    if (plan.span_chunks > 0) {
      const int64_t spans = pieces(longest_, span);
      const int64_t blocks = heads_ * (end_blocks(spans, plan) +
                                       (sequences_ - 1) * end_blocks(pieces(other_, span), plan));
      sum += 2 * kFixed + compose(spans - 2) +
             time(blocks, blocks * span, span, kEnd[plan.end_halves - 1]);
    }
    const int64_t columns = parts(plan.output_halves);
    const int64_t blocks =
        heads_ * columns * (pieces(longest_, span) + (sequences_ - 1) * pieces(other_, span));
    return sum + std::max(memory(total, in_out() + 1),
                          time(blocks, total * columns, std::min(span, longest_),
                               kOutput[plan.output_halves - 1]));
  }

  /// T of spans in the middle; outputs of first spans, R and M of those in the middle; composition;
  /// outputs of the others.
  double fused(const ForwardPlan& plan) const {
    const int64_t span = plan.span_chunks;
    const int64_t first = plan.lead_chunks + span;
    const int64_t others = sequences_ - 1;
    const int64_t middle = middle_spans(plan);
    const int64_t inverses = middle * span;
    double sum = 4 * kFixed + compose(later(longest_, plan) - 1);
    sum += std::max(memory(inverses, key_tiles_ + 0.5), matrices(middle, span, plan, kInverses));
    Queue queue(multiprocessors_);
    queue.add(heads_ * parts(2), block(std::min(first, longest_), kFused));
    queue.add(heads_ * others * parts(2), block(std::min(first, other_), kFused));
    queue.add(middle * (parts(2) + 1), block(span, kEnd[1]));
    const int64_t known = heads_ * (std::min(first, longest_) + others * std::min(first, other_));
    sum += std::max(memory(known, in_out()) + memory(inverses, key_tiles_ + value_tiles_ + 0.5),
                    queue.end());
    const int64_t rest = total_chunks() - known;
    const int64_t blocks = heads_ * (later(longest_, plan) + others * later(other_, plan));
    return sum +
           std::max(memory(rest, in_out()), time(blocks * parts(2), rest * parts(2), span, kFused));
  }

  double in_out() const { return 2 * key_tiles_ + 2 * value_tiles_; }  // tiles: Q, K; V, O

  /// So many tiles for each of so many chunks of a value head through memory.
  double memory(int64_t chunks, double tiles) const {
    return static_cast<double>(chunks) * tiles * kTile;
  }
  static int64_t chunks(int64_t tokens) { return (tokens + 63) / 64; }
  static int64_t pieces(int64_t chunks, int64_t span) {
    return std::max<int64_t>(1, (chunks + span - 1) / span);
  }
  /// One span after the other, a block 8 of V's columns.
  double compose(int64_t spans) const {
    const int64_t blocks = sequences_ * heads_ * 8 * halves_;
    const int64_t rounds = (blocks + multiprocessors_ - 1) / multiprocessors_;
    return kCompose * static_cast<double>(rounds * std::max<int64_t>(0, spans));
  }
  int64_t parts(int64_t halves) const { return (halves_ + halves - 1) / halves; }

  /// Spans of a sequence after its first; of all sequences and heads without the last ones too.
  static int64_t later(int64_t chunks, const ForwardPlan& plan) {
    return pieces(chunks - plan.lead_chunks, plan.span_chunks) - 1;
  }
  int64_t middle_spans(const ForwardPlan& plan) const {
    const auto middle = [&](int64_t chunks) {
      return std::max<int64_t>(0, later(chunks, plan) - 1);
    };
    return heads_ * (middle(longest_) + (sequences_ - 1) * middle(other_));
  }

  /// Rounds of blocks of the matrices' kernel.
  int64_t matrix_rounds(int64_t stretches, int64_t chunks, int64_t each) const {
    const int64_t places = 2 * multiprocessors_;
    return (stretches * ((chunks + each - 1) / each) + places - 1) / places;
  }

  /// Blocks of one sequence and head in the first pass: R of all spans but the last, M of those
  /// but the first as well.
  int64_t end_blocks(int64_t spans, const ForwardPlan& plan) const {
    return std::max<int64_t>(0, spans - 1) * parts(plan.end_halves) +
           std::max<int64_t>(0, spans - 2) * (2 / plan.end_halves);
  }

  double matrices(int64_t stretches, int64_t chunks, const ForwardPlan& plan, double each) const {
    const int64_t rounds = matrix_rounds(stretches, chunks, plan.matrix_chunks);
    return each * static_cast<double>(rounds * (plan.matrix_chunks + kMatrixStart));
  }

  static double block(int64_t chunks, double each) {
    return kStart + each * static_cast<double>(chunks);
  }

  /// Blocks of `chunks` chunks together, the longest of `most`.
  double time(int64_t blocks, int64_t chunks, int64_t most, double each) const {
    if (blocks == 0) return 0;
    const int64_t rounds = (blocks + multiprocessors_ - 1) / multiprocessors_;
    const double mean = static_cast<double>(chunks) / static_cast<double>(blocks);
    return std::max(block(most, each), static_cast<double>(rounds) * (kStart + each * mean));
  }

  int64_t sequences_, heads_, halves_, multiprocessors_;
  int64_t longest_, other_;         // chunks of a sequence
  double key_tiles_, value_tiles_;  // of K or V, a chunk and value head
};

/// Calls consider(plan) for every plan in question.
template <typename Consider>
void for_each_plan(const ForwardCost& cost, Consider consider) {
  constexpr int64_t kMostSpans = 64;
  const int64_t chunks = cost.longest_chunks();
  consider(ForwardPlan{});
  ForwardPlan plan{.split = true};
  plan.matrix_chunks = cost.matrix_chunks(1, cost.total_chunks());
  for (int64_t spans = 1; spans <= std::min(kMostSpans, chunks); ++spans) {
    plan.span_chunks = spans > 1 ? (chunks + spans - 1) / spans : 0;
    for (plan.end_halves = 1; plan.end_halves <= (spans > 1 ? 2 : 1); ++plan.end_halves) {
      for (plan.output_halves = 1; plan.output_halves <= 2; ++plan.output_halves) consider(plan);
    }
  }
  constexpr int64_t kLeastSpan = 8;
  for (int64_t later = 2; later <= std::min(cost.most_later(), chunks / kLeastSpan); ++later) {
    for (const int64_t ends : {2, 3, 4}) consider(cost.fused_plan(later, ends));
  }
}

/// The plan of least expected time. `longest`: tokens of the longest sequence.
inline ForwardPlan plan_forward(const GatedDeltaRuleProblem& p, int64_t longest,
                                int multiprocessors) {
  const ForwardCost cost(p, longest, multiprocessors);
  ForwardPlan best;
  double least = cost.of(best);
  for_each_plan(cost, [&](const ForwardPlan& plan) {
    if (const double time = cost.of(plan); time < least) {
      least = time;
      best = plan;
    }
  });
  return best;
}

/// Bytes of scratch memory that a plan takes; the lengths are bounded by their sum.
size_t forward_scratch(const GatedDeltaRuleProblem& p, const ForwardPlan& plan);

/// The forward by a given plan; `scratch` as gated_delta_rule_forward_sm90's.
void run_forward(const GatedDeltaRuleForward& p, const ForwardPlan& plan, void* scratch,
                 Stream stream);

}  // namespace gdn::kernels::cuda::sm90
