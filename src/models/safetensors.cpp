#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <numeric>
#include <set>
#include <stdexcept>
#include <string_view>

#include <ATen/ATen.h>
#include <nlohmann/json.hpp>

#include <gdn/models/atomic_file.h>
#include <gdn/models/mapped_file.h>
#include <gdn/models/safetensors.h>

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

namespace gdn {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr size_t kHeaderAlignment = 8;

struct NamedType {
  const char* name;
  at::ScalarType type;
};
constexpr NamedType kTypes[] = {{"F64", at::kDouble},
                                {"F32", at::kFloat},
                                {"F16", at::kHalf},
                                {"BF16", at::kBFloat16},
                                {"I64", at::kLong},
                                {"I32", at::kInt},
                                {"I16", at::kShort},
                                {"I8", at::kChar},
                                {"U8", at::kByte},
                                {"BOOL", at::kBool},
                                {"U16", at::kUInt16},
                                {"U32", at::kUInt32},
                                {"U64", at::kUInt64},
                                {"F8_E4M3", at::kFloat8_e4m3fn},
                                {"F8_E5M2", at::kFloat8_e5m2}};

/// One tensor of a header, checked in itself.
struct Entry {
  std::string name;
  at::ScalarType type = at::kFloat;
  std::vector<int64_t> shape;
  uint64_t begin = 0, end = 0;  // bytes after the header
};

/// What is wrong with a header; the caller adds the file's name.
struct Malformed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// JSON objects may repeat a key, and a parser would keep the last: here that is an error.
json parse_header(const char* begin, const char* end) {
  std::vector<std::set<std::string>> keys;
  const auto check = [&keys](int, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::object_start) keys.emplace_back();
    if (event == json::parse_event_t::object_end) keys.pop_back();
    if (event == json::parse_event_t::key && !keys.back().insert(value.get<std::string>()).second) {
      throw Malformed("its header names " + value.dump() + " twice");
    }
    return true;
  };
  try {
    json header = json::parse(begin, end, check);
    if (!header.is_object()) throw Malformed("its header is not a JSON object");
    return header;
  } catch (const json::exception& error) {
    throw Malformed(std::string("its header is not JSON: ") + error.what());
  }
}

uint64_t read_unsigned(const json& value, const std::string& what) {
  if (!value.is_number_unsigned()) {
    throw Malformed(what + " must be made of integers that are not negative, got " + value.dump());
  }
  return value.get<uint64_t>();
}

Entry read_entry(const std::string& name, const json& value, uint64_t data_bytes) {
  const std::string tensor = "tensor \"" + name + "\": ";
  if (!value.is_object() || value.size() != 3 || !value.contains("dtype") ||
      !value.contains("shape") || !value.contains("data_offsets")) {
    throw Malformed(tensor + "must have just dtype, shape and data_offsets");
  }
  Entry entry;
  entry.name = name;
  const json &dtype = value["dtype"], &shape = value["shape"], &offsets = value["data_offsets"];
  const auto* type =
      std::find_if(std::begin(kTypes), std::end(kTypes), [&](const NamedType& known) {
        return dtype.is_string() && dtype.get_ref<const std::string&>() == known.name;
      });
  if (type == std::end(kTypes)) throw Malformed(tensor + "unknown dtype " + dtype.dump());
  entry.type = type->type;

  if (!shape.is_array()) throw Malformed(tensor + "shape must be a list, got " + shape.dump());
  uint64_t bytes = c10::elementSize(entry.type);
  bool overflows = false;
  for (const json& size : shape) {
    const uint64_t extent = read_unsigned(size, tensor + "shape");
    overflows = overflows || extent > INT64_MAX || __builtin_mul_overflow(bytes, extent, &bytes);
    entry.shape.push_back(static_cast<int64_t>(extent));
  }
  if (overflows) throw Malformed(tensor + "shape " + shape.dump() + " is too large");

  if (!offsets.is_array() || offsets.size() != 2) {
    throw Malformed(tensor + "data_offsets must be [begin, end], got " + offsets.dump());
  }
  entry.begin = read_unsigned(offsets[0], tensor + "data_offsets");
  entry.end = read_unsigned(offsets[1], tensor + "data_offsets");
  if (entry.begin > entry.end || entry.end > data_bytes) {
    throw Malformed(tensor + "data_offsets " + offsets.dump() + " pass the " +
                    std::to_string(data_bytes) + " bytes of data; is the file truncated?");
  }
  if (entry.end - entry.begin != bytes) {
    throw Malformed(tensor + "data_offsets " + offsets.dump() + " disagree with shape " +
                    shape.dump() + " of " + dtype.get<std::string>());
  }
  return entry;
}

