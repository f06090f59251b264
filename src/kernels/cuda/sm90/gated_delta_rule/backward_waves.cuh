// The waves of a backward (backward_plan.h): the problem narrowed to some heads and a window.
#pragma once

#include <algorithm>
#include <type_traits>

#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward.cuh>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/backward_plan.h>
#include <gdn/kernels/cuda/sm90/gated_delta_rule/launch.cuh>

namespace gdn::kernels::cuda::sm90 {

/// A problem of `key_heads` key heads instead of p's, as far as sizes go.
inline GatedDeltaRuleProblem with_heads(const GatedDeltaRuleProblem& p, int64_t key_heads) {
  GatedDeltaRuleProblem part = p;
  part.H = key_heads;
  part.HV = p.HV / p.H * key_heads;
  return part;
}

/// The heads of a tensor of 16-bit elements from `head` on.
template <typename Void>
View4<Void> from_head(View4<Void> view, int64_t head) {
  using Element = std::conditional_t<std::is_const_v<Void>, const uint16_t, uint16_t>;
  view.data = static_cast<Element*>(view.data) + head * view.stride_h;
  return view;
}

/// Bytes that dS takes between windows.
inline size_t carry_bytes(const GatedDeltaRuleProblem& p) {
  return static_cast<size_t>(p.N * p.HV * p.K * p.V) * sizeof(float);
}

/// What both backwards are given for a wave of `plan`, but scratch memory.
template <typename Arguments>
void set_wave(const GatedDeltaRuleBackward& p, const BackwardPlan& plan, int64_t first_key_head,
              int64_t window, Arguments& arguments) {
  const int64_t first = p.HV / p.H * first_key_head;  // value head
  GatedDeltaRuleProblem part = with_heads(p, std::min(plan.key_heads, p.H - first_key_head));
  part.q = from_head(p.q, first_key_head);
  part.k = from_head(p.k, first_key_head);
  part.v = from_head(p.v, first);
  set_problem(part, arguments);
  arguments.all_heads = static_cast<int>(p.HV);
  arguments.window_begin = window * plan.window_tokens;
  arguments.window_tokens = plan.window_tokens;
  arguments.g += first;
  arguments.beta += first;
  arguments.d_o_view = from_head(p.d_o, first);
  arguments.d_q = from_head(p.d_q, first_key_head);
  arguments.d_k = from_head(p.d_k, first_key_head);
  arguments.d_v_view = from_head(p.d_v, first);
  arguments.d_o = tensor_map(part, arguments.d_o_view, part.HV, p.V);
  arguments.d_v = tensor_map(part, arguments.d_v_view, part.HV, p.V);
  arguments.d_g = static_cast<float*>(p.d_g) + first;
  arguments.d_beta = static_cast<float*>(p.d_beta) + first;
  const int64_t states = first * p.K * p.V;
  arguments.segment_states = p.segment_states + states;
  if (p.d_final_state != nullptr) {
    arguments.d_final_state = static_cast<const float*>(p.d_final_state) + states;
  }
  if (p.d_initial_state != nullptr) {
    arguments.d_initial_state = static_cast<float*>(p.d_initial_state) + states;
  }
}

/// Calls body(first key head, window) for every wave, in the order in which they must be done.
template <typename Body>
void for_each_wave(const GatedDeltaRuleProblem& p, const BackwardPlan& plan, const Body& body) {
  for (int64_t head = 0; head < p.H; head += plan.key_heads) {
    for (int64_t window = plan.windows - 1; window >= 0; --window) body(head, window);
  }
}

/// Pieces that a wave has at most.
inline int64_t most_pieces_of_wave(const ProblemArguments& arguments, int64_t tokens) {
  return most_pieces(arguments, tokens, 0, arguments.window_tokens);
}

}  // namespace gdn::kernels::cuda::sm90
