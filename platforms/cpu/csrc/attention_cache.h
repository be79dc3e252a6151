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

// One token's value into row `lane` of the values, or into half of the units of a pair's row.
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
      int offset = static_cast<int>(slot % shape.block_size);
      uint32_t* to = static_cast<uint32_t*>(cache) + slot / shape.block_size * block_units + head * shape.head_units();
      put_key<Kv>(to + offset / kSegment * shape.segment_key_units(), offset % kSegment, key, shape.head_size);
      put_value<Kv>(to + shape.block_size / kSegment * shape.segment_key_units(), offset, values.row(token, head),
                    shape.value_size, shape.value_columns());
    }
  }
}

// Where the keys of a tile stand by segment: keys at a stride of kSegment units, values at one of `value_columns`.
// A grain is the run of keys whose values are read together, of one segment or two; its values are contiguous.
template <class Kv>
struct Tile {
  const uint32_t* keys[kTileSegments];
  const uint32_t* values[kTileSegments];

  static int grain(const Shape& shape) {
    return Kv::kTiled && (!shape.is_packed() || shape.block_size % (2 * kSegment) == 0) ? 2 * kSegment : kSegment;
  }

  // Of the grains that hold keys [low, high). The values of other keys in them are 0 here; their keys may be anything,
  // NaN too. `own` is room for kTileSegments segments, all of it written before.
  void load(const Shape& shape, const void* cache, const int32_t* table, int head, int start, int low, int high,
            uint32_t* own) {
    if (shape.is_packed()) {
      find(shape, cache, table, head, start, low, high);
      clear_edges(shape, low, high, own);
    } else {
      pack(shape, static_cast<const typename Kv::Element*>(cache), table, head, start, low, high, own);
    }
  }

  // Of a packed cache, touching nothing.
  void find(const Shape& shape, const void* cache, const int32_t* table, int head, int start, int low, int high) {
    const int64_t block_units = shape.block_bytes() / 4;
    const int per_block = shape.block_size / kSegment, size = grain(shape);
    for (int s = low / size * size / kSegment; s * kSegment < (high + size - 1) / size * size; s++) {
      int segment = start / kSegment + s;
      const uint32_t* at = static_cast<const uint32_t*>(cache) + table[segment / per_block] * block_units +
                           head * shape.head_units();
      keys[s] = at + segment % per_block * shape.segment_key_units();
      values[s] = at + per_block * shape.segment_key_units() + segment % per_block * shape.segment_value_units();
    }
  }

 private:
  void clear_edges(const Shape& shape, int low, int high, uint32_t* own) {
    const int size = grain(shape);
    if (low % size) own = clear(shape, low / size * size, low, high, own);
    if (high % size && (low % size == 0 || high / size != low / size)) clear(shape, high / size * size, low, high, own);
  }

  // Copies the values of the grain at key `begin`, those of keys outside [low, high) as 0; returns where the copy ends.
  uint32_t* clear(const Shape& shape, int begin, int low, int high, uint32_t* own) {
    const int columns = shape.value_columns(), first = begin / kSegment;
    const uint32_t* from = values[first];
    for (int s = 0; s < grain(shape) / kSegment; s++) values[first + s] = own + s * shape.segment_value_units();
    for (int key = begin; key < begin + grain(shape); key += Kv::kPair, from += columns, own += columns) {
      uint32_t mask = 0;
      for (int i = 0; i < Kv::kPair; i++)
        if (key + i >= low && key + i < high) mask |= Kv::kPair == 1 ? ~0u : 0xffffu << 16 * i;
      for (int i = 0; i < columns; i++) own[i] = from[i] & mask;
    }
    return own;
  }

  void pack(const Shape& shape, const typename Kv::Element* cache, const int32_t* table, int head, int start, int low,
            int high, uint32_t* own) {
    const int size = grain(shape), begin = low / size * size, end = (high + size - 1) / size * size;
    uint32_t* own_values = own + kTileSegments * shape.segment_key_units();
    for (int s = 0; s < kTileSegments; s++) {
      keys[s] = own + s * shape.segment_key_units();
      values[s] = own_values + s * shape.segment_value_units();
    }
    auto clear_rows = [&](int from, int to) {
      for (int i = from / Kv::kPair; i < (to + Kv::kPair - 1) / Kv::kPair; i++)
        std::memset(own_values + i * shape.value_columns(), 0, shape.value_columns() * 4);
    };
    clear_rows(begin, low);
    clear_rows(high, end);
    for (int i = low; i < high; i++) {
      int position = start + i;
      int64_t slot = int64_t{table[position / shape.block_size]} * shape.block_size + position % shape.block_size;
      const auto* row = cache + (slot * shape.num_kv_heads + head) * shape.plain_row();
      put_key<Kv>(own + i / kSegment * shape.segment_key_units(), i % kSegment, row, shape.head_size);
      put_value<Kv>(own_values, i, shape.is_latent ? row : row + shape.head_size, shape.value_size,
                    shape.value_columns());
    }
  }
};

}  // namespace attention
