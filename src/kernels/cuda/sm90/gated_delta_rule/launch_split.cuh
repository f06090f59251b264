// Arguments, scratch memory and launches of the Hopper forward's several kernels.
#pragma once

#include <gdn/kernels/cuda/sm90/gated_delta_rule/compose.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/forward_plan.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/split.cuh>

namespace gdn::kernels::cuda::sm90 {

/// Arrays in scratch memory, each a multiple of 128 bytes.
struct SplitScratch {
  int64_t v_rows;                   // V in whole blocks
  int64_t chunks, spans;            // pieces of all sequences, at most
  int64_t later, middle;            // spans but the first ones, and but the last ones too

  SplitScratch(const GatedDeltaRuleProblem& p, const ForwardPlan& plan)
      : v_rows((p.V + kHeadDim - 1) / kHeadDim * kHeadDim),
        chunks(most_pieces(p, kChunk)),
        spans(plan.span_chunks > 0 ? most_spans(p, plan, 0, 1) : p.N),
        later(plan.span_chunks > 0 ? std::min(spans, most_spans(p, plan, 1)) : 0),
        middle(plan.span_chunks > 0 ? std::min(spans, most_spans(p, plan, 2)) : 0) {}

  int64_t matrices_bytes(const GatedDeltaRuleProblem& p) const {
    return chunks * p.HV * kChunkMatricesBytes;
  }
  int64_t states(const GatedDeltaRuleProblem& p) const { return spans * p.HV * v_rows * kHeadDim; }
  size_t bytes(const GatedDeltaRuleProblem& p, const ForwardPlan& plan) const {
    const int64_t floats = plan.span_chunks > 0 ? states(p) + spans * p.HV * kStateSize : 0;
    return static_cast<size_t>(matrices_bytes(p)) + static_cast<size_t>(floats) * sizeof(float);
  }

