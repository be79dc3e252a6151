// y(N, out) = epilogue(x(N, K) W(out, K)^T): what the kernels of all weight formats share.
//
// Weights lie in panels of 16 outputs, K within a panel in steps of 4 bytes (2 bfloat16, 1 float, 4 int8), so that one
// step of a panel is 64 bytes: one AVX-512 register, one row of an AMX tile. Two neighbouring panels are a group, the
// unit that threads share out. K and out are padded with zeros (to kPadK and 32). With a gated activation a group holds
// 16 columns of the gate and the same 16 of the up projection.
//
// Every element of y is one chain of additions over k from 0 to K - 1, whatever N is and however the work is cut, so a
// row gives the same bits alone and in any batch. The blocks of K that keep weights in the cache only park the
// chain's value in memory.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <new>

#include "pool.h"
#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace matmul {

using simd::bf16;
using simd::Vf;

constexpr int kPanel = 16;
constexpr int kGroup = 32;
constexpr int kPadK = 64;
constexpr int kQuantGroup = 32;  // int4: inputs that share a scale

enum Scheme : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };
enum Dtype : int32_t { kF32 = 0, kBf16 = 1 };
enum Activation : int32_t {
  kNone = 0,
  kSiluMul = 1,  // the two that multiply by the up projection come first
  kGeluMul = 2,  // by its tanh form
  kGeluTanh = 3,
  kGelu = 4,
  kRelu = 5,
  kSilu = 6,
};

inline bool gated(int32_t activation) { return activation >= kSiluMul && activation <= kGeluMul; }
inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }


}  // namespace matmul

// One layer, made at load and not changed after. Pointers stay the caller's.
struct FlLinear {
  int32_t scheme;      // matmul::Scheme
  int32_t x_dtype;     // matmul::Dtype of x
  int32_t y_dtype;     // of y and of the residual
  int32_t activation;  // matmul::Activation, after the bias and before the residual
  int64_t k;
  int64_t out;          // columns of y; with a gated activation W has twice as many rows
  const void* weight;   // packed
  const void* scale;    // int8: float per packed column; int4: bfloat16 (group, quantisation group, 32)
  const int32_t* sums;  // int8: sum over k per packed column
};

namespace matmul {

// Columns of y in a group of packed columns.
inline int64_t group_columns(const FlLinear& layer) { return gated(layer.activation) ? kPanel : kGroup; }

// Asks for huge pages under [p, p + bytes), where there are such. Useful before the memory is first written.
inline void advise_huge_pages(void* p, int64_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t kHuge = 2 << 20;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + kHuge - 1) / kHuge * kHuge;
  uintptr_t end = (reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refused: smaller pages
#else
  (void)p;
  (void)bytes;
#endif
}

// Scratch of one thread, one buffer per slot, grown to what was asked for last and kept.
template <int kSlot>
inline void* scratch(int64_t bytes) {
  struct Buffer {
    void* p = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(p); }
  };
  static thread_local Buffer buffer;
  if (bytes > buffer.bytes) {
    constexpr int64_t kHuge = 2 << 20;
    const int64_t unit = bytes >= kHuge / 2 ? kHuge : 4096;
    bytes = round_up(bytes, unit);
    std::free(buffer.p);
    buffer.p = std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(bytes));
    if (!buffer.p) throw std::bad_alloc();
    if (unit == kHuge) advise_huge_pages(buffer.p, bytes);
    buffer.bytes = bytes;
  }
  return buffer.p;
}
enum Slot { kInputs, kSums, kUnpacked, kParts, kRouting };

inline Vf sigmoid(Vf x) { return simd::set1(1.0f) / (simd::set1(1.0f) + simd::exp(simd::zero() - x)); }

// 0.5 (1 + tanh(u)) = sigmoid(2 u)
inline Vf gelu_tanh(Vf x) {
  Vf cubic = simd::fma(x * x * x, simd::set1(0.044715f), x);
  return x * sigmoid(cubic * simd::set1(2.0f * 0.7978845608f));
}

