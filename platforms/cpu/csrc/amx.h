// Matrix tiles of AMX: 32 rows by 32 columns of sums in four tiles, fed by two tiles of inputs and two of weights.
#pragma once
#if defined(__AMX_TILE__)
#include "matmul.h"

namespace amx {

struct Bf16 {
  using X = simd::bf16;
  using C = float;
  static constexpr int kStep = 32;  // of K in one tile
};
struct Int8 {
  using X = int8_t;
  using C = int32_t;
  static constexpr int kStep = 64;
};

struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums (upper left, upper right, lower left, lower right), 4 and 5 inputs, 6 and 7 weights.
// The tile state of a thread; an object lives as long as one job's part, so that no thread sleeps with live tiles.
class Tiles {
 public:
  Tiles() = default;
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
  ~Tiles() {
    if (upper_) _tile_release();
  }

  // Adds x(rows, k), at most 32 rows, times two panels of weights, w and w + panel_size, to c.
  template <class Element>
  void add(const typename Element::X* x, int64_t x_stride, int64_t rows, const typename Element::X* w,
           int64_t panel_size, int64_t k, typename Element::C* c, int64_t ldc, bool from_zero) {
    configure(static_cast<int>(std::min<int64_t>(rows, 16)), static_cast<int>(std::max<int64_t>(rows - 16, 0)));
    if (rows > 16)
      block<Element, true>(x, x_stride, w, panel_size, k, c, ldc, from_zero);
    else
      block<Element, false>(x, x_stride, w, panel_size, k, c, ldc, from_zero);
  }

  // x(rows, 32) times two panels, and the 32 inputs after them times the same panels' next tiles: the sums of the first
  // to sums(16, 32), those of the second to the 16 rows below. At most 16 rows.
  void two(const simd::bf16* x, int64_t x_stride, int64_t rows, const simd::bf16* w, int64_t panel_size, float* sums) {
    constexpr int64_t kTile = Bf16::kStep * 16, kSumsBytes = 32 * 4;
    const int64_t x_bytes = x_stride * 2;
    configure(static_cast<int>(rows), static_cast<int>(rows));
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, x, x_bytes);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + panel_size, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x + Bf16::kStep, x_bytes);
    _tile_loadd(6, w + kTile, 64);
    _tile_loadd(7, w + panel_size + kTile, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    _tile_stored(0, sums, kSumsBytes);
    _tile_stored(1, sums + 16, kSumsBytes);
    _tile_stored(2, sums + 16 * 32, kSumsBytes);
    _tile_stored(3, sums + 16 * 32 + 16, kSumsBytes);
  }

 private:
  int upper_ = 0, lower_ = 0;

  void configure(int upper, int lower) {
    if (upper == upper_ && lower == lower_) return;
    upper_ = upper;
    lower_ = lower;
    Config config;
    const int rows[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
    for (int i = 0; i < 8; i++) {
      config.rows[i] = static_cast<uint8_t>(rows[i]);
      config.row_bytes[i] = rows[i] ? 64 : 0;
    }
    _tile_loadconfig(&config);
  }

  template <class Element, bool kLower>
  static void block(const typename Element::X* x, int64_t x_stride, const typename Element::X* w, int64_t panel_size,
                    int64_t k, typename Element::C* c, int64_t ldc, bool from_zero) {
    constexpr int64_t kTile = Element::kStep * 16;
    const int64_t x_bytes = x_stride * static_cast<int64_t>(sizeof *x), c_bytes = ldc * 4;
    if (from_zero) {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kLower) {
        _tile_zero(2);
        _tile_zero(3);
      }
    } else {
      _tile_loadd(0, c, c_bytes);
      _tile_loadd(1, c + 16, c_bytes);
      if constexpr (kLower) {
        _tile_loadd(2, c + 16 * ldc, c_bytes);
        _tile_loadd(3, c + 16 * ldc + 16, c_bytes);
      }
    }
    for (int64_t i = 0; i < k; i += Element::kStep, w += kTile) {
      if constexpr (!kLower) {  // few rows wait for the weights: 4 KiB ahead of them is 5 to 10 % faster
#pragma GCC unroll 16
        for (int line = 0; line < 16; line++) {
          __builtin_prefetch(w + 4 * kTile + line * (kTile / 16));
          __builtin_prefetch(w + panel_size + 4 * kTile + line * (kTile / 16));
        }
      }
      _tile_loadd(4, x + i, x_bytes);
      _tile_loadd(6, w, 64);
      _tile_loadd(7, w + panel_size, 64);
      if constexpr (kLower) _tile_loadd(5, x + 16 * x_stride + i, x_bytes);
      if constexpr (Element::kStep == 32) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (kLower) {
          _tile_dpbf16ps(2, 5, 6);
          _tile_dpbf16ps(3, 5, 7);
        }
      } else {
        _tile_dpbssd(0, 4, 6);
        _tile_dpbssd(1, 4, 7);
        if constexpr (kLower) {
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(3, 5, 7);
        }
      }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
    if constexpr (kLower) {
      _tile_stored(2, c + 16 * ldc, c_bytes);
      _tile_stored(3, c + 16 * ldc + 16, c_bytes);
    }
  }
};

}  // namespace amx
#endif