 private:
  /// Without the `less` first ones of every sequence, which has at least `least`.
  static int64_t most_spans(const GatedDeltaRuleProblem& p, const ForwardPlan& plan, int64_t less,
                            int64_t least = 0) {
    const int64_t lead = (plan.lead_chunks + less * plan.span_chunks) * kChunk;
    return most_pieces(p, plan.span_chunks * kChunk, least, kWholeSequence, lead);
  }
};

inline SplitArguments split_arguments(const GatedDeltaRuleForward& p, const ForwardPlan& plan,
                                      void* scratch) {
  const SplitScratch layout(p, plan);
  SplitArguments arguments{};
  static_cast<ForwardArguments&>(arguments) = forward_arguments(p);
  arguments.matrices = static_cast<uint8_t*>(scratch);
  arguments.matrix_tokens = static_cast<int>(plan.matrix_chunks * kChunk);
  arguments.span_tokens =
      plan.span_chunks > 0 ? static_cast<int>(plan.span_chunks * kChunk) : INT32_MAX;
  arguments.lead_tokens = static_cast<int>(plan.lead_chunks * kChunk);
  arguments.v_rows = static_cast<int>(layout.v_rows);
  arguments.span_states = reinterpret_cast<float*>(arguments.matrices + layout.matrices_bytes(p));
  arguments.transitions = arguments.span_states + layout.states(p);
  return arguments;
}

template <typename Element>
void launch_matrices(const GatedDeltaRuleForward& p, const ForwardPlan& plan,
                     const SplitArguments& arguments, Stream stream) {
  const int64_t parts = (plan.span_chunks + plan.matrix_chunks - 1) / plan.matrix_chunks;
  const int64_t pieces = plan.fused_outputs ? SplitScratch(p, plan).middle * parts
                                            : most_pieces(p, plan.matrix_chunks * kChunk);
  if (pieces == 0) return;
  launch(plan.fused_outputs ? gated_delta_rule_matrices_kernel<Element, false>
                            : gated_delta_rule_matrices_kernel<Element, true>,
         arguments, pieces * p.HV, kMatricesThreads, sizeof(MatricesShared),
         "gated_delta_rule_forward_sm90: matrices", stream);
}

inline void launch_compose(const GatedDeltaRuleForward& p, const SplitArguments& arguments,
                           Stream stream) {
  const ComposeArguments compose = {arguments,
                                    arguments.span_tokens,
                                    arguments.lead_tokens,
                                    arguments.v_rows,
                                    arguments.span_states,
                                    arguments.transitions};
  launch(compose_spans_kernel, compose, p.N * p.HV * (arguments.v_rows / kComposeColumns),
         kComposeThreads, 0, "gated_delta_rule_forward_sm90: compose", stream, Start::kEarly);
}

template <typename Element, Scan kScan>
void launch_scan(const GatedDeltaRuleForward& p, const ForwardPlan& plan,
                 const SplitArguments& arguments, Stream stream) {
  const int halves = kScan == Scan::kEnd ? plan.end_halves : plan.output_halves;
  const int columns = halves * kHalf;  // of a block
  const int64_t parts = (p.V + columns - 1) / columns + (kScan == Scan::kEnd ? 2 / halves : 0);
  const int64_t blocks = SplitScratch(p, plan).spans * p.HV * parts;
  constexpr const char* kName = "gated_delta_rule_forward_sm90: scan";
  const auto launch_halves = [&]<int kHalves, typename Needs>(Needs) {
    launch(gated_delta_rule_split_kernel<Element, kHalves, Needs, kScan>, arguments, blocks,
           kSplitThreads<kHalves>, sizeof(SplitShared<kHalves>), kName, stream, Start::kEarly);
  };
  const auto launch_needs = [&](auto needs) {
    halves == 1 ? launch_halves.template operator()<1>(needs)
                : launch_halves.template operator()<2>(needs);
  };
  // The loop that keeps no states has no bounds in it.
  if constexpr (kScan == Scan::kEnd) {
    launch_needs(AnySizes());
  } else {
    with_needs(arguments, launch_needs);
  }
}

template <typename Element>
void launch_first_pass(const GatedDeltaRuleForward& p, const ForwardPlan& plan,
                       const SplitArguments& arguments, Stream stream) {
  const int64_t slices = (p.V + kHeadDim - 1) / kHeadDim;
  const int64_t middle = SplitScratch(p, plan).middle;
  // Outputs do not wait for the matrices' kernel; without it, for nothing that they know of.
  const Start start = middle > 0 ? Start::kEarly : Start::kAfterPrevious;
  with_needs(arguments, [&](auto needs) {
    launch(gated_delta_rule_first_pass_kernel<Element, decltype(needs)>, arguments,
           (p.N * slices + middle * (slices + 1)) * p.HV, kThreads, sizeof(SharedMemory),
           "gated_delta_rule_forward_sm90: first pass", stream, start);
  });
}

template <typename Element>
void launch_later_outputs(const GatedDeltaRuleForward& p, const ForwardPlan& plan,
                          const SplitArguments& arguments, Stream stream) {
  const int64_t slices = (p.V + kHeadDim - 1) / kHeadDim;
  const int64_t blocks = SplitScratch(p, plan).later * p.HV * slices;
  if (blocks == 0) return;
  with_needs(arguments, [&](auto needs) {
    launch(gated_delta_rule_span_outputs_kernel<Element, decltype(needs)>, arguments, blocks,
           kThreads, sizeof(SharedMemory), "gated_delta_rule_forward_sm90: later outputs", stream,
           Start::kEarly);
  });
}

template <typename Element>
void launch_split(const GatedDeltaRuleForward& p, const ForwardPlan& plan, void* scratch,
                  Stream stream) {
  const SplitArguments arguments = split_arguments(p, plan, scratch);
  launch_matrices<Element>(p, plan, arguments, stream);
  if (plan.fused_outputs) {
    launch_first_pass<Element>(p, plan, arguments, stream);
    launch_compose(p, arguments, stream);
    launch_later_outputs<Element>(p, plan, arguments, stream);
    return;
  }
  if (plan.span_chunks > 0) {
    launch_scan<Element, Scan::kEnd>(p, plan, arguments, stream);
    launch_compose(p, arguments, stream);
  }
  launch_scan<Element, Scan::kOutputs>(p, plan, arguments, stream);
}

}  // namespace gdn::kernels::cuda::sm90
