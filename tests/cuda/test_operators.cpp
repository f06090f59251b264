// Every operator on CUDA against itself on the CPU: in fp64 (the reference loops) as the truth, and
// in the same dtype as what plain arithmetic reaches. Needs a GPU.
#include <support/operators.h>
#include <support/tensor.h>
#include <tuple>
#include <vector>

#include <gtest/gtest.h>
#include <torch/torch.h>

#include <gdn/ops/common/causal_conv1d.h>
#include <gdn/ops/common/cross_entropy.h>
#include <gdn/ops/common/norm.h>
#include <gdn/ops/common/swiglu.h>
#include <gdn/ops/gated_delta_rule/gated_delta_rule.h>

namespace gdn::test {
namespace {

constexpr double kEps = 1e-5;

/// `op` on the GPU, between tensors on the CPU.
template <typename Operator>
auto on_cuda(const Operator& op) {
  return [op](const Tensors& inputs) {
    Tensors moved;
    for (const at::Tensor& input : inputs) moved.push_back(input.to(at::kCUDA));
    return op(moved).to(at::kCPU);
  };
}

template <typename Operator>
void expect_cuda_matches(const Operator& op, const Tensors& inputs, const std::string& name) {
  expect_matches_plain(on_cuda(op), op, inputs, name);
}

/// All results of an operator in one row, so that gradients of all of them are compared.
at::Tensor joined(const at::Tensor& a, const std::optional<at::Tensor>& b) {
  return at::cat({a.flatten(), b->flatten().to(a.scalar_type())});
}

class CudaOperators : public testing::Test {
 protected:
  void SetUp() override { torch::manual_seed(1); }
};

TEST_F(CudaOperators, Norms) {
  for (const int64_t D : {1, 7, 64, 128, 130, 256, 512, 1024, 1032, 2050, 4096, 6152}) {
    const at::Tensor x = torch::randn({3, 50, D}, at::kDouble);
    const at::Tensor gate = torch::randn({3, 50, D}, at::kDouble);
    const at::Tensor weight = torch::randn({D}, at::kDouble);
    expect_cuda_matches([](const auto& in) { return rms_norm(in[0], in[1], kEps); }, {x, weight},
                        "rms_norm");
    expect_cuda_matches([](const auto& in) { return rms_norm_gated(in[0], in[1], in[2], kEps); },
                        {x, gate, weight}, "rms_norm_gated");
    expect_cuda_matches(
        [](const auto& in) {
          const auto [y, sum] = add_rms_norm(in[0], in[1], in[2], kEps);
          return torch::stack({y, sum});
        },
        {x, gate, weight}, "add_rms_norm");
    expect_cuda_matches([](const auto& in) { return l2_norm(in[0]); }, {x}, "l2_norm");
  }
}

TEST_F(CudaOperators, NormsOfViewsAndFp32Weights) {
  const at::Tensor wide = torch::randn({20, 3, 96}, at::kDouble);
  for (const int64_t offset : {0, 3, 32}) {  // aligned or not
    const auto op = [offset](const auto& in) {
      const at::Tensor x = in[0].narrow(2, offset, 48), gate = in[0].narrow(2, 48, 48);
      return rms_norm_gated(x.transpose(0, 1), gate.transpose(0, 1), in[1].to(at::kFloat), kEps);
    };
    for (const auto dtype : {at::kBFloat16, at::kHalf, at::kFloat}) {
      const at::Tensor x = wide.to(dtype), weight = torch::ones({48});
      expect_close(on_cuda(op)({x, weight}), op(Tensors{x, weight}),
                   {1e-6, dtype == at::kBFloat16 ? 2 * kHalfUlpBf16 : 2 * kHalfUlpF16}, "view");
    }
  }
}

TEST_F(CudaOperators, ManyRowsOfASmallNorm) {
  const at::Tensor x = torch::randn({30000, 16}, at::kDouble);
  expect_cuda_matches([](const auto& in) { return rms_norm(in[0], in[1], kEps); },
                      {x, torch::randn({16}, at::kDouble)}, "rms_norm");
}

TEST_F(CudaOperators, Swiglu) {
  for (const int64_t D : {1, 7, 64, 2049}) {
    expect_cuda_matches(
        [](const auto& in) { return swiglu(in[0], in[1]); },
        {torch::randn({5, 3, D}, at::kDouble), torch::randn({5, 3, D}, at::kDouble)}, "swiglu");
  }
  expect_cuda_matches(  // halves of one projection
      [](const auto& in) { return swiglu(in[0].narrow(1, 0, 40), in[0].narrow(1, 40, 40)); },
      {torch::randn({70, 80}, at::kDouble)}, "swiglu of halves");
}

TEST_F(CudaOperators, Gate) {
  for (const auto& sizes : {std::vector<int64_t>{2, 33, 4}, {1000, 48}, {1, 1}}) {
    expect_cuda_matches(
        [](const auto& in) { return gated_delta_rule_gate(in[0], in[1], in[2]); },
        {torch::randn(sizes, at::kDouble) * 5, torch::randn({sizes.back()}, at::kDouble),
         torch::randn({sizes.back()}, at::kDouble)},
        "gate");
  }
}

TEST_F(CudaOperators, CrossEntropy) {
  for (const int64_t vocabulary : {1, 3, 1000, 5003}) {
    const at::Tensor logits = torch::randn({40, vocabulary}, at::kDouble) * 4;
    at::Tensor target = torch::randint(vocabulary, {40});
    target[3] = -100;
    for (const auto reduction : {Reduction::mean, Reduction::none}) {
      expect_cuda_matches(
          [&](const auto& in) { return cross_entropy(in[0], in[1], -100, reduction); },
          {logits, target}, "cross_entropy");
    }
  }
}

TEST_F(CudaOperators, LinearCrossEntropy) {
  at::Tensor target = torch::randint(300, {50});
  target[7] = -100;
  for (const auto reduction : {Reduction::mean, Reduction::none}) {
    expect_cuda_matches(
        [&](const auto& in) {
          return linear_cross_entropy(in[0], in[1], in[2], -100, reduction, /*rows_per_block=*/16);
        },
        {torch::randn({50, 64}, at::kDouble) / 8, torch::randn({300, 64}, at::kDouble), target},
        "linear_cross_entropy");
  }
}

TEST_F(CudaOperators, CrossEntropyOfATargetOutOfRangeIsNaN) {
  const at::Tensor logits = torch::randn({3, 10}).to(at::kCUDA).requires_grad_();
  const at::Tensor target = torch::tensor({1, 10, -3}).to(at::kCUDA);
  const at::Tensor loss = cross_entropy(logits, target, -100, Reduction::none);
  loss.sum().backward();
  EXPECT_TRUE(torch::equal(loss.isnan().cpu(), torch::tensor({false, true, true})));
  EXPECT_TRUE(torch::equal(logits.grad().isnan().any(1).cpu(), torch::tensor({false, true, true})));
}

TEST_F(CudaOperators, CausalConvolution) {
  for (const int64_t W : {2, 3, 4, 5, 8}) {
    for (const int64_t T : {1, 2, 31, 32, 33, 128, 150, 300}) {
      const int64_t D = W == 3 ? 7 : 24;
      const bool silu = T % 2 == 0;
      const auto op = [=](const auto& in) {
        CausalConv1dOptions options;
        options.bias = in[2];
        options.initial_state = in[3];
        options.output_final_state = true;
        if (silu) options.activation = Activation::silu;
        auto [y, final_state] = causal_conv1d(in[0], in[1], options);
        return joined(y, final_state);
      };
      expect_cuda_matches(
          op,
          {torch::randn({2, T, D}, at::kDouble), torch::randn({D, W}, at::kDouble),
           torch::randn({D}, at::kDouble), torch::randn({2, D, W - 1}, at::kDouble)},
          "causal_conv1d W " + std::to_string(W) + " T " + std::to_string(T));
    }
  }
}

TEST_F(CudaOperators, CausalConvolutionOfPackedSequences) {
  const at::Tensor cu_seqlens = torch::tensor({0, 1, 1, 3, 40, 170, 170, 171, 300});
  for (const int64_t W : {2, 4, 7}) {
    const auto op = [&](const auto& in) {
      CausalConv1dOptions options;
      options.initial_state = in[2];
      options.output_final_state = true;
      options.activation = Activation::silu;
      options.cu_seqlens = cu_seqlens.to(in[0].device());
      auto [y, final_state] = causal_conv1d(in[0], in[1], options);
      return joined(y, final_state);
    };
    expect_cuda_matches(
        op,
        {torch::randn({1, 300, 12}, at::kDouble), torch::randn({12, W}, at::kDouble),
         torch::randn({8, 12, W - 1}, at::kDouble)},
        "packed");
  }
}

TEST_F(CudaOperators, CausalConvolutionReadsNoOtherSequence) {
  at::Tensor x = torch::randn({1, 50, 8});
  const at::Tensor weight = torch::randn({8, 4}).to(at::kCUDA);
  CausalConv1dOptions options;
  options.cu_seqlens = torch::tensor({0, 20, 50});
  const at::Tensor clean = std::get<0>(causal_conv1d(x.to(at::kCUDA), weight, options)).cpu();
  x.slice(1, 20, 50).fill_(std::numeric_limits<float>::quiet_NaN());
  const at::Tensor poisoned = std::get<0>(causal_conv1d(x.to(at::kCUDA), weight, options)).cpu();
  EXPECT_TRUE(torch::equal(clean.slice(1, 0, 20), poisoned.slice(1, 0, 20)));
}

TEST_F(CudaOperators, CausalConvolutionUpdate) {
  const torch::NoGradGuard no_grad;
  for (const int64_t T : {1, 3, 32, 40}) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      const at::Tensor x = torch::randn({3, T, 20}).to(dtype), weight = torch::randn({20, 4});
      const at::Tensor state = torch::randn({3, 20, 3}).to(dtype);
      at::Tensor on_cpu = state.clone(), on_gpu = state.to(at::kCUDA);
      const at::Tensor want =
          causal_conv1d_update(x, on_cpu, weight, std::nullopt, Activation::silu);
      const at::Tensor got = causal_conv1d_update(x.to(at::kCUDA), on_gpu, weight.to(at::kCUDA),
                                                  std::nullopt, Activation::silu);
      expect_close(got, want, {1e-6, dtype == at::kFloat ? 1e-5 : 2 * kHalfUlpBf16}, "y");
      EXPECT_TRUE(torch::equal(on_gpu.cpu(), on_cpu));
    }
  }
}

