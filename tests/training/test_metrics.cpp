#include <bit>
#include <cstring>
#include <map>

#include <nlohmann/json.hpp>

#include <gdn/training/console.h>
#include <gdn/training/metrics_files.h>

#include "support.h"

namespace gdn {
namespace {

using testing::TestFolder;

/// Bit by bit, unlike the writer's tables.
uint32_t slow_masked_crc32c(const std::string& bytes) {
  uint32_t crc = 0xFFFFFFFF;
  for (const unsigned char byte : bytes) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78 : 0);
  }
  crc = ~crc;
  return ((crc >> 15) | (crc << 17)) + 0xA282EAD8;
}

template <typename Number>
Number take(std::string& bytes) {
  Number number;
  std::memcpy(&number, bytes.data(), sizeof(Number));
  bytes.erase(0, sizeof(Number));
  return number;
}

std::vector<std::string> read_records(std::string bytes) {
  std::vector<std::string> records;
  while (!bytes.empty()) {
    const std::string length_bytes = bytes.substr(0, 8);
    const auto length = take<uint64_t>(bytes);
    EXPECT_EQ(take<uint32_t>(bytes), slow_masked_crc32c(length_bytes));
    records.push_back(bytes.substr(0, length));
    bytes.erase(0, length);
    EXPECT_EQ(take<uint32_t>(bytes), slow_masked_crc32c(records.back()));
  }
  return records;
}

uint64_t take_varint(std::string& bytes) {
  uint64_t value = 0;
  for (int shift = 0;; shift += 7) {
    const auto byte = take<uint8_t>(bytes);
    value |= static_cast<uint64_t>(byte & 0x7F) << shift;
    if (byte < 0x80) return value;
  }
}

/// Fields by number; the bytes of numbers as they are stored.
std::multimap<int, std::string> parse_message(std::string bytes) {
  std::multimap<int, std::string> fields;
  while (!bytes.empty()) {
    const uint64_t tag = take_varint(bytes);
    std::string value;
    switch (tag & 7) {
      case 0:
        value = std::to_string(take_varint(bytes));
        break;
      case 1:
        value = bytes.substr(0, 8);
        bytes.erase(0, 8);
        break;
      case 5:
        value = bytes.substr(0, 4);
        bytes.erase(0, 4);
        break;
      default: {
        const uint64_t length = take_varint(bytes);
        value = bytes.substr(0, length);
        bytes.erase(0, length);
      }
    }
    fields.emplace(static_cast<int>(tag >> 3), value);
  }
  return fields;
}

StepMetrics some_step(int64_t step) {
  return {.step = step, .steps = 100, .tokens = 7, .loss = 2.5, .lr = 1e-3, .grad_norm = 0.5};
}

TEST(TensorBoard, WritesEventsThatCanBeReadBack) {
  const TestFolder folder;
  {
    TensorBoard board(folder / "");
    board.on_step(some_step(300), true);
    board.on_step(some_step(301), false);
    board.on_eval({300, {.loss = 1.25, .perplexity = 3.5, .bits_per_byte = 1.75}});
  }
  const auto file = std::filesystem::directory_iterator(folder / "")->path();
  EXPECT_EQ(file.filename().string().rfind("events.out.tfevents.", 0), 0U);
  const auto records = read_records(testing::read_file(file));
  ASSERT_EQ(records.size(), 3U);
  EXPECT_EQ(parse_message(records[0]).find(3)->second, "brain.Event:2");

  std::map<std::string, float> scalars;
  for (const std::string& record : {records[1], records[2]}) {
    const auto event = parse_message(record);
    EXPECT_EQ(event.find(2)->second, "300");
    const auto summary = parse_message(event.find(5)->second);
    for (const auto& [number, bytes] : summary) {
      const auto value = parse_message(bytes);
      std::string number_bytes = value.find(2)->second;
      scalars[value.find(1)->second] = take<float>(number_bytes);
    }
  }
  EXPECT_EQ(scalars.at("train/loss"), 2.5F);
  EXPECT_EQ(scalars.at("train/grad_norm"), 0.5F);
  EXPECT_EQ(scalars.at("eval/bits_per_byte"), 1.75F);
}

TEST(JsonLines, DropsWhatAnInterruptedRunWroteTooMuch) {
  const TestFolder folder;
  const auto file = folder / "metrics.jsonl";
  {
    JsonLines lines(file, 0);
    for (const int64_t step : {10, 20, 30}) lines.on_step(some_step(step), true);
  }
  std::ofstream(file, std::ios::app) << R"({"step": 40, "lo)";  // killed while writing
  {
    JsonLines lines(file, 20);
    lines.on_eval({20, {.loss = 1.5, .perplexity = 4.5}});
    lines.on_step(some_step(29), false);
    lines.on_step(some_step(30), true);
  }
  std::vector<int64_t> steps;
  std::istringstream text(testing::read_file(file));
  for (std::string line; std::getline(text, line);) {
    const auto json = nlohmann::json::parse(line);
    steps.push_back(json["step"]);
    if (json.contains("eval_loss")) {
      EXPECT_EQ(json["eval_loss"], 1.5);
      EXPECT_FALSE(json.contains("eval_bits_per_byte"));
    } else {
      EXPECT_EQ(json["loss"], 2.5);
    }
  }
  EXPECT_EQ(steps, (std::vector<int64_t>{10, 20, 20, 30}));
}

TEST(Console, PrintsPlainLinesWhereThereIsNoTerminal) {
  const TestFolder folder;
  std::FILE* file = std::fopen((folder / "log").c_str(), "w");
  {
    ConsoleProgress console(file);
    console.on_message("hello");
    console.on_step(some_step(3), false);
    console.on_step(some_step(10), true);
  }
  std::fclose(file);
  EXPECT_EQ(testing::read_file(folder / "log"),
            "hello\nstep 10/100  loss 2.5000  lr 1.00e-03  grad 0.50  0 tok/s  0.0 GB  eta 0s\n");
}

TEST(Console, WritesNumbersForPeople) {
  EXPECT_EQ(human_count(999), "999");
  EXPECT_EQ(human_count(999.7), "1.0k");
  EXPECT_EQ(human_count(1234), "1.2k");
  EXPECT_EQ(human_count(345'678), "346k");
  EXPECT_EQ(human_count(7.25e9), "7.2B");
  EXPECT_EQ(human_duration(12.4), "12s");
  EXPECT_EQ(human_duration(185), "3m05s");
  EXPECT_EQ(human_duration(3725), "1h02m");
}

}  // namespace
}  // namespace gdn