// erf by Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error below 1.5e-7.
inline Vf gelu(Vf x) {
  Vf z = simd::abs(x) * simd::set1(0.70710678f);
  Vf t = simd::set1(1.0f) / simd::fma(z, simd::set1(0.3275911f), simd::set1(1.0f));
  Vf p = simd::set1(1.061405429f);
  p = simd::fma(p, t, simd::set1(-1.453152027f));
  p = simd::fma(p, t, simd::set1(1.421413741f));
  p = simd::fma(p, t, simd::set1(-0.284496736f));
  p = simd::fma(p, t, simd::set1(0.254829592f));
  Vf tail = p * t * simd::exp(simd::zero() - z * z);  // 1 - erf(z)
  Vf half = simd::set1(0.5f) * x;
  return half + simd::abs(half) * (simd::set1(1.0f) - tail);  // erf is odd
}

inline Vf activate(int32_t activation, Vf x) {
  switch (activation) {
    case kSiluMul:
    case kSilu:
      return x * sigmoid(x);
    case kGeluMul:
    case kGeluTanh:
      return gelu_tanh(x);
    case kGelu:
      return gelu(x);
    case kRelu:
      return simd::max(simd::zero(), x);
    default:
      return x;
  }
}

// One call: the layer and its operands.
struct Call {
  const FlLinear* layer;
  const void* x;
  int64_t x_stride, num_rows;
  const void* bias;      // of y's dtype, one per row of W; null: none
  const void* residual;  // null: none
  int64_t residual_stride;
  void* y;
  int64_t y_stride;
  const int32_t* gather = nullptr;  // row i of the call is row gather[i] of x

  int64_t offset(int64_t row) const { return (gather ? gather[row] : row) * x_stride; }
};

// Turns 16 columns of sums into y: scaled(packed) gives the float values of kWidth packed columns.
template <class Y, class Scaled>
inline void finish_panel(const Call& call, int64_t row, int64_t packed, int64_t column, const Scaled& scaled) {
  const FlLinear& layer = *call.layer;
  const int64_t left = layer.out - column;
  Y* y = static_cast<Y*>(call.y) + row * call.y_stride + column;
  const Y* residual = static_cast<const Y*>(call.residual);
  if (residual) residual += row * call.residual_stride + column;
  const Y* bias = call.bias ? static_cast<const Y*>(call.bias) + column : nullptr;
  auto part = [&](int i, auto load, auto store) {
    Vf v = scaled(packed + i);
    if (bias) v = v + load(bias + i);
    v = activate(layer.activation, v);
    if (gated(layer.activation)) {
      Vf up = scaled(packed + kPanel + i);
      v = v * (bias ? up + load(bias + layer.out + i) : up);
    }
    if (residual) v = v + load(residual + i);
    store(y + i, v);
  };
  for (int i = 0; i < kPanel && i < left; i += simd::kWidth) {
    const int n = static_cast<int>(std::min<int64_t>(left - i, simd::kWidth));
    if (n == simd::kWidth)
      part(i, [](const Y* p) { return simd::load(p); }, [](Y* p, Vf v) { simd::store(p, v); });
    else
      part(i, [n](const Y* p) { return simd::load_n(p, n); }, [n](Y* p, Vf v) { simd::store_n(p, v, n); });
  }
}

// The same for `count` rows of one group, from `row` on; scaled(i, at) is for the i-th of them.
template <class Y, class Scaled>
inline void finish_rows(const Call& call, int64_t row, int64_t count, int64_t group, const Scaled& scaled) {
  const FlLinear& layer = *call.layer;
  const int64_t first = group * kGroup;
  const bool plain = layer.activation == kNone && !call.bias && !call.residual && first + kGroup <= layer.out;
  if (plain) {
    Y* y = static_cast<Y*>(call.y) + row * call.y_stride + first;
    for (int64_t i = 0; i < count; i++, y += call.y_stride)
#pragma GCC unroll 8
      for (int at = 0; at < kGroup; at += simd::kWidth) simd::store(y + at, scaled(i, first + at));
    return;
  }
  const bool pair = gated(layer.activation);
  for (int64_t i = 0; i < count; i++)
    for (int panel = 0; panel < (pair ? 1 : 2); panel++) {
      const int64_t packed = first + panel * kPanel, column = pair ? group * kPanel : packed;
      finish_panel<Y>(call, row + i, packed, column, [&](int64_t at) { return scaled(i, at); });
    }
}

template <class Scaled>
inline void finish_group(const Call& call, int64_t row, int64_t count, int64_t group, const Scaled& scaled) {
  if (call.layer->y_dtype == kF32)
    finish_rows<float>(call, row, count, group, scaled);
  else
    finish_rows<bf16>(call, row, count, group, scaled);
}

