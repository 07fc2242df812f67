// What an attention call is given: the step that all layers share, and one layer's tensors.
//
// These headers are parts of `tree_attention.cpp`, by the stages of its work. All names are local to
// that source, because libraries are loaded with global symbols and there may be two of a kind.

#pragma once

#include <cstdint>
#include <vector>

#include <immintrin.h>

extern "C" {

// One sequence of a step; see `AttentionSpan`.
struct Span {
  int64_t start;
  int64_t num_queries;
  int64_t context_len;
  int64_t num_slots;
  const int64_t* block_table;
  const uint8_t* mask;    // [num_queries, num_slots - context_len]; null for causal order.
  const int64_t* depths;  // Of the slots from context_len on; null for 0, 1, 2, ...
};

struct Step {
  const Span* spans;
  int64_t num_spans;
  const int64_t* slots;  // Of each token.
  int64_t num_tokens;
  int64_t block_size;
};

}

namespace {

constexpr int64_t ROWS = 16;  // Rows that are computed at once.
constexpr int64_t KEYS = 8;   // Keys whose scores are summed at once.
constexpr int64_t NO_WINDOW = -1;

enum class Mode { NOTHING, ECHO, STEP };

// What a layer attends with.
struct Layer {
  Mode mode = Mode::NOTHING;  // ECHO is that of `layer_calls.py`.
  const Step* step = nullptr;
  float* keys = nullptr;      // [slots, kv_heads, channels]
  float* values = nullptr;    // [slots, kv_heads, channels]
};

// A tensor [heads, tokens, channels] whose channels are neighbours.
struct Heads {
  const float* data;
  int64_t num_heads;
  int64_t head_stride;
  int64_t token_stride;

  const float* at(int64_t head, int64_t token) const {
    return data + head * head_stride + token * token_stride;
  }
};

struct Call {
  Heads queries, keys, values;
  float* output;  // [tokens, heads, channels]
  int64_t num_channels;
  float scaling;
  int64_t window;

  // Attention heads that share a KV head.
  int64_t group() const { return queries.num_heads / keys.num_heads; }
};

// Sixteen rows of one KV head of one sequence; a row is a pair of a query and a head of the group.
struct Item {
  const Span* span;
  int64_t kv_head;
  int64_t first_row;
};

// Memory of one thread.
struct Scratch {
  std::vector<float> queries;    // [channels, 16]
  std::vector<float> scores;     // [slots, 16], then weights.
  std::vector<float> outputs;    // [channels, 16]
  std::vector<__mmask16> seen;   // Of each slot, which rows see it.
  std::vector<int64_t> offsets;  // Of each slot that some row sees, in the cache.
};

}  // namespace
