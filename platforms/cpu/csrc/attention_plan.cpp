// The plan of one step: which rows are reduced over which spans, and whose results are merged. See attention.h.
#include <algorithm>
#include <cstring>
#include <vector>

#include "attention.h"
#include "pool.h"

namespace attention {
namespace {

constexpr int64_t kUnitsPerThread = 8;  // with more sequences than that, their spans need not be split

struct Builder {
  const Shape& shape;
  const int32_t* tables;
  int64_t table_stride;
  std::vector<Sequence> sequences;
  std::vector<Run> runs;
  std::vector<Unit> units;
  std::vector<int32_t> merged;
  int64_t num_partials = 0, num_keys = 0;

  int num_rows(int sequence) const { return sequences[sequence].query_len * shape.group(); }

  void add_sequences(int64_t count, const int32_t* query_lens, const int32_t* seq_lens) {
    int32_t token = 0;
    for (int64_t i = 0; i < count; i++) {
      Sequence s{};
      s.first_token = token;
      s.query_len = query_lens[i];
      s.seq_len = seq_lens[i];
      s.first_span = shape.first_seen(s.seq_len - s.query_len) / kSpan;
      s.num_spans = s.query_len ? (s.seq_len + kSpan - 1) / kSpan - s.first_span : 0;
      token += s.query_len;
      sequences.push_back(s);
    }
  }

  void add_unit(size_t first_run, int rows, int first_span, int num_spans, bool is_partial) {
    units.push_back({static_cast<int32_t>(first_run), static_cast<int32_t>(runs.size() - first_run), rows, first_span,
                     num_spans, is_partial});
    num_keys += int64_t{num_spans} * kSpan;
  }

  // A sequence of many rows, a unit for each max_rows of them; the last ones, which see most, first.
  void add_long(int sequence) {
    const Sequence& s = sequences[sequence];
    int rows = num_rows(sequence), step = shape.max_rows();
    for (int row = (rows - 1) / step * step; row >= 0; row -= step) {
      int count = std::min(step, rows - row), start = s.seq_len - s.query_len;
      int first = start + row / shape.group(), last = start + (row + count - 1) / shape.group();
      int span = shape.first_seen(first) / kSpan;
      runs.push_back({sequence, row, count});
      add_unit(runs.size() - 1, count, span, last / kSpan + 1 - span, false);
    }
  }

  // The rows of these sequences, max_rows at a time. Over all of a sequence's spans, a unit is its only reader.
  void add_rows(const std::vector<int>& members, int first_span, int num_spans, bool is_partial) {
    size_t first_run = runs.size();
    int rows = 0;
    for (int sequence : members) {
      for (int row = 0; row < num_rows(sequence);) {
        int count = std::min(num_rows(sequence) - row, shape.max_rows() - rows);
        runs.push_back({sequence, row, count});
        row += count;
        rows += count;
        if (rows == shape.max_rows()) {
          add_unit(first_run, rows, first_span, num_spans, is_partial);
          first_run = runs.size();
          rows = 0;
        }
      }
    }
    if (rows) add_unit(first_run, rows, first_span, num_spans, is_partial);
  }

  const int32_t* span_blocks(int sequence, int span) const {
    return tables + sequence * table_stride + int64_t{span} * kSpan / shape.block_size;
  }
  bool covers(int sequence, int span) const {
    const Sequence& s = sequences[sequence];
    return span >= s.first_span && s.seq_len >= (span + 1) * kSpan;
  }

  // Sequences that see the whole span, in runs of equal blocks.
  std::vector<std::vector<int>> sharers(const std::vector<int>& members, int span) const {
    struct Key {
      uint64_t hash;
      int sequence;
    };
    size_t num_blocks = kSpan / shape.block_size, bytes = num_blocks * sizeof(int32_t);
    std::vector<Key> keys;
    for (int sequence : members) {
      if (!covers(sequence, span)) continue;
      uint64_t hash = 0;
      for (size_t i = 0; i < num_blocks; i++)
        hash = (hash ^ static_cast<uint32_t>(span_blocks(sequence, span)[i])) * 0x9E3779B97F4A7C15u;
      keys.push_back({hash, sequence});
    }
    std::stable_sort(keys.begin(), keys.end(), [](const Key& a, const Key& b) { return a.hash < b.hash; });
    std::vector<std::vector<int>> groups;
    uint64_t last_hash = 0;
    for (const Key& key : keys) {
      bool same = !groups.empty() && key.hash == last_hash &&
                  !std::memcmp(span_blocks(groups.back()[0], span), span_blocks(key.sequence, span), bytes);
      if (!same) groups.emplace_back();
      groups.back().push_back(key.sequence);
      last_hash = key.hash;
    }
    return groups;
  }

