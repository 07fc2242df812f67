// Paged tree attention in float32 on x86 CPUs with AVX-512; `tree_attention.py` calls it.
//
// A token's output is the same to the bit whatever else is in the step. A query's keys are visited
// in the order of their positions, one after the other; keys that it does not see are skipped in its
// lane, so a node of a tree computes what it computes when its path has become plain text.
//
// Rows are pairs of a query and a head that share a KV head; sixteen of them are computed at once,
// one in each lane.

#include <immintrin.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <new>
#include <vector>

#include "attention_seen.h"
#include "attention_softmax.h"
#include "attention_step.h"

namespace {

std::atomic<int> num_threads{1};
thread_local Layer current;

// Taken once: each layer sets its own, so that none reads a step that has gone.
Layer take_current() {
  const Layer layer = current;
  current = Layer{};
  return layer;
}

void write_token(const Call& call, const Layer& layer, int64_t token) {
  const int64_t channels = call.num_channels, heads = call.keys.num_heads;
  const int64_t place = layer.step->slots[token] * heads * channels;
  for (int64_t head = 0; head < heads; ++head) {
    const float *key = call.keys.at(head, token), *value = call.values.at(head, token);
    float *to_key = layer.keys + place + head * channels,
          *to_value = layer.values + place + head * channels;
    for (int64_t c = 0; c < channels; ++c) to_key[c] = key[c], to_value[c] = value[c];
  }
}

void compute(const Call& call, const Layer& layer, const Item& item, Scratch& scratch) {
  const int64_t channels = call.num_channels, group = call.group();
  const int64_t num_rows = std::min(ROWS, item.span->num_queries * group - item.first_row);
  const auto token_of = [&](int64_t lane) {
    return item.span->start + (item.first_row + lane) / group;
  };
  const auto head_of = [&](int64_t lane) {
    return item.kv_head * group + (item.first_row + lane) % group;
  };
  scratch.queries.assign(channels * ROWS, 0.0f);
  scratch.outputs.resize(channels * ROWS);
  for (int64_t lane = 0; lane < num_rows; ++lane) {
    const float* query = call.queries.at(head_of(lane), token_of(lane));
    for (int64_t c = 0; c < channels; ++c) scratch.queries[c * ROWS + lane] = query[c];
  }
  const int64_t num_seen = find_seen(call, *layer.step, item, num_rows, scratch);
  scratch.scores.resize((num_seen + KEYS) * ROWS);
  score(call, layer, num_seen, scratch);
  const __m512 inverse = weigh(num_seen, scratch);
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) sum_values<16>(layer, num_seen, c, inverse, scratch);
  if (c < channels) sum_values<8>(layer, num_seen, c, inverse, scratch);
  for (int64_t lane = 0; lane < num_rows; ++lane) {
    float* to =
        call.output + (token_of(lane) * call.queries.num_heads + head_of(lane)) * channels;
    for (int64_t c = 0; c < channels; ++c) to[c] = scratch.outputs[c * ROWS + lane];
  }
}

void attend(const Call& call, const Layer& layer) {
  const Step& step = *layer.step;
  static thread_local std::vector<Item> item_memory;
  item_memory.clear();
  for (int64_t i = 0; i < step.num_spans; ++i)
    for (int64_t row = 0; row < step.spans[i].num_queries * call.group(); row += ROWS)
      for (int64_t head = 0; head < call.keys.num_heads; ++head)
        item_memory.push_back({step.spans + i, head, row});
  const Item* items = item_memory.data();
  std::atomic<bool> has_memory{true};
  const auto num_items = static_cast<int64_t>(item_memory.size());
#pragma omp parallel num_threads(num_threads.load())
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < step.num_tokens; ++token) write_token(call, layer, token);
    // All keys are there before anybody reads them. Items of long texts take longer.
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_items; ++i) {
      try {
        compute(call, layer, items[i], scratch);
      } catch (const std::bad_alloc&) {  // Nothing may leave a parallel region.
        has_memory = false;
      }
    }
  }
  if (!has_memory) throw std::bad_alloc();
}

// As `EchoBackend` of layer_calls.py: a function of all that a layer decides about attention.
void echo(const Call& call, int64_t num_tokens) {
  const int64_t group = call.group();
  const float shift =
      call.window == NO_WINDOW ? 0.0f : std::log1p(static_cast<float>(call.window));
  for (int64_t token = 0; token < num_tokens; ++token) {
    for (int64_t head = 0; head < call.queries.num_heads; ++head) {
      const float *query = call.queries.at(head, token), *key = call.keys.at(head / group, token),
                  *value = call.values.at(head / group, token);
      float* to = call.output + (token * call.queries.num_heads + head) * call.num_channels;
      for (int64_t c = 0; c < call.num_channels; ++c)
        to[c] = (query[c] + (key[c] + value[c])) * call.scaling + shift;
    }
  }
}

