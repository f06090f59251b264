// Where to compute: what a user may write, on machines of all kinds.
#include <stdexcept>
#include <string>

#include <gtest/gtest.h>

#include <gdn/models/device.h>

namespace gdn::testing {
namespace {

const Machine kWithoutKernels;
const Machine kWithoutDriver{
    .has_kernels = true, .gpus = {}, .why_none = "no GPU can be used: there is no NVIDIA driver"};
const Machine kOld{.has_kernels = true, .gpus = {{"Tesla V100", 7, 0}}, .why_none = {}};
const Machine kTwo{
    .has_kernels = true, .gpus = {{"Tesla T4", 7, 5}, {"H200", 9, 0}}, .why_none = {}};

template <typename Error>
void expect_refused(const std::string& name, const Machine& machine, const std::string& message) {
  try {
    const DeviceChoice choice = choose_device(name, machine);
    ADD_FAILURE() << "chose " << choice.device << ", expected '" << message << "'";
  } catch (const Error& error) {
    EXPECT_EQ(error.what(), message);
  }
}

void expect_automatic(const Machine& machine, c10::Device device, const std::string& note) {
  const DeviceChoice choice = choose_device("auto", machine);
  EXPECT_EQ(choice.device, device);
  EXPECT_EQ(choice.note, note);
}

TEST(Device, AutoTakesTheFirstGpuThatServes) {
  expect_automatic(kTwo, {c10::kCUDA, 0}, "computing on cuda:0, Tesla T4");
  expect_automatic(kWithoutKernels, c10::kCPU, "");
  expect_automatic(kWithoutDriver, c10::kCPU,
                   "computing on the CPU: no GPU can be used: there is no NVIDIA driver");
  expect_automatic(kOld, c10::kCPU,
                   "computing on the CPU: Tesla V100 has compute capability 7.0, 7.5 is needed");
}

TEST(Device, ANamedOneIsTakenOrRefusedWithTheReason) {
  EXPECT_EQ(choose_device("cuda", kTwo).device, c10::Device(c10::kCUDA, 0));
  EXPECT_EQ(choose_device("cuda:1", kTwo).device, c10::Device(c10::kCUDA, 1));
  EXPECT_EQ(choose_device("cpu", kTwo).device, c10::Device(c10::kCPU));
  EXPECT_EQ(choose_device("cuda:1", kTwo).note, "");
  using Refused = std::runtime_error;
  expect_refused<Refused>("cuda:2", kTwo,
                          "device cuda:2: this machine has 2 GPUs, cuda:0 to cuda:1");
  expect_refused<Refused>("cuda:1", kOld, "device cuda:1: this machine has 1 GPU, cuda:0");
  expect_refused<Refused>("cuda", kOld,
                          "device cuda: Tesla V100 has compute capability 7.0, 7.5 is needed");
  expect_refused<Refused>("cuda", kWithoutDriver,
                          "device cuda: no GPU can be used: there is no NVIDIA driver");
  expect_refused<Refused>("cuda", kWithoutKernels,
                          "device cuda: gdn was built without CUDA kernels (build it with the "
                          "preset cuda), use --device cpu");
}

TEST(Device, OtherNamesAreWrongUsage) {
  for (const std::string name : {"gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1x", "cuda:1000", ""}) {
    for (const Machine& machine : {kWithoutKernels, kTwo}) {
      expect_refused<std::invalid_argument>(
          name, machine, "device must be auto, cpu, cuda or cuda:N, got '" + name + "'");
    }
  }
}

}  // namespace
}  // namespace gdn::testing
