// Paged tree attention in float32 on x86 CPUs with AVX-512: `tree_attention.py` drives it.
//
// A token's output is the same to the bit in any company. A query's keys are visited in the order
// of their positions, one after the other; keys that it does not see are skipped in its lane, so a
// node of a tree computes what it computes when its path has become plain text.
//
// Rows are pairs of a query and a head that share a KV head; sixteen of them are computed at once,
// one in each lane: lanes hold scores, never channels, so no sum runs across lanes.

#include <immintrin.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <limits>
#include <new>
#include <vector>

namespace {

constexpr int64_t ROWS = 16;     // Rows that are computed at once.
constexpr int64_t KEYS = 8;      // Keys whose scores are summed at once.
constexpr int64_t NO_WINDOW = -1;

std::atomic<int> num_threads{1};

}  // namespace

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

enum class Mode { NOTHING, ECHO, STEP };

// What a layer attends with.
struct Layer {
  Mode mode = Mode::NOTHING;  // ECHO is that of `block_calls.py`.
  const Step* step = nullptr;
  float* keys = nullptr;      // [slots, kv_heads, channels]
  float* values = nullptr;    // Likewise.
};

thread_local Layer current;

// Each layer is told anew what it attends with, so that nobody reads a step that has gone.
Layer take_current() {
  const Layer layer = current;
  current = Layer{};
  return layer;
}

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
};

// Sixteen rows of one KV head of one sequence.
struct Item {
  const Span* span;
  int64_t kv_head;
  int64_t first_row;
};

