// Reading and writing the paged cache: tokens in, tiles of packed keys and values out. See attention.h.
#pragma once
#include <cstring>

#include "attention.h"

namespace attention {

// Keys and values of a step's tokens, rows of `Element`; strides in elements.
template <class Element>
struct Rows {
  const Element* data;
  int64_t token_stride, head_stride;
  const Element* row(int64_t token, int head) const { return data + token * token_stride + head * head_stride; }
};

// One token's key into column `lane` of a segment's keys; an odd last entry is paired with 0.
template <class Kv>
inline void put_key(uint32_t* keys, int lane, const typename Kv::Element* x, int size) {
  int whole = size / Kv::kPair;
  for (int i = 0; i < whole; i++) std::memcpy(keys + i * kSegment + lane, x + i * Kv::kPair, 4);
  if (whole * Kv::kPair < size) {
    uint32_t last = 0;
    std::memcpy(&last, x + size - 1, sizeof *x);
    keys[whole * kSegment + lane] = last;
  }
}

// One token's value into row `lane` of a segment's values, or into half of the units of a pair's row.
template <class Kv>
inline void put_value(uint32_t* values, int lane, const typename Kv::Element* x, int size, int columns) {
  auto* row = reinterpret_cast<typename Kv::Element*>(values + lane / Kv::kPair * columns) + lane % Kv::kPair;
  for (int i = 0; i < size; i++) row[i * Kv::kPair] = x[i];
}

template <class Kv>
void write_tokens(const Shape& shape, const int32_t* slots, int64_t begin, int64_t end,
                  const Rows<typename Kv::Element>& keys, const Rows<typename Kv::Element>& values, void* cache) {
  using Element = typename Kv::Element;
  const int64_t block_units = shape.block_bytes() / 4;
  for (int64_t token = begin; token < end; token++) {
    int64_t slot = slots[token];
    for (int head = 0; head < shape.num_kv_heads; head++) {
      const Element* key = keys.row(token, head);
      if (!shape.is_packed()) {
        Element* to = static_cast<Element*>(cache) + (slot * shape.num_kv_heads + head) * shape.plain_row();
        std::memcpy(to, key, shape.head_size * sizeof *key);
        if (!shape.is_latent)
          std::memcpy(to + shape.head_size, values.row(token, head), shape.head_size * sizeof *key);
        continue;
      }
      int offset = static_cast<int>(slot % shape.block_size), num_segments = shape.block_size / kSegment;
      uint32_t* segment = static_cast<uint32_t*>(cache) + slot / shape.block_size * block_units +
                          (head * num_segments + offset / kSegment) * shape.segment_units();
      put_key<Kv>(segment, offset % kSegment, key, shape.head_size);
      put_value<Kv>(segment + shape.segment_key_units(), offset % kSegment, values.row(token, head), shape.value_size,
                    shape.value_columns());
    }
  }
}

// Where the keys [low, high) of a tile stand: keys by segment, values by row (of a key, or of a pair of keys).
// Entries of no key of the range are never multiplied with a value: they may hold anything, NaN too.
template <class Kv>
struct Tile {
  const uint32_t* keys[kTileSegments];
  const uint32_t* values[kTile / Kv::kPair];

  // `own` has room for kTileSegments segments, all of it written before.
  void load(const Shape& shape, const void* cache, const int32_t* table, int head, int start, int low, int high,
            uint32_t* own) {
    if (shape.is_packed())
      find(shape, static_cast<const uint32_t*>(cache), table, head, start, low, high, own);
    else
      pack(shape, static_cast<const typename Kv::Element*>(cache), table, head, start, low, high, own);
  }

 private:
  void find(const Shape& shape, const uint32_t* cache, const int32_t* table, int head, int start, int low, int high,
            uint32_t* own) {
    const int64_t block_units = shape.block_bytes() / 4;
    const int per_block = shape.block_size / kSegment, columns = shape.value_columns();
    for (int s = low / kSegment; s * kSegment < high; s++) {
      int segment = start / kSegment + s;
      const uint32_t* at = cache + table[segment / per_block] * block_units +
                           (head * per_block + segment % per_block) * shape.segment_units();
      keys[s] = at;
      at += shape.segment_key_units();
      for (int i = 0; i < kSegment / Kv::kPair; i++) values[s * kSegment / Kv::kPair + i] = at + i * columns;
    }
    if constexpr (Kv::kPair == 2) {
      if (low % 2) clear_half(&values[low / 2], 0xffff0000, columns, own);
      if (high % 2) clear_half(&values[high / 2], 0x0000ffff, columns, own + columns);
    }
  }

  static void clear_half(const uint32_t** row, uint32_t mask, int columns, uint32_t* own) {
    for (int i = 0; i < columns; i++) own[i] = (*row)[i] & mask;
    *row = own;
  }

  void pack(const Shape& shape, const typename Kv::Element* cache, const int32_t* table, int head, int start, int low,
            int high, uint32_t* own) {
    const int columns = shape.value_columns();
    for (int s = 0; s < kTileSegments; s++) {
      keys[s] = own + s * shape.segment_units();
      for (int i = 0; i < kSegment / Kv::kPair; i++)
        values[s * kSegment / Kv::kPair + i] = keys[s] + shape.segment_key_units() + i * columns;
    }
    if (low % Kv::kPair) std::memset(const_cast<uint32_t*>(values[low / Kv::kPair]), 0, columns * 4);
    if (high % Kv::kPair) std::memset(const_cast<uint32_t*>(values[high / Kv::kPair]), 0, columns * 4);
    for (int i = low; i < high; i++) {
      int position = start + i;
      int64_t slot = int64_t{table[position / shape.block_size]} * shape.block_size + position % shape.block_size;
      const auto* row = cache + (slot * shape.num_kv_heads + head) * shape.plain_row();
      uint32_t* segment = const_cast<uint32_t*>(keys[i / kSegment]);
      put_key<Kv>(segment, i % kSegment, row, shape.head_size);
      put_value<Kv>(segment + shape.segment_key_units(), i % kSegment, shape.is_latent ? row : row + shape.head_size,
                    shape.value_size, columns);
    }
  }
};

}  // namespace attention
