// Register tiles: kRows rows of x by a group of 32 columns, written once for every element type.
#pragma once
#include <type_traits>

#include "matmul.h"

namespace matmul {

#if defined(FL_SIMD_AVX512)
constexpr int kPanelsAtOnce = 2;  // 12 rows by 2 panels: 24 of 32 registers hold sums
constexpr int64_t kManyGroups = 2;
#else
constexpr int kPanelsAtOnce = 1;
constexpr int64_t kManyGroups = 1;
#endif
// With many rows, 6 of them by 4 panels take fewer instructions: 34 for 24 multiplications, not 38. With a neighbour on the
// core's other thread a thread gets 2 a cycle, and that is what limits it.
constexpr int kManyRows = 6;

// Element has
//   X, W, C    prepared inputs, weights, sums in memory
//   A, B, V    a broadcast input, a vector of weights, a vector of sums
//   kLanes     columns of a V
//   kStep      how many k one step of a panel (64 bytes) holds
//   kRows      rows of the tile
//   a(x, step), b(w), mul(v, a, b), zero(), load(c), store(c, v)
// Of more than two panels, the third's sums are c_step after the first's.
template <class Element, int kTileRows, int kPanels = kPanelsAtOnce>
inline void tile(const typename Element::X* x, int64_t x_stride, const typename Element::W* w, int64_t panel_size,
                 int64_t step0, int64_t step1, typename Element::C* c, int64_t ldc, int64_t c_step, bool from_zero) {
  constexpr int kVectors = kPanel / Element::kLanes;
  constexpr int kColumns = kPanels * kVectors;
  constexpr int64_t kPanelStep = Element::kStep * kPanel;
  auto sums = [&](int i, int j) {
    const int panel = j / kVectors;
    return c + i * ldc + panel / 2 * c_step + (panel % 2 * kVectors + j % kVectors) * Element::kLanes;
  };
  typename Element::V sum[kTileRows][kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; j++)
      sum[i][j] = from_zero ? Element::zero() : Element::load(sums(i, j));
  for (int64_t step = step0; step < step1; step++) {
    typename Element::B b[kColumns];
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; j++)
      b[j] = Element::b(w + j / kVectors * panel_size + step * kPanelStep +
                        j % kVectors * (Element::kLanes * Element::kStep));
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++) {
      typename Element::A a = Element::a(x + i * x_stride, step);
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; j++) sum[i][j] = Element::mul(sum[i][j], a, b[j]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; j++) Element::store(sums(i, j), sum[i][j]);
}

// Cuts rows into tiles of kTileRows and, for the rest, of the sizes below it: f(first row, constant size). Few sizes,
// because each is a loop of its own to compile.
template <int kTileRows, class F>
inline void each_tile(int64_t row, int64_t rows, const F& f) {
  for (; row + kTileRows <= rows; row += kTileRows) f(row, std::integral_constant<int, kTileRows>());
  constexpr int kNext = kTileRows > 8 ? 8 : kTileRows > 4 ? 4 : kTileRows / 2;
  if constexpr (kNext > 0) {
    if (row < rows) each_tile<kNext>(row, rows, f);
  }
}

// A kernel (see run) of register tiles.
template <class Element>
struct TileKernel {
  using X = typename Element::X;
  using W = typename Element::W;
  using C = typename Element::C;
  static constexpr int kRows = Element::kRows;
  static constexpr bool kReusesRows = true;
  static constexpr int64_t kBlockK = 128 * Element::kStep;  // 16 KiB of a group's weights: half a level 1 cache
  static constexpr int64_t kGroupsAtOnce = kManyGroups;

  const W* weight;
  int64_t panel_size;
  explicit TileKernel(const FlLinear& layer)
      : weight(static_cast<const W*>(layer.weight)), panel_size(round_up(layer.k, kPadK) * kPanel) {}

  void begin(const Block&) const {}
  void add(Rows<X> x, int64_t count, const Block& block, C* c, int64_t ldc) const {
    const W* w = weight + 2 * block.group * panel_size;
    const int64_t step0 = block.k0 / Element::kStep, step1 = block.k1 / Element::kStep;
    if constexpr (kGroupsAtOnce == 2) {
      if (block.num_groups == 2) {
        each_tile<kManyRows>(0, count, [&](int64_t row, auto size) {
          tile<Element, size(), 4>(x.data + row * x.stride, x.stride, w, panel_size, step0, step1, c + row * ldc, ldc,
                                   block.c_step, block.k0 == 0);
        });
        return;
      }
    }
    for (int panel = 0; panel < 2; panel += kPanelsAtOnce)
      each_tile<kRows>(0, count, [&](int64_t row, auto size) {
        tile<Element, size()>(x.data + row * x.stride, x.stride, w + panel * panel_size, panel_size, step0, step1,
                              c + row * ldc + panel * kPanel, ldc, 0, block.k0 == 0);
      });
  }
};

}  // namespace matmul