#define TRY(call)                            \
  do {                                       \
    if (AOTITorchError e = (call)) return e; \
  } while (0)

// A float32 tensor [1, heads, tokens, channels] whose channels are neighbours.
AOTITorchError heads_of(AtenTensorHandle tensor, Heads* found, int64_t* tokens, int64_t* channels) {
  void* pointer = nullptr;
  int64_t num_axes = 0, batch = 0, last_stride = 0;
  int32_t dtype = 0;
  TRY(aoti_torch_get_dim(tensor, &num_axes));
  TRY(aoti_torch_get_dtype(tensor, &dtype));
  if (num_axes != 4 || dtype != aoti_torch_dtype_float32()) return AOTI_TORCH_FAILURE;
  TRY(aoti_torch_get_data_ptr(tensor, &pointer));
  TRY(aoti_torch_get_size(tensor, 0, &batch));
  TRY(aoti_torch_get_size(tensor, 1, &found->num_heads));
  TRY(aoti_torch_get_size(tensor, 2, tokens));
  TRY(aoti_torch_get_size(tensor, 3, channels));
  TRY(aoti_torch_get_stride(tensor, 1, &found->head_stride));
  TRY(aoti_torch_get_stride(tensor, 2, &found->token_stride));
  TRY(aoti_torch_get_stride(tensor, 3, &last_stride));
  found->data = static_cast<const float*>(pointer);
  return batch == 1 && last_stride == 1 ? AOTI_TORCH_SUCCESS : AOTI_TORCH_FAILURE;
}

}  // namespace

extern "C" {

void euryale_attention_threads(int count) { num_threads = count; }

// What the next layer on this thread attends with.
void euryale_attend_with(const Step* step, float* keys, float* values) {
  current = {Mode::STEP, step, keys, values};
}

void euryale_attend_as_echo() { current = {Mode::ECHO, nullptr, nullptr, nullptr}; }

// For Python; tensors are [heads, tokens, channels] with these strides, the output is contiguous.
// Returns 0 if there was memory.
int euryale_tree_attention(
    const float* queries, int64_t num_heads, int64_t query_head_stride, int64_t query_stride,
    const float* keys, int64_t num_kv_heads, int64_t key_head_stride, int64_t key_stride,
    const float* values, int64_t value_head_stride, int64_t value_stride, float* output,
    int64_t num_channels, double scaling, int64_t window) {
  const Layer layer = take_current();
  if (layer.mode != Mode::STEP) return 1;
  const Call call{
      {queries, num_heads, query_head_stride, query_stride},
      {keys, num_kv_heads, key_head_stride, key_stride},
      {values, num_kv_heads, value_head_stride, value_stride},
      output,
      num_channels,
      static_cast<float>(scaling),
      window};
  try {
    attend(call, layer);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

// For code that torch's inductor compiles: `euryale::own_attend` of `tree_attention.py`.
AOTITorchError aoti_torch_cpu_own_attend(
    AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, double scaling,
    int64_t window, AtenTensorHandle* output) try {
  const Layer layer = take_current();
  Call call{};
  int64_t num_tokens = 0, channels = 0, key_tokens = 0, key_channels = 0, value_tokens = 0,
          value_channels = 0;
  TRY(heads_of(query, &call.queries, &num_tokens, &channels));
  TRY(heads_of(key, &call.keys, &key_tokens, &key_channels));
  TRY(heads_of(value, &call.values, &value_tokens, &value_channels));
  const int64_t heads = call.queries.num_heads, kv_heads = call.keys.num_heads;
  const bool fits = key_tokens == num_tokens && value_tokens == num_tokens &&
                    key_channels == channels && value_channels == channels && channels % 8 == 0 &&
                    call.values.num_heads == kv_heads && heads % kv_heads == 0;
  if (!fits || layer.mode == Mode::NOTHING) return AOTI_TORCH_FAILURE;
  if (layer.mode == Mode::STEP && layer.step->num_tokens != num_tokens) return AOTI_TORCH_FAILURE;
  call.num_channels = channels;
  call.scaling = static_cast<float>(scaling);
  call.window = window;
  const int64_t sizes[] = {1, num_tokens, heads, channels};
  const int64_t strides[] = {num_tokens * heads * channels, heads * channels, channels, 1};
  AtenTensorHandle made = nullptr;
  TRY(aoti_torch_empty_strided(
      4, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cpu(), 0, &made));
  void* to = nullptr;
  TRY(aoti_torch_get_data_ptr(made, &to));
  call.output = static_cast<float*>(to);
  try {
    if (layer.mode == Mode::ECHO) echo(call, num_tokens);
    else attend(call, layer);
  } catch (const std::exception&) {
    aoti_torch_delete_tensor_object(made);
    return AOTI_TORCH_FAILURE;
  }
  *output = made;
  return AOTI_TORCH_SUCCESS;
} catch (const std::exception&) {
  return AOTI_TORCH_FAILURE;
}
}
