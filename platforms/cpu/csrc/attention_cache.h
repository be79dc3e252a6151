// Reading and writing the paged cache: tokens in, tiles of packed keys and values out. See attention.h.
#pragma once
#include <cstring>
#include <vector>

#include "attention.h"
#include "fp8.h"

namespace attention {

// Keys and values of a step's tokens, rows of `Element`; strides in elements.
template <class Element>
struct Rows {
  const Element* data;
  int64_t token_stride, head_stride;
  const Element* row(int64_t token, int head) const { return data + token * token_stride + head * head_stride; }
};

// One token's key into column `lane` of a segment's keys; an odd last entry is paired with 0.
template <int Pair, class Entry>
inline void put_key(Entry* keys, int lane, const Entry* x, int size) {
  int whole = size / Pair;
  for (int i = 0; i < whole; i++) std::memcpy(keys + (i * kSegment + lane) * Pair, x + i * Pair, Pair * sizeof *x);
  if (whole * Pair < size) {
    Entry last[Pair] = {x[size - 1]};
    std::memcpy(keys + (whole * kSegment + lane) * Pair, last, sizeof last);
  }
}

// One token's value into row `lane` of the values, or into half of the units of a pair's row.
template <int Pair, class Entry>
inline void put_value(Entry* values, int lane, const Entry* x, int size, int columns) {
  Entry* row = values + lane / Pair * columns * Pair + lane % Pair;
  for (int i = 0; i < size; i++) row[i * Pair] = x[i];
}

// `stored(row)` is the row in the cache's type, until the next call.
template <class Kv, class Entry, class F>
void write_rows(const Shape& shape, const int32_t* slots, int64_t begin, int64_t end,
                const Rows<typename Kv::Element>& keys, const Rows<typename Kv::Element>& values, Entry* cache,
                const F& stored) {
  for (int64_t token = begin; token < end; token++) {
    int64_t slot = slots[token];
    for (int head = 0; head < shape.num_kv_heads; head++) {
      if (!shape.is_packed()) {
        Entry* to = cache + (slot * shape.num_kv_heads + head) * shape.plain_row();
        std::memcpy(to, stored(keys.row(token, head)), shape.head_size * sizeof *to);
        if (!shape.is_latent)
          std::memcpy(to + shape.head_size, stored(values.row(token, head)), shape.head_size * sizeof *to);
        continue;
      }
      const int offset = static_cast<int>(slot % shape.block_size);
      const int64_t segment = shape.segment_key_units() * Kv::kPair;
      Entry* to = cache + slot / shape.block_size * shape.block_entries() + head * shape.head_units() * Kv::kPair;
      put_key<Kv::kPair>(to + offset / kSegment * segment, offset % kSegment, stored(keys.row(token, head)),
                         shape.head_size);
      put_value<Kv::kPair>(to + shape.block_size / kSegment * segment, offset, stored(values.row(token, head)),
                           shape.value_size, shape.value_columns());
    }
  }
}

// f of the type of a shape's 8-bit floats.
template <class F>
inline void with_format(const Shape& shape, const F& f) {
  if (shape.stored == kE4M3)
    f(fp8::E4M3{});
  else
    f(fp8::E5M2{});
}

template <class Kv>
void write_tokens(const Shape& shape, const int32_t* slots, int64_t begin, int64_t end,
                  const Rows<typename Kv::Element>& keys, const Rows<typename Kv::Element>& values, void* cache) {
  using Element = typename Kv::Element;
  if (shape.stored == kAsComputed) {
    return write_rows<Kv>(shape, slots, begin, end, keys, values, static_cast<Element*>(cache),
                          [](const Element* row) { return row; });
  }
  std::vector<uint8_t> codes(shape.head_size);
  write_rows<Kv>(shape, slots, begin, end, keys, values, static_cast<uint8_t*>(cache), [&](const Element* row) {
    with_format(shape, [&](auto format) { fp8::narrow<decltype(format)>(row, shape.head_size, codes.data()); });
    return static_cast<const uint8_t*>(codes.data());
  });
}

template <class Element>
void widen(const Shape& shape, const uint8_t* from, int64_t n, Element* to) {
  with_format(shape, [&](auto format) { fp8::widen<decltype(format)>(from, n, to); });
}

// Where the keys of a tile stand by segment: keys at a stride of kSegment units, values at one of `value_columns`.
// A grain is the run of keys whose values are read together, of one segment or two; its values are contiguous.
template <class Kv>
struct Tile {
  using Element = typename Kv::Element;