// The rows of x as a kernel reads them, `stride` elements apart.
template <class X>
struct Rows {
  const X* data;
  int64_t stride;
};

// Elements from one prepared row to the next: a line more than the row, because rows that lie a multiple of 4 KiB apart
// share one set of the level 1 cache, and a tile of 12 to 32 of them would not fit there.
template <class X>
inline int64_t row_stride(const FlLinear& layer) {
  return round_up(layer.k, kPadK) + 64 / static_cast<int64_t>(sizeof(X));
}

// x as it is, if a kernel that reads X can take it: the type, whole steps of K and, where a tile of rows has to stay in
// the level 1 cache, rows that do not crowd into one set of it.
template <class X>
inline Rows<X> direct_rows(const Call& call, bool rows_are_reused) {
  const bool crowded =
      rows_are_reused && call.num_rows > 4 && call.x_stride * static_cast<int64_t>(sizeof(X)) % 1024 == 0;
  const bool scattered = call.gather && call.num_rows > 1;
  const bool fits = call.layer->k % kPadK == 0 && call.layer->x_dtype == (sizeof(X) == 2 ? kBf16 : kF32) &&
                    !crowded && !scattered;
  return {fits ? static_cast<const X*>(call.x) + call.offset(0) : nullptr, call.x_stride};
}

// What a kernel for `run` has:
//   X, C                types of the prepared inputs and of the sums
//   kRows, kBlockK      rows of its register tile; how much of K it takes at a time when there are more rows than that
//   kGroupsAtOnce       how many groups it takes together when there are many rows
//   direct(call)        x as it is, where the kernel can read it, else null data
//   prepare(call, row, X* to)
//   Kernel(layer)       state of a thread
//   begin(block)                     what a block of weights needs once for all rows
//   add(rows, count, block, c, ldc)  adds x[:count, k0:k1] W to the sums of the block's groups, for at most kRows rows;
//                                    k0 = 0 starts at zero
//   finish(call, rows, row, count, group, c)  the epilogue of `count` rows of one group, of which row is the first

// Weights that are worked on together: inputs [k0, k1) of the groups from `group` on. The sums of the second group are
// `c_step` after those of the first.
struct Block {
  int64_t group, num_groups, k0, k1, c_step;
};

// A block of so many rows by kBlockK inputs, the sums of 8 groups and the weights at hand stay in a level 2 cache.
constexpr int64_t kRowBlock = 512, kGroupBlock = 8;

inline int64_t num_groups(const FlLinear& layer) { return (layer.out + group_columns(layer) - 1) / group_columns(layer); }

// The units [begin, end) of one call: unit u is group u % groups of row block u / groups.
template <class Kernel>
void run_units(const Call& call, const Rows<typename Kernel::X>& x, int64_t begin, int64_t end) {
  using X = typename Kernel::X;
  using C = typename Kernel::C;
  constexpr int64_t kRows = Kernel::kRows;
  const FlLinear& layer = *call.layer;
  const int64_t groups = num_groups(layer), k = round_up(layer.k, kPadK);
  Kernel kernel(layer);
  for (int64_t unit = begin; unit < end;) {
    const int64_t row0 = unit / groups * kRowBlock, group0 = unit % groups;
    const int64_t rows = std::min(call.num_rows - row0, kRowBlock);
    const bool whole = rows <= kRows || k <= Kernel::kBlockK;  // K in one piece
    const int64_t step = whole ? k : Kernel::kBlockK;
    const int64_t count = whole ? 1 : std::min(std::min(end - unit, kGroupBlock), groups - group0);
    // Sums are finished some tiles after they were stored: reading them at once would wait for the stores.
    const int64_t batch = 4 * kRows, kept = whole ? std::min(rows, batch) : rows;
    C* sums = static_cast<C*>(scratch<kSums>(count * kept * kGroup * static_cast<int64_t>(sizeof(C))));
    const int64_t together = rows > 2 * kRows && !whole ? Kernel::kGroupsAtOnce : 1;
    for (int64_t k0 = 0; k0 < k; k0 += step)
      for (int64_t g = 0; g < count; g += together) {
        const Block block{group0 + g, std::min(together, count - g), k0, std::min(k0 + step, k), kept * kGroup};
        kernel.begin(block);
        for (int64_t first = 0; first < rows; first += batch) {
          const int64_t last = std::min(first + batch, rows);
          C* c = sums + (g * kept + (whole ? 0 : first)) * kGroup;
          const Rows<X> at{x.data + (row0 + first) * x.stride, x.stride};
          for (int64_t row = first; row < last; row += kRows)
            kernel.add({at.data + (row - first) * x.stride, x.stride}, std::min(last - row, kRows), block,
                       c + (row - first) * kGroup, kGroup);
          if (block.k1 < k) continue;
          for (int64_t i = 0; i < block.num_groups; i++)
            Kernel::finish(call, at, row0 + first, last - first, block.group + i, c + i * block.c_step);
        }
      }
    unit += count;
  }
}

