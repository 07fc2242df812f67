// The sums of an item: scores of the slots that its rows see, weights, and weighted values.
//
// Lanes of a register hold rows, never channels or slots, so no sum runs across lanes.

#pragma once

#include <algorithm>
#include <limits>

#include "attention_step.h"

namespace {

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

void score(const Call& call, const Layer& layer, int64_t num_seen, Scratch& scratch) {
  const __m512 scaling = _mm512_set1_ps(call.scaling);
  for (int64_t first = 0; first < num_seen; first += KEYS) {
    const float* keys[KEYS];
    for (int64_t i = 0; i < KEYS; ++i)
      keys[i] = layer.keys + scratch.offsets[std::min(first + i, num_seen - 1)];
    __m512 sums[KEYS];
    for (auto& sum : sums) sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < call.num_channels; ++c) {
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
__m512 weigh(int64_t num_seen, Scratch& scratch) {
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
void sum_values(
    const Layer& layer, int64_t num_seen, int64_t channel, __m512 inverse, Scratch& scratch) {
  __m512 sums[CHANNELS];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < num_seen; ++i) {
    const float* value = layer.values + scratch.offsets[i] + channel;
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

}  // namespace
