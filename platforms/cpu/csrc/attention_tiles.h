// The two products of attention by matrix tiles (AMX): 16 rows by 16 columns, an entry's dot products of pairs.
// Each entry is a chain of tile products in the order of k, of `depth` units each, whatever the number of rows.
#pragma once
#include "attention_kernels.h"

namespace attention {
#if defined(__AMX_BF16__)

constexpr int kTileRows = 16;

// Tiles 0 to 3 are sums, 4 and 5 the left side, 6 and 7 the right side.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  int depth;  // beyond the 64 bytes that the instruction reads

  explicit TileConfig(int units) : depth(units) {
    for (int i = 0; i < 8; i++) {
      rows[i] = static_cast<uint8_t>(i < 6 ? kTileRows : depth);
      row_bytes[i] = static_cast<uint16_t>(i == 4 || i == 5 ? depth * 4 : 64);
    }
  }
};

// The largest number of units, up to a tile's 16, that divides n.
inline int tile_depth(int n) {
  int depth = 16;
  while (n % depth) depth--;
  return depth;
}

// c (row_tiles x column_tiles tiles, rows at a stride) = a b, or c + a b. `b(k, column_tile)` is where the k-th tile of
// the right side stands, its rows b_stride units apart; a's tile k starts at entry k * depth of its row.
template <bool Add, class B>
inline void tile_product(int row_tiles, int column_tiles, const uint32_t* a, int a_stride, const B& b, int b_stride,
                         int num_depths, int depth, float* c, int c_stride) {
  asm volatile("" ::: "memory");  // the tile loads do not tell the compiler that they read memory
  for (int j = 0; j < column_tiles; j += 2) {
    const bool two_columns = j + 1 < column_tiles;
    for (int i = 0; i < row_tiles; i += 2) {
      const bool two_rows = i + 1 < row_tiles;
      float* c0 = c + i * kTileRows * c_stride + j * 16;
      float* c1 = c0 + kTileRows * c_stride;
      if constexpr (Add) {
        _tile_loadd(0, c0, c_stride * 4);
        if (two_columns) _tile_loadd(1, c0 + 16, c_stride * 4);
        if (two_rows) _tile_loadd(2, c1, c_stride * 4);
        if (two_rows && two_columns) _tile_loadd(3, c1 + 16, c_stride * 4);
      } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
      }
      const uint32_t* a0 = a + i * kTileRows * a_stride;
      const uint32_t* a1 = a0 + kTileRows * a_stride;
      for (int k = 0; k < num_depths; k++) {
        _tile_loadd(6, b(k, j), b_stride * 4);
        _tile_loadd(4, a0 + k * depth, a_stride * 4);
        _tile_dpbf16ps(0, 4, 6);
        if (two_columns) {
          _tile_loadd(7, b(k, j + 1), b_stride * 4);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (two_rows) {
          _tile_loadd(5, a1 + k * depth, a_stride * 4);
          _tile_dpbf16ps(2, 5, 6);
          if (two_columns) _tile_dpbf16ps(3, 5, 7);
        }
      }
      _tile_stored(0, c0, c_stride * 4);
      if (two_columns) _tile_stored(1, c0 + 16, c_stride * 4);
      if (two_rows) _tile_stored(2, c1, c_stride * 4);
      if (two_rows && two_columns) _tile_stored(3, c1 + 16, c_stride * 4);
    }
  }
}

#endif
}  // namespace attention