// exp(x) for x <= 0, within two units in the last place (Cephes' coefficients); 0 where it underflows.
__m512 exp_of(__m512 x) {
  const __mmask16 is_tiny = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_LT_OQ);
  const __m512 n = _mm512_roundscale_ps(
      _mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                  5.0000001201e-1f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  y = _mm512_fmadd_ps(y, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_maskz_scalef_ps(static_cast<__mmask16>(~is_tiny), y, n);
}

// Scratch of one thread.
struct Scratch {
  std::vector<float> queries;       // [channels, 16]
  std::vector<float> scores;        // [slots, 16], then weights.
  std::vector<float> outputs;       // [channels, 16]
  std::vector<__mmask16> seen;      // Of each slot, which rows see it.
  std::vector<int64_t> offsets;     // Of each slot that some row sees, in the cache.
};

class Attention {
 public:
  Attention(const Call& call, const Layer& layer)
      : call_(call), layer_(layer), group_(call.queries.num_heads / call.keys.num_heads) {}

  int64_t rows_of(const Span& span) const { return span.num_queries * group_; }

  void write_token(int64_t token) const {
    const int64_t channels = call_.num_channels, heads = call_.keys.num_heads;
    const int64_t place = layer_.step->slots[token] * heads * channels;
    for (int64_t head = 0; head < heads; ++head) {
      const float *key = call_.keys.at(head, token), *value = call_.values.at(head, token);
      float *to_key = layer_.keys + place + head * channels,
            *to_value = layer_.values + place + head * channels;
      for (int64_t c = 0; c < channels; ++c) to_key[c] = key[c], to_value[c] = value[c];
    }
  }

  void compute(const Item& item, Scratch& scratch) const {
    const int64_t channels = call_.num_channels;
    const int64_t num_rows = std::min(ROWS, rows_of(*item.span) - item.first_row);
    scratch.queries.assign(channels * ROWS, 0.0f);
    scratch.outputs.resize(channels * ROWS);
    for (int64_t lane = 0; lane < num_rows; ++lane) {
      const float* query = call_.queries.at(head_of(item, lane), token_of(item, lane));
      for (int64_t c = 0; c < channels; ++c) scratch.queries[c * ROWS + lane] = query[c];
    }
    const int64_t num_seen = find_seen(item, num_rows, scratch);
    scratch.scores.resize((num_seen + KEYS) * ROWS);
    score(num_seen, scratch);
    const __m512 inverse = weigh(num_seen, scratch);
    int64_t c = 0;
    for (; c + 16 <= channels; c += 16) sum_values<16>(num_seen, c, inverse, scratch);
    if (c < channels) sum_values<8>(num_seen, c, inverse, scratch);
    for (int64_t lane = 0; lane < num_rows; ++lane) {
      float* to = call_.output +
                  (token_of(item, lane) * call_.queries.num_heads + head_of(item, lane)) * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] = scratch.outputs[c * ROWS + lane];
    }
  }

 private:
  int64_t query_of(const Item& item, int64_t lane) const { return (item.first_row + lane) / group_; }
  int64_t token_of(const Item& item, int64_t lane) const {
    return item.span->start + query_of(item, lane);
  }
  int64_t head_of(const Item& item, int64_t lane) const {
    return item.kv_head * group_ + (item.first_row + lane) % group_;
  }

  // Lists the slots that any of the rows sees, in their order, with the rows that see them.
  int64_t find_seen(const Item& item, int64_t num_rows, Scratch& scratch) const {
    const Span& span = *item.span;
    const int64_t size = layer_.step->block_size;
    const int64_t kv_stride = call_.keys.num_heads * call_.num_channels;
    scratch.seen.clear();
    scratch.offsets.clear();
    const auto all = static_cast<__mmask16>((1u << num_rows) - 1);
    const bool is_plain = call_.window == NO_WINDOW && !span.mask;
    // No query has a position below the context's end.
    const int64_t first_seen =
        call_.window == NO_WINDOW ? 0 : std::max<int64_t>(0, span.context_len - call_.window + 1);
    for (int64_t slot = first_seen; slot < span.num_slots; ++slot) {
      const int64_t own = slot - span.context_len;
      __mmask16 seen = all;
      if (is_plain && own > 0) {
        // In causal order the rows of later queries, which come last, see it.
        const int64_t blind = own * group_ - item.first_row;
        if (blind >= num_rows) break;
        if (blind > 0) seen &= static_cast<__mmask16>(0xFFFFu << blind);
      } else if (!is_plain && (own >= 0 || call_.window != NO_WINDOW)) {
        seen = 0;
        for (int64_t lane = 0; lane < num_rows; ++lane)
          seen |= static_cast<__mmask16>(sees(span, query_of(item, lane), slot)) << lane;
      }
      if (!seen) continue;
      const int64_t place = span.block_table[slot / size] * size + slot % size;
      scratch.seen.push_back(seen);
      scratch.offsets.push_back(place * kv_stride + item.kv_head * call_.num_channels);
    }
    return static_cast<int64_t>(scratch.seen.size());
  }

  bool sees(const Span& span, int64_t query, int64_t slot) const {
    const int64_t width = span.num_slots - span.context_len;
    const int64_t own = slot - span.context_len, own_query = width - span.num_queries + query;
    if (own >= 0 && !(span.mask ? span.mask[query * width + own] != 0 : own <= own_query))
      return false;
    if (call_.window == NO_WINDOW) return true;
    const auto position = [&](int64_t i) {
      return i < 0 || !span.depths ? span.context_len + i : span.context_len + span.depths[i];
    };
    return position(own_query) - position(own) < call_.window;
  }

  void score(int64_t num_seen, Scratch& scratch) const {
    const __m512 scaling = _mm512_set1_ps(call_.scaling);
    for (int64_t first = 0; first < num_seen; first += KEYS) {
      const float* keys[KEYS];
      for (int64_t i = 0; i < KEYS; ++i)
        keys[i] = layer_.keys + scratch.offsets[std::min(first + i, num_seen - 1)];
      __m512 sums[KEYS];
      for (auto& sum : sums) sum = _mm512_setzero_ps();
      for (int64_t c = 0; c < call_.num_channels; ++c) {
        const __m512 query = _mm512_loadu_ps(scratch.queries.data() + c * ROWS);
#pragma GCC unroll 8
        for (int i = 0; i < KEYS; ++i)
          sums[i] = _mm512_fmadd_ps(query, _mm512_set1_ps(keys[i][c]), sums[i]);
      }
      for (int64_t i = 0; i < KEYS; ++i)
        _mm512_storeu_ps(
            scratch.scores.data() + (first + i) * ROWS, _mm512_mul_ps(sums[i], scaling));
    }
  }

  // Scores become weights that are still to be divided by their sum, whose inverse is returned.
  __m512 weigh(int64_t num_seen, Scratch& scratch) const {
    __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    float* scores = scratch.scores.data();
    for (int64_t i = 0; i < num_seen; ++i)
      largest = _mm512_mask_max_ps(
          largest, scratch.seen[i], largest, _mm512_loadu_ps(scores + i * ROWS));
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < num_seen; ++i) {
      const __m512 weight = exp_of(_mm512_sub_ps(_mm512_loadu_ps(scores + i * ROWS), largest));
      _mm512_storeu_ps(scores + i * ROWS, weight);
      sum = _mm512_mask_add_ps(sum, scratch.seen[i], sum, weight);
    }
    return _mm512_div_ps(_mm512_set1_ps(1.0f), sum);
  }

  template <int CHANNELS>
  void sum_values(int64_t num_seen, int64_t channel, __m512 inverse, Scratch& scratch) const {
    __m512 sums[CHANNELS];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < num_seen; ++i) {
      const float* value = layer_.values + scratch.offsets[i] + channel;
      const __m512 weight = _mm512_loadu_ps(scratch.scores.data() + i * ROWS);
      const __mmask16 seen = scratch.seen[i];
      // NOTE: A weight of zero is not enough: what a row does not see may be no number.
#pragma GCC unroll 16
      for (int c = 0; c < CHANNELS; ++c)
        sums[c] = _mm512_mask3_fmadd_ps(weight, _mm512_set1_ps(value[c]), sums[c], seen);
    }
    for (int c = 0; c < CHANNELS; ++c)
      _mm512_storeu_ps(
          scratch.outputs.data() + (channel + c) * ROWS, _mm512_mul_ps(sums[c], inverse));
  }

  const Call& call_;
  const Layer& layer_;
  const int64_t group_;
};