  // Sequences of few rows: whole where there are many of them, else span by span, sharing what they share.
  void add_short(const std::vector<int>& members) {
    bool is_few = static_cast<int64_t>(members.size()) * shape.num_kv_heads < kUnitsPerThread * fl_pool_num_threads();
    int last = 0;
    for (int i : members) last = std::max(last, sequences[i].first_span + sequences[i].num_spans);
    std::vector<std::vector<std::vector<int>>> shared(last);
    for (int span = 0; span < last && members.size() > 1; span++) {
      for (std::vector<int>& group : sharers(members, span)) {
        if (group.size() == 1) continue;
        for (int i : group) sequences[i].is_split = 1;
        shared[span].push_back(group);
      }
    }
    for (int i : members) {
      Sequence& s = sequences[i];
      s.is_split = (s.is_split || is_few) && s.num_spans > 1;
      if (!s.is_split) {
        add_rows({i}, s.first_span, s.num_spans, false);
        continue;
      }
      s.first_partial = num_partials;
      num_partials += int64_t{num_rows(i)} * s.num_spans;
      merged.push_back(i);
    }
    // A group whose span is all that its members have was not split: each of them has read it for itself above.
    std::vector<char> is_done(sequences.size());
    for (int span = 0; span < last; span++) {
      std::fill(is_done.begin(), is_done.end(), 0);
      for (std::vector<int>& group : shared[span]) {
        group.erase(std::remove_if(group.begin(), group.end(), [&](int i) { return !sequences[i].is_split; }),
                    group.end());
        for (int i : group) is_done[i] = 1;
        if (!group.empty()) add_rows(group, span, 1, true);
      }
      for (int i : members) {
        const Sequence& s = sequences[i];
        if (s.is_split && !is_done[i] && span >= s.first_span && span < s.first_span + s.num_spans)
          add_rows({i}, span, 1, true);
      }
    }
  }

  bool is_short(int i) const { return sequences[i].query_len <= 4 || num_rows(i) <= shape.max_rows(); }
};

}  // namespace
}  // namespace attention

FL_API int64_t fl_attention_block_bytes(const attention::Shape* shape) { return shape->block_bytes(); }

// Plans a step of `num_sequences`; returns the bytes that the plan takes, and writes it if `capacity` is as much.
// The arrays must outlive the plan, which points into them.
FL_API int64_t fl_attention_plan(const attention::Shape* shape, int64_t num_sequences, const int32_t* query_lens,
                                 const int32_t* seq_lens, const int32_t* tables, int64_t table_stride,
                                 const int32_t* slots, int64_t num_tokens, void* out, int64_t capacity) {
  using namespace attention;
  Builder b{*shape, tables, table_stride, {}, {}, {}, {}};
  b.add_sequences(num_sequences, query_lens, seq_lens);
  std::vector<int> few;
  for (int i = 0; i < num_sequences; i++) {
    if (!query_lens[i]) continue;
    if (b.is_short(i))
      few.push_back(i);
    else
      b.add_long(i);
  }
  int64_t num_long = static_cast<int64_t>(b.units.size());
  b.add_short(few);
  int64_t num_short = static_cast<int64_t>(b.units.size()) - num_long;

  Plan plan{tables,   slots,     table_stride,   num_tokens,        num_sequences, static_cast<int64_t>(b.runs.size()),
            num_long, num_short, b.num_partials, static_cast<int64_t>(b.merged.size()), b.num_keys};
  int64_t bytes = sizeof plan;
  auto put = [&](const auto& items) {
    int64_t size = static_cast<int64_t>(items.size() * sizeof(items[0]));
    if (bytes + size <= capacity && size) std::memcpy(static_cast<char*>(out) + bytes, items.data(), size);
    bytes += size;
  };
  put(b.sequences);
  put(b.runs);
  put(b.units);
  put(b.merged);
  if (bytes <= capacity) std::memcpy(out, &plan, sizeof plan);
  return bytes;
}

// Bytes of scratch that fl_attention needs for a plan.
FL_API int64_t fl_attention_scratch_bytes(const attention::Shape* shape, const attention::Plan* plan) {
  return plan->num_partials * shape->num_kv_heads * (shape->value_columns() + attention::kSegment) * 4;
}
