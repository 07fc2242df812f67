// Which slots the rows of an item see: causal order or a tree's mask, and a sliding window.

#pragma once

#include <algorithm>

#include "attention_step.h"

namespace {

bool sees(const Span& span, int64_t query, int64_t slot, int64_t window) {
  const int64_t width = span.num_slots - span.context_len;
  const int64_t own = slot - span.context_len, own_query = width - span.num_queries + query;
  if (own >= 0 && !(span.mask ? span.mask[query * width + own] != 0 : own <= own_query))
    return false;
  if (window == NO_WINDOW) return true;
  const auto position = [&](int64_t i) {
    return i < 0 || !span.depths ? span.context_len + i : span.context_len + span.depths[i];
  };
  return position(own_query) - position(own) < window;
}

// Lists the slots that any of the rows sees, in their order, with the rows that see them; returns
// how many there are.
int64_t find_seen(
    const Call& call, const Step& step, const Item& item, int64_t num_rows, Scratch& scratch) {
  const Span& span = *item.span;
  const int64_t size = step.block_size, group = call.group();
  const int64_t kv_stride = call.keys.num_heads * call.num_channels;
  scratch.seen.clear();
  scratch.offsets.clear();
  const auto all = static_cast<__mmask16>((1u << num_rows) - 1);
  const bool is_plain = call.window == NO_WINDOW && !span.mask;
  // No query has a position below the context's end.
  const int64_t first_seen =
      call.window == NO_WINDOW ? 0 : std::max<int64_t>(0, span.context_len - call.window + 1);
  for (int64_t slot = first_seen; slot < span.num_slots; ++slot) {
    const int64_t own = slot - span.context_len;
    __mmask16 seen = all;
    if (is_plain && own > 0) {
      // In causal order the rows of later queries, which come last, see it.
      const int64_t blind = own * group - item.first_row;
      if (blind >= num_rows) break;
      if (blind > 0) seen &= static_cast<__mmask16>(0xFFFFu << blind);
    } else if (!is_plain && (own >= 0 || call.window != NO_WINDOW)) {
      seen = 0;
      for (int64_t lane = 0; lane < num_rows; ++lane) {
        const int64_t query = (item.first_row + lane) / group;
        seen |= static_cast<__mmask16>(sees(span, query, slot, call.window)) << lane;
      }
    }
    if (!seen) continue;
    const int64_t place = span.block_table[slot / size] * size + slot % size;
    scratch.seen.push_back(seen);
    scratch.offsets.push_back(place * kv_stride + item.kv_head * call.num_channels);
  }
  return static_cast<int64_t>(scratch.seen.size());
}

}  // namespace