void attend(const Call& call, const Layer& layer) {
  const Attention attention(call, layer);
  const Step& step = *layer.step;
  static thread_local std::vector<Item> item_memory;
  item_memory.clear();
  for (int64_t i = 0; i < step.num_spans; ++i)
    for (int64_t row = 0; row < attention.rows_of(step.spans[i]); row += ROWS)
      for (int64_t head = 0; head < call.keys.num_heads; ++head)
        item_memory.push_back({step.spans + i, head, row});
  const Item* items = item_memory.data();
  std::atomic<bool> has_memory{true};
  const auto num_items = static_cast<int64_t>(item_memory.size());
#pragma omp parallel num_threads(num_threads.load())
  {
    static thread_local Scratch scratch;
#pragma omp for schedule(static)
    for (int64_t token = 0; token < step.num_tokens; ++token) attention.write_token(token);
    // All keys are there before anybody reads them. Items of long texts take longer.
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < num_items; ++i) {
      try {
        attention.compute(items[i], scratch);
      } catch (const std::bad_alloc&) {  // Nothing may leave a parallel region.
        has_memory = false;
      }
    }
  }
  if (!has_memory) throw std::bad_alloc();
}

// As `EchoBackend` of block_calls.py: a function of all that a block decides about attention.
void echo(const Call& call, int64_t num_tokens) {
  const int64_t group = call.queries.num_heads / call.keys.num_heads;
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

// For code that torch's inductor compiles: `euryale::native_attend` of `tree_attention.py`.
AOTITorchError aoti_torch_cpu_native_attend(
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
