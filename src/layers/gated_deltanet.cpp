#include <cmath>

#include <ATen/ATen.h>

#include <gdn/layers/gated_deltanet.h>
#include <gdn/layers/packing.h>
#include <gdn/layers/recompute.h>
#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>
#include <gdn/ops/utils/check.h>

namespace gdn {
namespace {

constexpr const char* kName = "GatedDeltaNet";
/// Up to here the recurrent form is the faster one for inference.
constexpr int64_t kRecurrentTokens = 64;

Linear linear(int64_t in, int64_t out) {
  return Linear(LinearOptions{.in_features = in, .out_features = out});
}

void check_options(const GatedDeltaNetOptions& options, int64_t HV, double V) {
  const auto require = [](bool holds, const char* field, const char* expected, auto value) {
    if (!holds) reject(kName, field, expected, std::to_string(value));
  };
  require(options.hidden_size > 0, "hidden_size", "positive", options.hidden_size);
  require(options.head_dim > 0, "head_dim", "positive", options.head_dim);
  require(options.num_heads > 0, "num_heads", "positive", options.num_heads);
  require(HV > 0 && HV % options.num_heads == 0, "num_v_heads", "a multiple of num_heads", HV);
  require(V >= 1 && std::abs(V - std::round(V)) <= 1e-5 * V, "expand_v",
          "such that head_dim * expand_v is a whole number", options.expand_v);
  if (options.mode != "chunk" && options.mode != "fused_recurrent") {
    reject(kName, "mode", "\"chunk\" or \"fused_recurrent\"", '"' + options.mode + '"');
  }
}

}  // namespace

GatedDeltaNetImpl::GatedDeltaNetImpl(const GatedDeltaNetOptions& options) : options(options) {
  const double V = static_cast<double>(options.head_dim) * options.expand_v;
  value_heads_ = options.num_v_heads.value_or(options.num_heads);
  check_options(options, value_heads_, V);
  head_v_dim_ = std::llround(V);
  reset();
}

void GatedDeltaNetImpl::reset() {
  const int64_t D = options.hidden_size;
  const int64_t key_dim = options.num_heads * options.head_dim;
  const int64_t value_dim = value_heads_ * head_v_dim_;
  q_proj = register_module("q_proj", linear(D, key_dim));
  k_proj = register_module("k_proj", linear(D, key_dim));
  v_proj = register_module("v_proj", linear(D, value_dim));
  a_proj = register_module("a_proj", linear(D, value_heads_));
  b_proj = register_module("b_proj", linear(D, value_heads_));
  A_log = register_parameter("A_log", torch::empty({value_heads_}, torch::kFloat));
  dt_bias = register_parameter("dt_bias", torch::empty({value_heads_}, torch::kFloat));
  reset_gate_parameters();
  if (options.use_short_conv) {
    const auto convolution = [&](int64_t channels) {
      return ShortConvolution(ShortConvolutionOptions{
          .channels = channels, .kernel_size = options.conv_size, .bias = options.conv_bias});
    };
    q_conv1d = register_module("q_conv1d", convolution(key_dim));
    k_conv1d = register_module("k_conv1d", convolution(key_dim));
    v_conv1d = register_module("v_conv1d", convolution(value_dim));
  }
  if (options.use_gate) {
    g_proj = register_module("g_proj", linear(D, value_dim));
    gated_norm_ = register_module("o_norm", FusedRMSNormGated(FusedRMSNormGatedOptions{
                                                .size = head_v_dim_, .eps = options.norm_eps}));
  } else {
    plain_norm_ = register_module(
        "o_norm", RMSNorm(RMSNormOptions{.size = head_v_dim_, .eps = options.norm_eps}));
  }
  o_proj = register_module("o_proj", linear(value_dim, D));
}

void GatedDeltaNetImpl::reset_gate_parameters() {
  const torch::NoGradGuard no_grad;
  constexpr double kMinStep = 1e-3, kMaxStep = 1e-1, kStepFloor = 1e-4;
  A_log.uniform_(0, 16).log_();
  const at::Tensor step = at::empty_like(dt_bias)
                              .uniform_(std::log(kMinStep), std::log(kMaxStep))
                              .exp_()
                              .clamp_min_(kStepFloor);
  dt_bias.copy_(step + (-(-step).expm1()).log());  // softplus(dt_bias) = step
}

at::Tensor GatedDeltaNetImpl::forward(const MixerInput& input) {
  return mix_packed(kName, input, options.hidden_size,
                    [&](const at::Tensor& hidden_states, const auto& cu_seqlens) {
                      return mix(hidden_states, cu_seqlens, input.cache);
                    });
}

at::Tensor GatedDeltaNetImpl::mix(const at::Tensor& hidden_states,
                                  const std::optional<at::Tensor>& cu_seqlens, LayerCache* cache) {
  const int64_t N = cu_seqlens ? cu_seqlens->numel() - 1 : hidden_states.size(0);
  if (cache != nullptr && cache->recurrent_state.defined()) {
    check_shape(kName, "cache.recurrent_state", cache->recurrent_state,
                {N, value_heads_, options.head_dim, head_v_dim_}, "[N, HV, K, V]");
  }
  const bool recompute = cache == nullptr && options.recompute.value_or(!hidden_states.is_cpu());
  std::vector<Matrix> matrices = {q_proj->matrix(), k_proj->matrix(), v_proj->matrix(),
                                  a_proj->matrix(), b_proj->matrix()};
  if (options.use_gate) matrices.push_back(g_proj->matrix());
  const std::vector<at::Tensor> projections = multiply(hidden_states, matrices);
  if (!recompute) return o_proj(mix_projections(projections, cu_seqlens, cache));
  const auto self = std::static_pointer_cast<GatedDeltaNetImpl>(shared_from_this());
  return o_proj(recompute_in_backward(
      [self, cu_seqlens](const std::vector<at::Tensor>& inputs) {
        return std::vector{self->mix_projections(inputs, cu_seqlens, /*cache=*/nullptr)};
      },
      projections, mixing_parameters())[0]);
}

/// From the projections of q, k, v, a, b and, with a gate, g to what o_proj takes.
at::Tensor GatedDeltaNetImpl::mix_projections(const std::vector<at::Tensor>& projections,
                                              const std::optional<at::Tensor>& cu_seqlens,
                                              LayerCache* cache) {
  const auto convolve = [&](ShortConvolution& convolution, const at::Tensor& x,
                            at::Tensor LayerCache::*state) {
    if (!options.use_short_conv) return at::silu(x);
    return convolution(x, cu_seqlens, cache != nullptr ? &(cache->*state) : nullptr);
  };
  const int64_t K = options.head_dim;
  const at::Tensor q =
      convolve(q_conv1d, projections[0], &LayerCache::conv_q).unflatten(-1, {-1, K});  // [B,T,H,K]
  const at::Tensor k =
      convolve(k_conv1d, projections[1], &LayerCache::conv_k).unflatten(-1, {-1, K});
  const at::Tensor v = convolve(v_conv1d, projections[2], &LayerCache::conv_v)
                           .unflatten(-1, {-1, head_v_dim_});  // [B, T, HV, V]
  const at::Tensor o = gated_delta_rule(q, k, v, projections[3], projections[4], cu_seqlens, cache);
  const at::Tensor normed = options.use_gate
                                ? gated_norm_(o, projections[5].unflatten(-1, {-1, head_v_dim_}))
                                : plain_norm_(o);
  return normed.flatten(-2);
}

/// What mix_projections uses.
std::vector<at::Tensor> GatedDeltaNetImpl::mixing_parameters() const {
  std::vector<at::Tensor> used = {A_log, dt_bias};
  const auto add = [&](const torch::nn::Module& module) {
    for (const at::Tensor& parameter : module.parameters()) used.push_back(parameter);
  };
  if (options.use_short_conv) {
    for (const auto* convolution : {&q_conv1d, &k_conv1d, &v_conv1d}) add(**convolution);
  }
  options.use_gate ? add(*gated_norm_) : add(*plain_norm_);
  return used;
}

at::Tensor GatedDeltaNetImpl::gated_delta_rule(const at::Tensor& q, const at::Tensor& k,
                                               const at::Tensor& v, const at::Tensor& a,
                                               const at::Tensor& b,
                                               const std::optional<at::Tensor>& cu_seqlens,
                                               LayerCache* cache) {
  GatedDeltaRuleOptions rule{.use_qk_l2norm_in_kernel = true,
                             .use_beta_sigmoid_in_kernel = true,
                             .allow_neg_eigval = options.allow_neg_eigval,
                             .cu_seqlens = cu_seqlens,
                             .use_gate_in_kernel = true,
                             .A_log = A_log,
                             .dt_bias = dt_bias};
  const int64_t longest = cu_seqlens ? longest_sequence(*cu_seqlens) : q.size(1);
  const bool recurrent =
      options.mode == "fused_recurrent" || (!is_training() && longest <= kRecurrentTokens);

  const at::ScalarType wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const bool narrow = cache != nullptr && wide == at::kFloat && cache->state_dtype == at::kBFloat16;
  if (recurrent && cache != nullptr && !at::GradMode::is_enabled()) {
    at::Tensor& state = cache->recurrent_state;
    if (!state.defined()) {
      const int64_t N = cu_seqlens ? cu_seqlens->numel() - 1 : q.size(0);
      state = at::zeros({N, value_heads_, options.head_dim, head_v_dim_},
                        q.options().dtype(narrow ? at::kBFloat16 : wide));
    }
    return fused_recurrent_gated_delta_rule_update(q, k, v, a, b, state, rule);
  }
  if (cache != nullptr) {
    if (cache->recurrent_state.defined()) rule.initial_state = cache->recurrent_state.to(wide);
    rule.output_final_state = true;
  }
  const auto [o, final_state] = recurrent ? fused_recurrent_gated_delta_rule(q, k, v, a, b, rule)
                                          : chunk_gated_delta_rule(q, k, v, a, b, rule);
  if (cache != nullptr) {
    cache->recurrent_state = narrow ? final_state->to(at::kBFloat16) : *final_state;
  }
  return o;
}

void GatedDeltaNetImpl::to(torch::Device device, torch::Dtype dtype, bool non_blocking) {
  const at::Tensor wide_A_log = A_log.data(), wide_dt_bias = dt_bias.data();
  const auto wide = at::promote_types(dtype, at::kFloat);
  Module::to(device, dtype, non_blocking);
  A_log.set_data(wide_A_log.to(device, wide, non_blocking));
  dt_bias.set_data(wide_dt_bias.to(device, wide, non_blocking));
}

void GatedDeltaNetImpl::to(torch::Dtype dtype, bool non_blocking) {
  to(A_log.device(), dtype, non_blocking);
}

}  // namespace gdn