TEST_F(CudaOperators, TheSameBitsOnEveryRun) {
  const at::Tensor x = torch::randn({4, 700, 256}).to(at::kBFloat16);
  const at::Tensor weight = torch::randn({256}), taps = torch::randn({256, 4});
  const auto run = [&] {
    return output_and_gradients(on_cuda([](const auto& in) {
                                  const at::Tensor y = rms_norm_gated(in[0], in[0], in[1], kEps);
                                  return std::get<0>(causal_conv1d(y, in[2], {}));
                                }),
                                {x, weight, taps});
  };
  const Tensors first = run();
  for (int i = 0; i < 3; ++i) {
    const Tensors again = run();
    for (size_t j = 0; j < first.size(); ++j) EXPECT_TRUE(torch::equal(first[j], again[j])) << j;
  }
}

TEST_F(CudaOperators, EmptyTensors) {
  const auto empty = [](at::IntArrayRef sizes) {
    return torch::randn(sizes).to(at::kCUDA).requires_grad_();
  };
  const at::Tensor weight = empty({8});
  rms_norm(empty({0, 8}), weight, kEps).sum().backward();
  EXPECT_TRUE(torch::equal(weight.grad(), torch::zeros_like(weight)));
  EXPECT_EQ(swiglu(empty({0, 8}), empty({0, 8})).size(0), 0);
  const at::Tensor taps = empty({6, 4});
  std::get<0>(causal_conv1d(empty({2, 0, 6}), taps, {})).sum().backward();
  EXPECT_TRUE(torch::equal(taps.grad(), torch::zeros_like(taps)));
}

