// `gdn info`: what this build and this machine have.
#include <cmath>
#include <fstream>
#include <iostream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/cpu/Utils.h>
#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <torch/version.h>

#include <gdn/cli/command.h>
#include <gdn/kernels/cpu/gated_delta_rule.h>
#include <gdn/ops/cuda/run.h>
#include <gdn/ops/utils/matrix_product.h>

namespace gdn::cli {
namespace {

using Json = nlohmann::ordered_json;

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

/// Names of the instructions for bf16 and int8 products that torch's matrix products may use.
std::set<std::string> matrix_instructions() {
  std::set<std::string> names;
  for (const auto& [name, value] : at::cpu::get_cpu_capabilities()) {
    const bool multiplies = name.starts_with("amx") || name.ends_with("bf16");
    if (multiplies && value.isBool() && value.toBool()) names.insert(name);
  }
  return names;
}

/// How the CPU multiplies matrices of each dtype.
Json matrix_products() {
  Json products;
  for (const auto& [name, dtype] : {std::pair("fp32", at::kFloat), std::pair("bf16", at::kBFloat16),
                                    std::pair("fp16", at::kHalf)}) {  // as --dtype names them
    const MatrixLibrary library = matrix_library(dtype);
    products[name] = {{"library", library.name}, {"why", library.reason}};
  }
  return products;
}

/// The GPUs, and which kernels would serve typical requests there.
Json cuda_devices() {
  Json devices = Json::array();
  for (const cuda::DeviceInfo& device : cuda::devices()) {
    Json kernels = Json::array();
    for (const cuda::ServedRequest& served : cuda::served_requests(device)) {
      kernels.push_back(
          {{"request", served.request}, {"kernel", served.kernel}, {"why", served.reason}});
    }
    devices.push_back(
        {{"name", device.name},
         {"compute_capability", std::to_string(device.major) + "." + std::to_string(device.minor)},
         {"multiprocessors", device.multiprocessors},
         {"memory_gib", static_cast<double>(device.bytes) / (1 << 30)},
         {"kernels", kernels}});
  }
  return {{"status", cuda::status()}, {"devices", devices}};
}

/// Operators of torch.ops.gdn, with the devices that they have kernels for; "composed" are those
/// that call others.
Json operators(bool with_cuda) {
  c10::Dispatcher& dispatcher = c10::Dispatcher::singleton();
  std::map<std::string, Json> devices;
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (!name.name.starts_with("gdn::")) continue;
    const auto schema = dispatcher.findSchema(name);
    Json& entry = devices[name.name.substr(5)] = Json::array();
    if (!schema) continue;
    if (schema->hasKernelForDispatchKey(c10::DispatchKey::CPU)) entry.push_back("cpu");
    if (with_cuda && schema->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) {
      entry.push_back("cuda");
    }
    if (entry.empty()) entry.push_back("composed");
  }
  return devices;
}

Json collect() {
  const std::string chosen = kernels::cpu::instruction_set();
  return {
      {"gdn", GDN_VERSION},
      {"torch", TORCH_VERSION},
      {"compiler", GDN_COMPILER},
      {"build", GDN_BUILD_TYPE},
      {"cpu", {{"name", processor_name()}, {"threads", at::get_num_threads()}}},
      {"cuda", cuda_devices()},
      {"kernels",
       {{"instruction_sets", kernels::cpu::compiled_instruction_sets()},
        {"chosen", chosen},
        {"why",
         "the best compiled instruction set that this processor has; fp64 tensors are served "
         "by the reference loops"}}},
      {"torch_kernels",
       {{"instruction_set", at::get_cpu_capability()},
        {"matrix_instructions", matrix_instructions()},
        {"matrix_products", matrix_products()}}},
      {"operators", operators(cuda::compiled_in())},
  };
}

std::string join(const Json& names) {
  std::string line;
  for (const auto& name : names) line += (line.empty() ? "" : " ") + name.get<std::string>();
  return line.empty() ? "none" : line;
}

std::string matrix_product_lines(const Json& products) {
  std::string lines;
  for (const auto& [dtype, product] : products.items()) {
    lines += "  products of " + dtype + ": " + product["library"].get<std::string>() + " (" +
             product["why"].get<std::string>() + ")\n";
  }
  return lines;
}

void print(const Json& info) {
  const auto text = [](const Json& value) { return value.get<std::string>(); };
  std::cout << "gdn " << text(info["gdn"]) << " (" << text(info["build"]) << ", "
            << text(info["compiler"]) << "), torch " << text(info["torch"]) << "\n"
            << "cpu        " << text(info["cpu"]["name"]) << ", " << info["cpu"]["threads"]
            << " threads\n"
            << "cuda       " << text(info["cuda"]["status"]) << "\n";
  for (const Json& device : info["cuda"]["devices"]) {
    std::cout << "  " << text(device["name"]) << ", compute capability "
              << text(device["compute_capability"]) << ", " << device["multiprocessors"]
              << " multiprocessors, " << std::lround(device["memory_gib"].get<double>())
              << " GiB\n";
    for (const Json& kernel : device["kernels"]) {
      std::cout << "  " << text(kernel["request"]) << ": " << text(kernel["kernel"]) << " ("
                << text(kernel["why"]) << ")\n";
    }
  }
  std::cout << "kernels    " << text(info["kernels"]["chosen"]) << " of "
            << join(info["kernels"]["instruction_sets"]) << ": " << text(info["kernels"]["why"])
            << "\n"
            << "torch      " << text(info["torch_kernels"]["instruction_set"])
            << "; matrix instructions: " << join(info["torch_kernels"]["matrix_instructions"])
            << "\n"
            << matrix_product_lines(info["torch_kernels"]["matrix_products"]) << "operators\n";
  for (const auto& [name, devices] : info["operators"].items()) {
    std::cout << "  " << name << ": " << join(devices) << "\n";
  }
}

}  // namespace

Action add_info(CLI::App& app) {
  const auto json = std::make_shared<bool>(false);
  app.add_flag("--json", *json, "Print JSON");
  return [json] {
    const Json info = collect();
    if (*json) {
      std::cout << info.dump(2) << "\n";
    } else {
      print(info);
    }
  };
}

}  // namespace gdn::cli
