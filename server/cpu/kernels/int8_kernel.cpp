// Linear layers with int8 weights on x86 CPUs with AVX-512 VNNI: one call writes rows in codes,
// multiplies them and scales. `int8_linear.py` says what is computed, `int8_kernel.py` calls this.
//
// A row's codes have 16 bits; their high and low bytes are two rows of the product, so that each
// 32-bit lane of a weight register is multiplied by a broadcast of four bytes of a row (vpdpbusd).
// Weights lie in panels of 32 outputs, so a panel's step of four inputs is two registers; up to six
// tokens (twelve rows) are summed at once, which takes 24 of 32 registers. Sums are integers, and
// what follows them is the same code for any number of tokens, so a token's output does not depend
// on its neighbours, not even in its last bit.

#include <immintrin.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
#include <limits>
#include <vector>

namespace {

constexpr int64_t LANES = 16;        // Floats, or groups of four bytes, of a register.
constexpr int64_t PANEL = 32;        // Outputs that are summed at once.
constexpr int64_t GROUP = 4;         // Inputs that one instruction sums into a lane.
constexpr int64_t MAX_TOKENS = 6;    // Tokens that are summed at once.
constexpr int64_t CHUNK = 192;       // Tokens whose codes are kept at once.
constexpr float MAX_CODE = 65535.0f;
constexpr float BASE = 256.0f;

std::atomic<int> num_threads{1};

struct Layer {
  const int8_t* weight;  // [panels, inputs / 4, 32, 4], zeros where there is no input or output.
  const float* scale;    // [outputs]
  const float* ones;     // [outputs], what a row of ones gives.
  const float* bias;     // [outputs], or null.
  int64_t num_inputs;
  int64_t num_padded;    // Inputs, a multiple of 16.
  int64_t num_outputs;
};

// A row is (high * 256 + low) * scale + minimum.
struct Row {
  float scale;
  float minimum;
};

__mmask16 first_lanes(int64_t count) {
  return count >= LANES ? 0xFFFF : static_cast<__mmask16>((1u << count) - 1);
}

// Write the codes of one row: for each group of four inputs four high bytes, then four low ones.
// Groups of tokens that are summed together alternate, so `stride` bytes lie between a row's.
Row encode(const float* row, const Layer& layer, uint8_t* codes, int64_t stride) {
  __m512 least = _mm512_set1_ps(row[0]), largest = least;
  __mmask16 not_numbers = 0;
  for (int64_t i = 0; i < layer.num_inputs; i += LANES) {
    const __mmask16 lanes = first_lanes(layer.num_inputs - i);
    const __m512 x = _mm512_mask_loadu_ps(least, lanes, row + i);
    not_numbers |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    least = _mm512_min_ps(least, x);
    largest = _mm512_max_ps(largest, x);
  }
  const float minimum = _mm512_reduce_min_ps(least);
  const float spread = _mm512_reduce_max_ps(largest) - minimum;
  const float tiny = std::numeric_limits<float>::min();
  float scale = spread / MAX_CODE;
  scale = scale < tiny ? tiny : scale;
  const __m512 inverse = _mm512_set1_ps(1.0f / scale), offset = _mm512_set1_ps(minimum);
  for (int64_t i = 0; i < layer.num_padded; i += LANES) {
    const __mmask16 lanes = first_lanes(layer.num_inputs - i);
    const __m512 x = _mm512_maskz_loadu_ps(lanes, row + i);
    const __m512 steps = _mm512_mul_ps(_mm512_sub_ps(x, offset), inverse);
    const __m512i code = _mm512_maskz_cvtps_epi32(lanes, steps);
    const __m128i high = _mm512_cvtepi32_epi8(_mm512_srli_epi32(code, 8));
    const __m128i low = _mm512_cvtepi32_epi8(code);
    const __m128i front = _mm_unpacklo_epi32(high, low), back = _mm_unpackhi_epi32(high, low);
    uint8_t* to = codes + i / GROUP * stride;
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to), front);
    _mm_storeh_pd(reinterpret_cast<double*>(to + stride), _mm_castsi128_pd(front));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 2 * stride), back);
    _mm_storeh_pd(reinterpret_cast<double*>(to + 3 * stride), _mm_castsi128_pd(back));
  }
  // Codes of what is no number mean nothing; neither may the output look like a number.
  const bool is_finite = !not_numbers && spread <= std::numeric_limits<float>::max();
  return {is_finite ? scale : std::numeric_limits<float>::quiet_NaN(), minimum};
}