// One of the calls of `run`: its rows, and what comes before it of all rows to prepare and of all units.
template <class X>
struct Part {
  Rows<X> x;
  int64_t rows_before, units_before;
};

// f(i, begin, end) for what of [begin, end) belongs to part i, begin and end counted from where that starts.
template <class X, class F>
inline void each_part(const Part<X>* parts, int64_t num_parts, int64_t Part<X>::*before, int64_t begin, int64_t end,
                      const F& f) {
  const Part<X>* last = parts + num_parts;
  const Part<X>* part =
      std::upper_bound(parts, last, begin, [&](int64_t at, const Part<X>& p) { return at < p.*before; }) - 1;
  for (; begin < end; part++) {
    const int64_t stop = part + 1 < last ? std::min(end, part[1].*before) : end;
    if (begin < stop) f(part - parts, begin - part->*before, stop - part->*before);
    begin = stop;
  }
}

// Runs a kernel over all rows and groups of some calls, which threads share out together.
template <class Kernel>
void run(const Call* calls, int64_t num_calls) {
  using X = typename Kernel::X;
  auto* parts = static_cast<Part<X>*>(scratch<kParts>(num_calls * static_cast<int64_t>(sizeof(Part<X>))));
  int64_t units = 0, rows = 0, prepared = 0, work = 0;
  for (int64_t i = 0; i < num_calls; i++) {
    const Call& call = calls[i];
    parts[i] = {Kernel::direct(call), rows, units};
    if (!parts[i].x.data) {
      rows += call.num_rows;
      prepared += call.num_rows * row_stride<X>(*call.layer);
      work += call.num_rows * call.layer->k;
    }
    units += (call.num_rows + kRowBlock - 1) / kRowBlock * num_groups(*call.layer);
  }
  if (rows) {
    X* to = static_cast<X*>(scratch<kInputs>(prepared * static_cast<int64_t>(sizeof(X))));
    for (int64_t i = 0; i < num_calls; i++)
      if (!parts[i].x.data) {
        parts[i].x = {to, row_stride<X>(*calls[i].layer)};
        to += calls[i].num_rows * parts[i].x.stride;
      }
    auto prepare = [&](int64_t begin, int64_t end) {
      each_part(parts, num_calls, &Part<X>::rows_before, begin, end, [&](int64_t i, int64_t first, int64_t last) {
        X* data = const_cast<X*>(parts[i].x.data);
        for (int64_t row = first; row < last; row++) Kernel::prepare(calls[i], row, data + row * parts[i].x.stride);
      });
    };
    if (work < 32768)  // below some microseconds waking the others costs more
      prepare(0, rows);
    else
      parallel_for(rows, prepare);
  }
  parallel_for(units, [&](int64_t begin, int64_t end) {
    each_part(parts, num_calls, &Part<X>::units_before, begin, end, [&](int64_t i, int64_t first, int64_t last) {
      run_units<Kernel>(calls[i], parts[i].x, first, last);
    });
  });
}

// Copies a row of x into T, zeros after layer.k up to the padded length.
template <class T>
inline void copy_row(const Call& call, int64_t row, T* to) {
  const int64_t k = call.layer->k, padded = round_up(k, kPadK);
  auto copy = [&](const auto* from) {
    from += call.offset(row);
    int64_t i = 0;
    for (; i + simd::kWidth <= k; i += simd::kWidth) simd::store(to + i, simd::load(from + i));
    if (i < k) simd::store_n(to + i, simd::load_n(from + i, static_cast<int>(k - i)), static_cast<int>(k - i));
  };
  if (call.layer->x_dtype == kF32)
    copy(static_cast<const float*>(call.x));
  else
    copy(static_cast<const bf16*>(call.x));
  std::memset(static_cast<void*>(to + k), 0, static_cast<size_t>(padded - k) * sizeof(T));
}

}  // namespace matmul
