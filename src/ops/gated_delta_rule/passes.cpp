// The passes of the core operators: from tensors to the parameter structs of src/kernels, on the
// CPU and on CUDA.
#include <cmath>
#include <vector>

#include <ATen/ATen.h>
#include <torch/library.h>

#include <gdn/ops/cuda/run.h>
#include <gdn/ops/gated_delta_rule/core.h>
#include <gdn/ops/gated_delta_rule/dispatch.h>
#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>
#include <gdn/ops/utils/check.h>
#include <gdn/ops/utils/cu_seqlens.h>
#include <gdn/ops/utils/log_choice.h>
#include <gdn/ops/utils/parallel.h>
#include <gdn/ops/utils/result_memory.h>
#include <gdn/ops/utils/views.h>

namespace gdn {
namespace {

constexpr std::string_view kOp = "gated_delta_rule";

kernels::ConstView4 const_view(const at::Tensor& t) {
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

kernels::MutableView4 mutable_view(const at::Tensor& t) {
  return {t.mutable_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

/// The inputs as the kernels take them; owns whatever had to be copied.
struct PreparedInputs {
  at::Tensor q, k, v, g, beta;
  at::Tensor initial_state;  // undefined when absent
  std::optional<SequenceBoundaries> cu_seqlens;
  kernels::GatedDeltaRuleProblem problem;

  explicit PreparedInputs(const CoreArguments& a)
      : q(with_contiguous_rows(a.q)),
        k(with_contiguous_rows(a.k)),
        v(with_contiguous_rows(a.v)),
        g(a.g.contiguous()),
        beta(a.beta.contiguous()) {
    problem.B = q.size(0);
    problem.T = q.size(1);
    problem.H = q.size(2);
    problem.HV = v.size(2);
    problem.K = q.size(3);
    problem.V = v.size(3);
    problem.N = problem.B;
    if (a.cu_seqlens) {
      cu_seqlens.emplace(kOp, *a.cu_seqlens, problem.B, problem.T, q.device());
      problem.N = cu_seqlens->sequences();
      problem.cu_seqlens = cu_seqlens->data();
    }
    if (a.initial_state) {
      initial_state = a.initial_state->contiguous();
      problem.initial_state = initial_state.const_data_ptr();
    }
    problem.chunk_size = a.chunk_size;
    problem.dtype = kernel_dtype(q.scalar_type());
    problem.scale = a.scale.value_or(1 / std::sqrt(static_cast<double>(problem.K)));
    problem.qk_l2norm = a.use_qk_l2norm;
    problem.state_v_first = a.state_v_first;
    problem.q = const_view(q);
    problem.k = const_view(k);
    problem.v = const_view(v);
    problem.g = g.const_data_ptr();
    problem.beta = beta.const_data_ptr();
    problem.parallel_for = torch_parallel_for;
    problem.threads = at::get_num_threads();
  }
  PreparedInputs(const PreparedInputs&) = delete;
  PreparedInputs& operator=(const PreparedInputs&) = delete;

  at::TensorOptions gate_options() const { return g.options(); }

  /// Tokens of the longest sequence.
  int64_t longest() const { return cu_seqlens ? cu_seqlens->longest() : problem.T; }

  /// Segments of all sequences together.
  int64_t segments() const {
    kernels::GatedDeltaRuleProblem on_host = problem;
    if (cu_seqlens) on_host.cu_seqlens = cu_seqlens->host.data();
    return kernels::segment_count(on_host);
  }

  /// The parameters of a pass over these inputs, its own fields still empty.
  template <typename Parameters>
  Parameters parameters() const {
    Parameters p;
    static_cast<kernels::GatedDeltaRuleProblem&>(p) = problem;
    return p;
  }
};

/// check_arguments(), and the promise of the core operators that the gates are already computed.
void check_core_arguments(const CoreArguments& a) {
  check_arguments(kOp, a);
  const at::ScalarType dtype = statistics_dtype(a.q.scalar_type());
  if (a.g.scalar_type() != dtype) reject(kOp, "g", c10::toString(dtype), describe(a.g));
  if (a.beta.scalar_type() != dtype) reject(kOp, "beta", c10::toString(dtype), describe(a.beta));
}

void run_forward(GatedDeltaRulePass pass, const PreparedInputs& inputs,
                 const kernels::GatedDeltaRuleForward& p) {
  if (inputs.q.is_cuda()) {
    const bool recurrent = pass == GatedDeltaRulePass::recurrent_forward;
    return cuda::run(p, recurrent, inputs.longest(), inputs.q.device());
  }
  const KernelChoice choice = choose_kernel(pass, inputs.q.scalar_type());
  log_choice(choice.name, choice.reason);
  choice.forward(p);
}

void run_backward(const PreparedInputs& inputs, const kernels::GatedDeltaRuleBackward& p) {
  if (inputs.q.is_cuda()) return cuda::run(p, inputs.longest(), inputs.q.device());
  const KernelChoice choice = choose_kernel(GatedDeltaRulePass::backward, inputs.q.scalar_type());
  log_choice(choice.name, choice.reason);
  choice.backward(p);
}

/// Memory for the segment states, with zeros where none will be written.
at::Tensor allocate_segment_states(const CoreArguments& a, const PreparedInputs& inputs) {
  const kernels::GatedDeltaRuleProblem& p = inputs.problem;
  const int64_t capacity = segment_capacity(a).expect_int();
  const int64_t count = inputs.segments();
  at::Tensor states = empty_result({capacity, p.HV, p.K, p.V}, a.v.options().dtype(at::kFloat));
  states.narrow(0, count, capacity - count).zero_();
  return states;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& g,
    const at::Tensor& beta, const std::optional<at::Tensor>& initial_state,
    const std::optional<at::Tensor>& cu_seqlens, std::optional<double> scale, bool use_qk_l2norm,
    bool state_v_first, int64_t chunk_size, bool recurrent, bool output_final_state,
    bool save_segment_states) {
  const CoreArguments a{
      q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, state_v_first, chunk_size};
  check_core_arguments(a);
  if (recurrent && save_segment_states) {
    reject(kOp, "save_segment_states", "false for the recurrent form", "true");
  }
  const PreparedInputs inputs(a);
  auto p = inputs.parameters<kernels::GatedDeltaRuleForward>();

  const at::Tensor o = empty_result({p.B, p.T, p.HV, p.V}, v.options());
  at::Tensor final_state = at::empty({0}, inputs.gate_options());
  at::Tensor segment_states = at::empty({0}, v.options().dtype(at::kFloat));
  p.o = mutable_view(o);
  if (output_final_state) {
    final_state = empty_result(state_sizes(a), inputs.gate_options());
    p.final_state = final_state.mutable_data_ptr();
  }
  if (save_segment_states && keeps_segment_states(q.scalar_type())) {
    segment_states = allocate_segment_states(a, inputs);
    p.segment_states = segment_states.mutable_data_ptr<float>();
  }
  run_forward(recurrent ? GatedDeltaRulePass::recurrent_forward : GatedDeltaRulePass::chunk_forward,
              inputs, p);
  return {o, final_state, segment_states};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> backward(
    const at::Tensor& d_o, const std::optional<at::Tensor>& d_final_state, const at::Tensor& q,
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& g, const at::Tensor& beta,
    const std::optional<at::Tensor>& initial_state, const std::optional<at::Tensor>& cu_seqlens,
    const std::optional<at::Tensor>& segment_states, std::optional<double> scale,
    bool use_qk_l2norm, bool state_v_first, int64_t chunk_size) {
  const CoreArguments a{
      q, k, v, g, beta, initial_state, cu_seqlens, scale, use_qk_l2norm, state_v_first, chunk_size};
  check_core_arguments(a);
  check_shape(kOp, "d_o", d_o, v.sym_sizes(), "[B, T, HV, V]");
  if (d_final_state) {
    check_shape(kOp, "d_final_state", *d_final_state, state_sizes(a), state_dimensions(a));
  }
  const PreparedInputs inputs(a);
  auto p = inputs.parameters<kernels::GatedDeltaRuleBackward>();

  at::Tensor states;
  if (keeps_segment_states(q.scalar_type())) {
    if (segment_states) {
      const int64_t capacity = segment_capacity(a).expect_int();
      check_shape(kOp, "segment_states", *segment_states, {capacity, p.HV, p.K, p.V},
                  "[segments, HV, K, V]");
      states = segment_states->contiguous();
    } else {
      states = allocate_segment_states(a, inputs);
      auto replay = inputs.parameters<kernels::GatedDeltaRuleForward>();
      replay.segment_states = states.mutable_data_ptr<float>();
      run_forward(GatedDeltaRulePass::chunk_forward, inputs, replay);
    }
    p.segment_states = states.const_data_ptr<float>();
  }

  const at::Tensor d_o_rows = with_contiguous_rows(d_o.to(v.scalar_type()));
  p.d_o = const_view(d_o_rows);
  at::Tensor d_final;
  if (d_final_state) {
    d_final = d_final_state->to(g.scalar_type()).contiguous();
    p.d_final_state = d_final.const_data_ptr();
  }
  const at::Tensor d_q = empty_result(q.sym_sizes(), q.options());
  const at::Tensor d_k = empty_result(k.sym_sizes(), k.options());
  const at::Tensor d_v = empty_result(v.sym_sizes(), v.options());
  const at::Tensor d_g = at::empty(g.sizes(), g.options());
  const at::Tensor d_beta = at::empty(beta.sizes(), beta.options());
  const at::Tensor d_initial_state = initial_state
                                         ? empty_result(initial_state->sym_sizes(), g.options())
                                         : at::empty({0}, g.options());
  p.d_q = mutable_view(d_q);
  p.d_k = mutable_view(d_k);
  p.d_v = mutable_view(d_v);
  p.d_g = d_g.mutable_data_ptr();
  p.d_beta = d_beta.mutable_data_ptr();
  if (initial_state) p.d_initial_state = d_initial_state.mutable_data_ptr();

  run_backward(inputs, p);
  return {d_q, d_k, d_v, d_g, d_beta, d_initial_state};
}

at::Tensor update(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                  const at::Tensor& g, const at::Tensor& beta, at::Tensor& state,
                  const std::optional<at::Tensor>& cu_seqlens, std::optional<double> scale,
                  bool use_qk_l2norm, bool state_v_first) {
  const std::optional<at::Tensor> initial_state = state;
  const CoreArguments a{q,
                        k,
                        v,
                        g,
                        beta,
                        initial_state,
                        cu_seqlens,
                        scale,
                        use_qk_l2norm,
                        state_v_first,
                        /*chunk_size=*/64,
                        "state",
                        /*may_round_state=*/true};
  check_core_arguments(a);
  const PreparedInputs inputs(a);
  auto p = inputs.parameters<kernels::GatedDeltaRuleForward>();
  const at::Tensor o = at::empty({p.B, p.T, p.HV, p.V}, v.options());
  p.o = mutable_view(o);
  p.final_state = inputs.initial_state.mutable_data_ptr();
  p.state_dtype = kernel_dtype(inputs.initial_state.scalar_type());
  run_forward(GatedDeltaRulePass::recurrent_forward, inputs, p);
  if (!inputs.initial_state.is_same(state)) state.copy_(inputs.initial_state);
  return o;
}

void check_step(const at::Tensor& q, const at::Tensor& a, const at::Tensor& b,
                const at::Tensor& A_log, const at::Tensor& dt_bias, int64_t HV) {
  constexpr std::string_view kStep = "gated_delta_rule_step";
  check_like(kStep, "a", a, "q", q);
  check_like(kStep, "b", b, "q", q);
  check_shape(kStep, "A_log", A_log, {HV}, "[HV]");
  check_shape(kStep, "dt_bias", dt_bias, {HV}, "[HV]");
  for (const auto& [name, tensor] : {std::pair("A_log", A_log), std::pair("dt_bias", dt_bias)}) {
    if (tensor.scalar_type() != statistics_dtype(q.scalar_type()) ||
        tensor.device() != q.device() || !tensor.is_contiguous()) {
      reject(kStep, name,
             std::string("contiguous ") + c10::toString(statistics_dtype(q.scalar_type())) +
                 " on " + q.device().str(),
             describe(tensor));
    }
  }
}

at::Tensor step_on_cpu(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const at::Tensor& a, const at::Tensor& b, at::Tensor& state,
                       const at::Tensor& A_log, const at::Tensor& dt_bias, bool allow_neg_eigval,
                       std::optional<double> scale, bool use_qk_l2norm, bool state_v_first,
                       bool /*overlap*/) {
  check_step(q, a, b, A_log, dt_bias, v.size(2));
  const at::Tensor beta = b.to(A_log.scalar_type()).sigmoid();
  return update(q, k, v, gated_delta_rule_gate(a, A_log, dt_bias),
                allow_neg_eigval ? beta * 2 : beta, state, std::nullopt, scale, use_qk_l2norm,
                state_v_first);
}

at::Tensor step_on_cuda(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                        const at::Tensor& a, const at::Tensor& b, at::Tensor& state,
                        const at::Tensor& A_log, const at::Tensor& dt_bias, bool allow_neg_eigval,
                        std::optional<double> scale, bool use_qk_l2norm, bool state_v_first,
                        bool overlap) {
  const std::optional<at::Tensor> initial_state = state;
  const std::optional<at::Tensor> no_cu_seqlens;
  const CoreArguments arguments{q,
                                k,
                                v,
                                a,
                                b,
                                initial_state,
                                no_cu_seqlens,
                                scale,
                                use_qk_l2norm,
                                state_v_first,
                                /*chunk_size=*/64,
                                "state"};
  check_arguments("gated_delta_rule_step", arguments);
  check_step(q, a, b, A_log, dt_bias, v.size(2));
  if (!state.is_contiguous()) reject("gated_delta_rule_step", "state", "contiguous", "strides");
  const PreparedInputs inputs(arguments);
  auto p = inputs.parameters<kernels::cuda::RecurrentGatedDeltaRule>();
  const at::Tensor o = at::empty({p.B, p.T, p.HV, p.V}, v.options());
  const at::Tensor a_rows = with_contiguous_rows(a), b_rows = with_contiguous_rows(b);
  p.o = mutable_view(o);
  p.final_state = state.mutable_data_ptr();
  p.a = const_view3(a_rows);
  p.beta_logits = const_view3(b_rows);
  p.beta_factor = allow_neg_eigval ? 2.0F : 1.0F;
  p.A_log = A_log.const_data_ptr<float>();
  p.dt_bias = dt_bias.const_data_ptr<float>();
  p.overlap = overlap;
  cuda::run(p, q.device());
  return o;
}

std::tuple<at::Tensor, at::Tensor> token_states(const at::Tensor& q, const at::Tensor& k,
                                                const at::Tensor& v, const at::Tensor& g,
                                                const at::Tensor& beta,
                                                const std::optional<at::Tensor>& initial_state,
                                                std::optional<double> scale, bool use_qk_l2norm,
                                                bool state_v_first) {
  const std::optional<at::Tensor> no_cu_seqlens;
  const CoreArguments a{q,
                        k,
                        v,
                        g,
                        beta,
                        initial_state,
                        no_cu_seqlens,
                        scale,
                        use_qk_l2norm,
                        state_v_first,
                        /*chunk_size=*/64};
  check_core_arguments(a);
  const PreparedInputs inputs(a);
  auto p = inputs.parameters<kernels::cuda::RecurrentGatedDeltaRule>();
  const at::Tensor o = at::empty({p.B, p.T, p.HV, p.V}, v.options());
  at::DimVector sizes = {p.B, p.T, p.HV, p.K, p.V};
  if (state_v_first) std::swap(sizes[3], sizes[4]);
  const at::Tensor states = at::empty(sizes, inputs.gate_options());
  if (q.is_cuda()) {
    p.o = mutable_view(o);
    p.token_states = states.mutable_data_ptr<float>();
    cuda::run(p, q.device());
    return {o, states};
  }
  // Token by token: the state after one is where the next begins.
  const KernelChoice choice = choose_kernel(GatedDeltaRulePass::recurrent_forward, q.scalar_type());
  log_choice(choice.name, choice.reason);
  for (int64_t b = 0; b < inputs.problem.B; ++b) {
    for (int64_t t = 0; t < inputs.problem.T; ++t) {
      const auto token = [&](const at::Tensor& x) { return x[b][t][0]; };
      auto one = inputs.parameters<kernels::GatedDeltaRuleForward>();
      one.B = one.T = one.N = 1;
      one.q.data = token(inputs.q).const_data_ptr();
      one.k.data = token(inputs.k).const_data_ptr();
      one.v.data = token(inputs.v).const_data_ptr();
      one.g = token(inputs.g).const_data_ptr();
      one.beta = token(inputs.beta).const_data_ptr();
      one.o = mutable_view(o);
      one.o.data = token(o).mutable_data_ptr();
      if (t > 0) {
        one.initial_state = states[b][t - 1].const_data_ptr();
      } else if (initial_state) {
        one.initial_state = inputs.initial_state[b].const_data_ptr();
      }
      one.final_state = states[b][t].mutable_data_ptr();
      choice.forward(one);
    }
  }
  return {o, states};
}

}  // namespace
}  // namespace gdn

TORCH_LIBRARY_IMPL(gdn, CPU, m) {
  m.impl("gated_delta_rule_forward", gdn::forward);
  m.impl("gated_delta_rule_backward", gdn::backward);
  m.impl("gated_delta_rule_update", gdn::update);
  m.impl("gated_delta_rule_step", gdn::step_on_cpu);
  m.impl("gated_delta_rule_token_states", gdn::token_states);
}

TORCH_LIBRARY_IMPL(gdn, CUDA, m) {
  m.impl("gated_delta_rule_forward", gdn::forward);
  m.impl("gated_delta_rule_backward", gdn::backward);
  m.impl("gated_delta_rule_update", gdn::update);
  m.impl("gated_delta_rule_step", gdn::step_on_cuda);
  m.impl("gated_delta_rule_token_states", gdn::token_states);
}
