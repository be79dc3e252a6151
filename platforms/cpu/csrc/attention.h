// Paged attention: the shape of a group of layers, how its cache lies in memory, and the plan of one step.
//
// Keys are reduced in tiles of kTile at fixed absolute positions, online within a span of kSpan, and the spans' results
// are merged in order. A tile that a row does not see leaves the row's numbers as they are, to the bit. So a row's
// result depends on its own context alone: not on the batch, nor on where a prompt was cut into chunks, nor on which
// thread reads which span, nor on whether rows of several sequences share one pass over blocks that they share.
// Sources: Dao et al., "FlashAttention" (2022), algorithm 1; Dao et al., "Flash-Decoding" (2023), the split over keys;
// Juravsky et al., "Hydragen" (2024), section 3.1, one pass over a shared prefix for many sequences.
//
// The cache comes in two layouts, both of them blocks one after the other:
// * packed, for blocks of whole segments of kSegment tokens: per block and kv-head the keys of each segment transposed,
//   [block size / kSegment][ceil(D / P)][kSegment][P], then the values, [block size / P][Dv][P]. P is 2 for bfloat16, as
//   the dot-product instructions read pairs, and 1 for float32; so an entry is 4 bytes either way: a "unit".
// * plain, for other block sizes and for latent attention, whose keys hold the values: per token and kv-head D entries
//   of the key, then D of the value. A tile is packed on the fly.
// In either, entries may be stored as 8-bit floats (fp8.h); a tile is then widened to the shape's own type on the fly.
#pragma once
#include "export.h"

namespace attention {

constexpr int kSegment = 16, kTile = 64, kSpan = 512;
constexpr int kTileSegments = kTile / kSegment;

constexpr int32_t kAsComputed = 0, kE4M3 = 1, kE5M2 = 2;  // what the cache stores

struct Shape {  // the same in fairlead_cpu/native_attention.py
  int32_t num_heads, num_kv_heads, head_size, value_size, block_size;
  int32_t is_bf16, is_latent;
  int32_t sliding_window;  // 0: none
  float scale, soft_cap;   // 0: none
  const float* alibi_slopes;
  int32_t stored;  // kAsComputed, or a format that it narrows to

  int group() const { return num_heads / num_kv_heads; }
  int pair() const { return is_bf16 ? 2 : 1; }
  bool is_packed() const { return block_size % kSegment == 0 && !is_latent; }
  int key_units() const { return (head_size + pair() - 1) / pair(); }  // of one token
  int value_columns() const { return (value_size + kSegment - 1) / kSegment * kSegment; }
  int64_t segment_key_units() const { return int64_t{key_units()} * kSegment; }
  int64_t segment_value_units() const { return int64_t{kSegment} / pair() * value_columns(); }
  int64_t segment_units() const { return segment_key_units() + segment_value_units(); }
  int64_t head_units() const { return block_size / kSegment * segment_units(); }  // of a block and kv-head
  int64_t plain_row() const { return int64_t{head_size} * (is_latent ? 1 : 2); }  // in entries, per token and kv-head
  int64_t block_entries() const {
    return is_packed() ? head_units() * pair() * num_kv_heads : plain_row() * num_kv_heads * block_size;
  }
  int64_t block_bytes() const { return block_entries() * (stored ? 1 : is_bf16 ? 2 : 4); }
  // Rows (a query token and a head of the group) that one unit of work takes at most: its accumulators stay in cache.
  static constexpr int kMaxRows = 64;
  int max_rows() const { return value_columns() <= 96 ? kMaxRows : value_columns() <= 256 ? 32 : 16; }
  int first_seen(int position) const {
    return sliding_window > 0 && position >= sliding_window ? position - sliding_window + 1 : 0;
  }
};

struct Sequence {
  int32_t first_token, query_len, seq_len;
  int32_t first_span, num_spans;  // that its queries see
  int32_t is_split;               // whether its spans are units of their own, merged at the end
  int64_t first_partial;          // of a kv-head's; then row by row, span by span
};

struct Run {  // rows of one sequence: row r is its token r / group and head r % group of the kv-head's
  int32_t sequence, first_row, num_rows;
};

struct Unit {  // of work, for each kv-head: these rows over these spans, whose blocks are those of the first run
  int32_t first_run, num_runs, num_rows, first_span, num_spans, is_partial;
};

struct Plan {
  const int32_t* tables;
  const int32_t* slots;
  int64_t table_stride, num_tokens, num_sequences, num_runs;
  int64_t num_long, num_short;  // units; the long ones come first
  int64_t num_partials;         // of a kv-head
  int64_t num_merged;           // sequences whose spans are merged
  int64_t num_keys;             // that are read, over all units: what the step costs

  // Behind the struct: sequences, runs, units, indices of the merged sequences.
  const Sequence* sequences() const { return reinterpret_cast<const Sequence*>(this + 1); }
  const Run* runs() const { return reinterpret_cast<const Run*>(sequences() + num_sequences); }
  const Unit* units() const { return reinterpret_cast<const Unit*>(runs() + num_runs); }
  const int32_t* merged() const { return reinterpret_cast<const int32_t*>(units() + num_long + num_short); }
};

}  // namespace attention