// Half of a panel's outputs of one token.
void put(__m512i high, __m512i low, const Row& row, const Layer& layer, int64_t output, float* to) {
  if (output >= layer.num_outputs) return;
  const __mmask16 lanes = first_lanes(layer.num_outputs - output);
  const __m512 sum =
      _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(BASE), _mm512_cvtepi32_ps(low));
  const __m512 scale = _mm512_mul_ps(
      _mm512_maskz_loadu_ps(lanes, layer.scale + output), _mm512_set1_ps(row.scale));
  const __m512 ones = _mm512_maskz_loadu_ps(lanes, layer.ones + output);
  __m512 y = _mm512_fmadd_ps(
      sum, scale, _mm512_mul_ps(ones, _mm512_set1_ps(row.minimum)));
  if (layer.bias) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(lanes, layer.bias + output));
  _mm512_mask_storeu_ps(to + output, lanes, y);
}

// One panel of some tokens, whose codes alternate.
template <int TOKENS>
void multiply(
    const uint8_t* codes, const Row* rows, const Layer& layer, int64_t panel, float* outputs) {
  const int64_t num_groups = layer.num_padded / GROUP;
  const int8_t* weight = layer.weight + panel * PANEL * layer.num_padded;
  __m512i sums[2 * TOKENS][2];
  for (auto& sum : sums) sum[0] = sum[1] = _mm512_setzero_si512();
  for (int64_t group = 0; group < num_groups; ++group) {
    const __m512i left = _mm512_loadu_si512(weight);
    const __m512i right = _mm512_loadu_si512(weight + LANES * GROUP);
#pragma GCC unroll 12
    for (int i = 0; i < 2 * TOKENS; ++i) {
      int32_t four;
      std::memcpy(&four, codes + i * GROUP, GROUP);
      const __m512i bytes = _mm512_set1_epi32(four);
      sums[i][0] = _mm512_dpbusd_epi32(sums[i][0], bytes, left);
      sums[i][1] = _mm512_dpbusd_epi32(sums[i][1], bytes, right);
    }
    weight += PANEL * GROUP;
    codes += 2 * TOKENS * GROUP;
  }
#pragma GCC unroll 6
  for (int i = 0; i < TOKENS; ++i) {
    float* to = outputs + i * layer.num_outputs;
    put(sums[2 * i][0], sums[2 * i + 1][0], rows[i], layer, panel * PANEL, to);
    put(sums[2 * i][1], sums[2 * i + 1][1], rows[i], layer, panel * PANEL + LANES, to);
  }
}

using Multiply = void (*)(const uint8_t*, const Row*, const Layer&, int64_t, float*);
constexpr Multiply MULTIPLY[] = {
    nullptr, multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};

// Tokens of a chunk in tiles of nearly the same size, so that none takes much longer per token.
struct Tiles {
  int64_t num_tokens;
  int64_t count;

  explicit Tiles(int64_t tokens)
      : num_tokens(tokens), count((tokens + MAX_TOKENS - 1) / MAX_TOKENS) {}
  int64_t begin(int64_t tile) const { return num_tokens * tile / count; }
};

void compute(const float* input, const Layer& layer, float* output, int64_t num_tokens) {
  static thread_local std::vector<uint8_t> code_memory;
  static thread_local std::vector<Row> row_memory;
  const int64_t largest = num_tokens < CHUNK ? num_tokens : CHUNK;
  if (static_cast<int64_t>(code_memory.size()) < 2 * largest * layer.num_padded)
    code_memory.resize(2 * largest * layer.num_padded);
  if (static_cast<int64_t>(row_memory.size()) < largest) row_memory.resize(largest);
  uint8_t* codes = code_memory.data();
  Row* rows = row_memory.data();
  const int64_t num_panels = (layer.num_outputs + PANEL - 1) / PANEL;

#pragma omp parallel num_threads(num_threads.load())
  for (int64_t first = 0; first < num_tokens; first += CHUNK) {
    const Tiles tiles(num_tokens - first < CHUNK ? num_tokens - first : CHUNK);
#pragma omp for schedule(static)
    for (int64_t token = 0; token < tiles.num_tokens; ++token) {
      int64_t tile = token * tiles.count / tiles.num_tokens;
      while (tiles.begin(tile + 1) <= token) ++tile;
      const int64_t begin = tiles.begin(tile), size = tiles.begin(tile + 1) - begin;
      uint8_t* to = codes + 2 * begin * layer.num_padded + (token - begin) * 2 * GROUP;
      const float* row = input + (first + token) * layer.num_inputs;
      rows[token] = encode(row, layer, to, 2 * size * GROUP);
    }
    // All wait here until the codes are there, and below until nobody reads them any more.
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < num_panels; ++panel) {
      for (int64_t tile = 0; tile < tiles.count; ++tile) {
        const int64_t begin = tiles.begin(tile), size = tiles.begin(tile + 1) - begin;
        MULTIPLY[size](
            codes + 2 * begin * layer.num_padded, rows + begin, layer, panel,
            output + (first + begin) * layer.num_outputs);
      }
    }
  }
}

