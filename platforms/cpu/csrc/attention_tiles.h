// The two products of attention by matrix tiles (AMX): 16 rows by 16 columns, an entry's dot products of pairs.
// Each entry is a chain of tile products in the order of k, of `depth` units each, whatever the number of rows.
#pragma once
#include "attention_kernels.h"

namespace attention {
#if defined(__AMX_BF16__)

constexpr int kTileRows = 16;

// Tiles 0 and 1 are sums. The left and right sides of the scores are tiles 2 and 3, 4, those of the values 5 and 6, 7:
// their depths may differ, and to configure anew between the two stops the pipeline.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  TileConfig(int score_depth, int value_depth) {
    for (int i = 0; i < 8; i++) {
      const int depth = i < 5 ? score_depth : value_depth;
      const bool is_left = i == 2 || i == 5;
      rows[i] = static_cast<uint8_t>(i < 2 || is_left ? kTileRows : depth);
      row_bytes[i] = static_cast<uint16_t>(is_left ? depth * 4 : 64);
    }
  }
};

// The largest number of units, up to a tile's 16, that divides n.
inline int tile_depth(int n) {
  int depth = 16;
  while (n % depth) depth--;
  return depth;
}

// What differs between the two: which tiles, and whether the sums start at what is in c.
struct ScoreTiles {
  static void begin(const float*, int, bool) {
    _tile_zero(0);
    _tile_zero(1);
  }
  static void left(const uint32_t* a, int stride) { _tile_loadd(2, a, stride * 4); }
  static void multiply_first(const uint32_t* b, int stride) {
    _tile_loadd(3, b, stride * 4);
    _tile_dpbf16ps(0, 2, 3);
  }
  static void multiply_second(const uint32_t* b, int stride) {
    _tile_loadd(4, b, stride * 4);
    _tile_dpbf16ps(1, 2, 4);
  }
};

struct ValueTiles {
  static void begin(const float* c, int stride, bool two) {
    _tile_loadd(0, c, stride * 4);
    if (two) _tile_loadd(1, c + 16, stride * 4);
  }
  static void left(const uint32_t* a, int stride) { _tile_loadd(5, a, stride * 4); }
  static void multiply_first(const uint32_t* b, int stride) {
    _tile_loadd(6, b, stride * 4);
    _tile_dpbf16ps(0, 5, 6);
  }
  static void multiply_second(const uint32_t* b, int stride) {
    _tile_loadd(7, b, stride * 4);
    _tile_dpbf16ps(1, 5, 7);
  }
};

// c (row_tiles x column_tiles tiles, rows at a stride) = a b, or c + a b, over num_depths * depth units.
template <class Tiles, bool Ahead, class B>
inline void tile_product(int row_tiles, int column_tiles, const uint32_t* a, int a_stride, const B& b, int num_depths,
                         int depth, float* c, int c_stride) {
  auto ask_ahead = [&b, depth](int k, int j) {
    if constexpr (Ahead) {
      const uint32_t* next = b.ahead(k, j);
      for (int i = 0; i < depth; i++) __builtin_prefetch(next + i * b.stride);
    }
  };
  asm volatile("" ::: "memory");  // the tile loads do not tell the compiler that they read memory
  for (int j = 0; j < column_tiles; j += 2) {
    const bool two = j + 1 < column_tiles;
    for (int i = 0; i < row_tiles; i++) {
      float* sums = c + i * kTileRows * c_stride + j * 16;
      Tiles::begin(sums, c_stride, two);
      for (int k = 0; k < num_depths; k++) {
        Tiles::left(a + i * kTileRows * a_stride + k * depth, a_stride);
        Tiles::multiply_first(b.at(k * depth, j), b.stride);
        ask_ahead(k * depth, j);
        if (!two) continue;
        Tiles::multiply_second(b.at(k * depth, j + 1), b.stride);
        ask_ahead(k * depth, j + 1);
      }
      _tile_stored(0, sums, c_stride * 4);
      if (two) _tile_stored(1, sums + 16, c_stride * 4);
    }
  }
}

#endif
}  // namespace attention