TEST_F(CudaOperators, RejectFp64) {
  const at::Tensor x = torch::randn({2, 8}, at::kDouble).to(at::kCUDA);
  expect_rejected([&] { l2_norm(x); }, "Double", "CPU only");
  expect_rejected([&] { swiglu(x, x); }, "swiglu", "Double");
}

TEST_F(CudaOperators, OffsetsBeyond32Bits) {
  const int64_t D = int64_t{1} << 20, M = (int64_t{1} << 11) + 3;  // 2^31 + 3 * 2^20 elements
  const at::Tensor x = torch::full({M, D}, 0.5, at::TensorOptions(at::kCUDA).dtype(at::kBFloat16));
  x[M - 1].fill_(2);
  const at::Tensor y = swiglu(x, x);
  const at::Tensor small = swiglu(torch::tensor({0.5, 2.0}).to(at::kBFloat16),
                                  torch::tensor({0.5, 2.0}).to(at::kBFloat16));
  EXPECT_TRUE((y[M - 1] == small[1].item<double>()).all().item<bool>());
  EXPECT_TRUE((y[M - 2] == small[0].item<double>()).all().item<bool>());
  EXPECT_TRUE((l2_norm(x)[M - 1] == 0x1p-10).all().item<bool>());
}

}  // namespace
}  // namespace gdn::test