  const uint32_t* keys[kTileSegments];
  const uint32_t* values[kTileSegments];

  static int grain(const Shape& shape) {
    return Kv::kTiled && (!shape.is_packed() || shape.block_size % (2 * kSegment) == 0) ? 2 * kSegment : kSegment;
  }

  // Of the grains that hold keys [low, high). The values of other keys in them are 0 here; their keys may be anything,
  // NaN too. `own` is room for kTileSegments segments, all of it written before.
  void load(const Shape& shape, const void* cache, const int32_t* table, int head, int start, int low, int high,
            uint32_t* own) {
    if (shape.is_packed() && !shape.stored) {
      find(shape, cache, table, head, start, low, high);
      clear_edges(shape, low, high, own);
    } else if (shape.is_packed()) {
      unfold(shape, static_cast<const uint8_t*>(cache), table, head, start, low, high, own);
    } else if (shape.stored) {
      std::vector<Element> wide(shape.plain_row());
      pack(shape, static_cast<const uint8_t*>(cache), table, head, start, low, high, own, [&](const uint8_t* row) {
        widen(shape, row, shape.plain_row(), wide.data());
        return static_cast<const Element*>(wide.data());
      });
    } else {
      pack(shape, static_cast<const Element*>(cache), table, head, start, low, high, own,
           [](const Element* row) { return row; });
    }
  }

  // Of a packed cache in the shape's own type, touching nothing.
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

  // The tile is in `own`: keys, then values, where they begin is returned.
  Element* place(const Shape& shape, uint32_t* own) {
    uint32_t* own_values = own + kTileSegments * shape.segment_key_units();
    for (int s = 0; s < kTileSegments; s++) {
      keys[s] = own + s * shape.segment_key_units();
      values[s] = own_values + s * shape.segment_value_units();
    }
    return reinterpret_cast<Element*>(own_values);
  }

  static void clear_values(const Shape& shape, Element* values, int from, int to) {
    for (int key = from; key < to; key++) {
      Element* row = values + key / Kv::kPair * shape.value_columns() * Kv::kPair + key % Kv::kPair;
      for (int i = 0; i < shape.value_columns(); i++) row[i * Kv::kPair] = Element{};
    }
  }

  // Widens whole segments of a packed cache.
  void unfold(const Shape& shape, const uint8_t* cache, const int32_t* table, int head, int start, int low, int high,
              uint32_t* own) {
    const int size = grain(shape), begin = low / size * size, end = (high + size - 1) / size * size;
    const int per_block = shape.block_size / kSegment;
    const int64_t key_entries = shape.segment_key_units() * Kv::kPair;
    const int64_t value_entries = shape.segment_value_units() * Kv::kPair;
    Element* own_values = place(shape, own);
    for (int s = begin / kSegment; s < end / kSegment; s++) {
      const int segment = start / kSegment + s, within = segment % per_block;
      const uint8_t* at =
          cache + table[segment / per_block] * shape.block_entries() + head * shape.head_units() * Kv::kPair;
      widen(shape, at + within * key_entries, key_entries, reinterpret_cast<Element*>(own) + s * key_entries);
      widen(shape, at + per_block * key_entries + within * value_entries, value_entries,
            own_values + s * value_entries);
    }
    clear_values(shape, own_values, begin, low);
    clear_values(shape, own_values, high, end);
  }

  // Packs rows of a plain cache; `wide(row)` is the row in the shape's own type, until the next call.
  template <class Entry, class F>
  void pack(const Shape& shape, const Entry* cache, const int32_t* table, int head, int start, int low, int high,
            uint32_t* own, const F& wide) {
    const int size = grain(shape), begin = low / size * size, end = (high + size - 1) / size * size;
    Element* own_values = place(shape, own);
    clear_values(shape, own_values, begin, low);
    clear_values(shape, own_values, high, end);
    for (int i = low; i < high; i++) {
      int position = start + i;
      int64_t slot = int64_t{table[position / shape.block_size]} * shape.block_size + position % shape.block_size;
      const Element* row = wide(cache + (slot * shape.num_kv_heads + head) * shape.plain_row());
      put_key<Kv::kPair>(reinterpret_cast<Element*>(own + i / kSegment * shape.segment_key_units()), i % kSegment, row,
                         shape.head_size);
      put_value<Kv::kPair>(own_values, i, shape.is_latent ? row : row + shape.head_size,
                           shape.value_size, shape.value_columns());
    }
  }
};

}  // namespace attention