void check_layout(std::vector<Entry> entries, uint64_t data_bytes) {
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t position = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != position) {
      throw Malformed("tensor \"" + entry.name + "\": its data " +
                      (entry.begin < position ? "overlap another's" : "leave a gap"));
    }
    position = entry.end;
  }
  if (position != data_bytes) throw Malformed("its data are followed by unnamed bytes");
}

at::Tensor view_entry(const Entry& entry, const char* data,
                      const std::shared_ptr<const MappedFile>& mapping) {
  const auto options = at::TensorOptions(entry.type);
  if (entry.begin == entry.end) return at::empty(entry.shape, options);
  const char* source = data + entry.begin;
  if (reinterpret_cast<uintptr_t>(source) % c10::elementSize(entry.type) != 0) {
    at::Tensor copy = at::empty(entry.shape, options);  // a header of odd length
    std::memcpy(copy.mutable_data_ptr(), source, entry.end - entry.begin);
    return copy;
  }
  return at::from_blob(
      const_cast<char*>(source), entry.shape, [mapping](void*) {}, options);
}

}  // namespace

SafetensorsFile::SafetensorsFile(const std::filesystem::path& file) {
  const auto mapping = std::make_shared<const MappedFile>(file);
  const std::string_view bytes = mapping->bytes();
  try {
    uint64_t header_bytes = 0;
    if (bytes.size() < sizeof header_bytes) throw Malformed("is too short to be safetensors");
    std::memcpy(&header_bytes, bytes.data(), sizeof header_bytes);
    const uint64_t rest = bytes.size() - sizeof header_bytes;
    if (header_bytes > rest || header_bytes > kMaxHeaderBytes) {
      throw Malformed("its header of " + std::to_string(header_bytes) +
                      " bytes passes the file's end or 100 MB; is it safetensors, and whole?");
    }
    const char* header_begin = bytes.data() + sizeof header_bytes;
    const char* data = header_begin + header_bytes;
    const uint64_t data_bytes = rest - header_bytes;
    const json header = parse_header(header_begin, data);
    std::vector<Entry> entries;
    for (const auto& [name, value] : header.items()) {
      if (name != "__metadata__") {
        entries.push_back(read_entry(name, value, data_bytes));
        continue;
      }
      for (const auto& [key, text] : value.items()) {
        if (!text.is_string())
          throw Malformed("__metadata__ must hold strings, got " + value.dump());
        metadata_[key] = text.get<std::string>();
      }
    }
    check_layout(entries, data_bytes);
    for (const Entry& entry : entries) {
      names_.push_back(entry.name);
      tensors_[entry.name] = {view_entry(entry, data, mapping),
                              sizeof header_bytes + header_bytes + entry.begin};
    }
  } catch (const Malformed& error) {
    throw std::runtime_error(file.string() + ": " + error.what());
  }
  file_ = file;
}

const SafetensorsFile::Stored& SafetensorsFile::stored(const std::string& name) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    throw std::runtime_error(file_.string() + ": holds no tensor \"" + name + '"');
  }
  return found->second;
}

at::Tensor SafetensorsFile::tensor(const std::string& name) const { return stored(name).tensor; }

uint64_t SafetensorsFile::offset(const std::string& name) const { return stored(name).offset; }

void write_safetensors(const std::filesystem::path& file,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  // Wide elements first: then every tensor is aligned in the mapped file.
  std::vector<size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return tensors[a].second.element_size() > tensors[b].second.element_size();
  });

  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  uint64_t position = 0;
  for (const size_t i : order) {
    const auto& [name, tensor] = tensors[i];
    const auto* type = std::find_if(
        std::begin(kTypes), std::end(kTypes),
        [&tensor = tensor](const NamedType& known) { return known.type == tensor.scalar_type(); });
    const std::string problem = file.string() + ": tensor \"" + name + "\" ";
    if (type == std::end(kTypes)) {
      throw std::runtime_error(problem + "has dtype " + c10::toString(tensor.scalar_type()) +
                               ", which safetensors does not know");
    }
    if (header.contains(name)) throw std::runtime_error(problem + "is given twice");
    header[name] = {{"dtype", type->name},
                    {"shape", tensor.sizes().vec()},
                    {"data_offsets", {position, position + tensor.nbytes()}}};
    position += tensor.nbytes();
  }
  std::string text = header.dump();
  text.append((kHeaderAlignment - text.size() % kHeaderAlignment) % kHeaderAlignment, ' ');

  AtomicFile target(file);
  const uint64_t header_bytes = text.size();
  target.write(&header_bytes, sizeof header_bytes);
  target.write(text);
  for (const size_t i : order) {
    const at::Tensor tensor = tensors[i].second.detach().to(at::kCPU).contiguous();
    target.write(tensor.const_data_ptr(), tensor.nbytes());
  }
  target.commit();
}

}  // namespace gdn