#define TRY(call)                            \
  do {                                       \
    if (AOTITorchError e = (call)) return e; \
  } while (0)

AOTITorchError data(AtenTensorHandle tensor, const void** found) {
  return aoti_torch_get_data_ptr(tensor, const_cast<void**>(found));
}

}  // namespace

extern "C" {

void euryale_set_num_threads(int count) { num_threads = count; }

// For Python, by address. Floats are contiguous, the weight is packed. Returns 0 if there was memory.
int euryale_int8_linear(
    const float* input, const int8_t* weight, const float* scale, const float* ones,
    const float* bias, float* output, int64_t num_tokens, int64_t num_inputs,
    int64_t num_padded, int64_t num_outputs) {
  try {
    compute(
        input, {weight, scale, ones, bias, num_inputs, num_padded, num_outputs}, output,
        num_tokens);
  } catch (const std::exception&) {
    return 1;
  }
  return 0;
}

// For code that torch's inductor compiles: `euryale::vnni_linear` of `int8_kernel.py`.
AOTITorchError aoti_torch_cpu_vnni_linear(
    AtenTensorHandle input, AtenTensorHandle weight, AtenTensorHandle scale,
    AtenTensorHandle ones, AtenTensorHandle* bias, AtenTensorHandle* output) try {
  bool is_contiguous = false;
  TRY(aoti_torch_is_contiguous(input, &is_contiguous));
  if (!is_contiguous) return AOTI_TORCH_FAILURE;
  int64_t num_axes = 0, num_values = 0, num_groups = 0, num_outputs = 0;
  int64_t* sizes = nullptr;
  TRY(aoti_torch_get_dim(input, &num_axes));
  TRY(aoti_torch_get_sizes(input, &sizes));
  TRY(aoti_torch_get_numel(input, &num_values));
  TRY(aoti_torch_get_size(weight, 1, &num_groups));
  TRY(aoti_torch_get_numel(scale, &num_outputs));
  const int64_t num_inputs = sizes[num_axes - 1];
  std::vector<int64_t> output_sizes(sizes, sizes + num_axes), strides(num_axes, 1);
  output_sizes[num_axes - 1] = num_outputs;
  for (int64_t axis = num_axes - 2; axis >= 0; --axis)
    strides[axis] = strides[axis + 1] * output_sizes[axis + 1];
  const void *from = nullptr, *packed = nullptr, *scales = nullptr, *sums = nullptr,
             *added = nullptr, *to = nullptr;
  TRY(data(input, &from));
  TRY(data(weight, &packed));
  TRY(data(scale, &scales));
  TRY(data(ones, &sums));
  if (bias) TRY(data(*bias, &added));
  TRY(aoti_torch_empty_strided(
      num_axes, output_sizes.data(), strides.data(), aoti_torch_dtype_float32(),
      aoti_torch_device_type_cpu(), 0, output));
  TRY(data(*output, &to));
  const Layer layer{
      static_cast<const int8_t*>(packed), static_cast<const float*>(scales),
      static_cast<const float*>(sums),    static_cast<const float*>(added),
      num_inputs,                         num_groups * GROUP,
      num_outputs};
  compute(
      static_cast<const float*>(from), layer, static_cast<float*>(const_cast<void*>(to)),
      num_values / num_inputs);
  return AOTI_TORCH_SUCCESS;
} catch (const std::exception&) {
  return AOTI_TORCH_FAILURE;
}
}
