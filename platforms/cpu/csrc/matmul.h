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

namespace matmul {

using simd::bf16;
using simd::Vf;

constexpr int kPanel = 16;
constexpr int kGroup = 32;
constexpr int kPadK = 64;

enum Scheme : int32_t { kFloat32 = 0, kBfloat16 = 1, kInt8 = 2, kInt4 = 3 };
enum Dtype : int32_t { kF32 = 0, kBf16 = 1 };
enum Activation : int32_t { kNone = 0, kSiluMul = 1, kGeluTanhMul = 2, kGeluMul = 3, kGeluTanh = 4, kGelu = 5, kRelu = 6, kSilu = 7 };

inline bool gated(int32_t activation) { return activation >= kSiluMul && activation <= kGeluMul; }
inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }


}  // namespace matmul

// One layer, made at load and not changed after. Pointers stay the caller's.
struct FlLinear {
  int32_t scheme;      // matmul::Scheme
  int32_t x_dtype;     // matmul::Dtype of x
  int32_t y_dtype;     // of y and of the residual
  int32_t activation;  // matmul::Activation, after the bias and before the residual
  int32_t quant_group; // int4: inputs that share a scale, 32 or 64
  int32_t reserved;
  int64_t k;
  int64_t out;          // columns of y; with a gated activation W has twice as many rows
  const void* weight;   // packed
  const void* scale;    // int8: float per packed column; int4: bfloat16 (group, quantisation group, 32)
  const int32_t* sums;  // int8: sum over k per packed column
};

namespace matmul {

// Columns of y in a group of packed columns.
inline int64_t group_columns(const FlLinear& layer) { return gated(layer.activation) ? kPanel : kGroup; }

// Scratch of one thread, one buffer per slot, grown to what was asked for last and kept.
template <int kSlot>
inline void* scratch(int64_t bytes) {
  struct Buffer {
    void* p = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(p); }
  };
  static thread_local Buffer buffer;
  bytes = round_up(bytes, 4096);
  if (bytes > buffer.bytes) {
    std::free(buffer.p);
    buffer.p = std::aligned_alloc(4096, static_cast<size_t>(bytes));
    if (!buffer.p) throw std::bad_alloc();
    buffer.bytes = bytes;
  }
  return buffer.p;
}
enum Slot { kInputs, kSums, kUnpacked };

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
    case kGeluTanhMul:
    case kGeluTanh:
      return gelu_tanh(x);
    case kGeluMul:
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
};

// Turns 16 columns of sums into y: scaled(packed) gives the float values of kWidth packed columns.
template <class Y, class Scaled>
inline void finish_panel(const Call& call, int64_t row, int64_t packed, int64_t column, const Scaled& scaled) {
  const FlLinear& layer = *call.layer;
  const int64_t left = layer.out - column;
  Y* y = static_cast<Y*>(call.y) + row * call.y_stride + column;
  const Y* residual = call.residual ? static_cast<const Y*>(call.residual) + row * call.residual_stride + column : nullptr;
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

// The same for one group of a row. scaled(at) takes the packed column.
template <class Scaled>
inline void finish_group(const Call& call, int64_t row, int64_t group, const Scaled& scaled) {
  bool wide = call.layer->y_dtype == kF32;
  bool pair = gated(call.layer->activation);
  for (int panel = 0; panel < (pair ? 1 : 2); panel++) {
    int64_t packed = group * kGroup + panel * kPanel, column = pair ? group * kPanel : packed;
    if (wide)
      finish_panel<float>(call, row, packed, column, scaled);
    else
      finish_panel<bf16>(call, row, packed, column, scaled);
  }
}

// The rows of x as a kernel reads them, `stride` elements apart.
template <class X>
struct Rows {
  const X* data;
  int64_t stride;
};

// Runs a kernel over all rows and groups. Kernel has
//   X, C                types of the prepared inputs and of the sums
//   kRows, kBlockK      rows of its register tile; how much of K it takes at a time when there are more rows than that
//   direct(call)        x as it is, where the kernel can read it, else null data
//   row_size(layer)     size of a prepared row, in X
//   prepare(call, row, X* to)
//   Kernel(layer)       state of a thread
//   add(rows, num_rows, group, k0, k1, c, ldc)   adds x[:, k0:k1] W to the sums of one group; k0 = 0 starts at zero
//   finish(call, x_row, row, group, c)           the epilogue of one row of one group
template <class Kernel>
void run(const Call& call) {
  using X = typename Kernel::X;
  using C = typename Kernel::C;
  constexpr int64_t kRowBlock = 512, kGroupBlock = 4;
  const FlLinear& layer = *call.layer;
  const int64_t groups = (layer.out + group_columns(layer) - 1) / group_columns(layer);
  const int64_t k = round_up(layer.k, kPadK);
  const int64_t row_blocks = (call.num_rows + kRowBlock - 1) / kRowBlock;
  Rows<X> x = Kernel::direct(call);
  if (!x.data) {
    x.stride = Kernel::row_size(layer);
    X* to = static_cast<X*>(scratch<kInputs>(call.num_rows * x.stride * static_cast<int64_t>(sizeof(X))));
    x.data = to;
    auto prepare = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++) Kernel::prepare(call, row, to + row * x.stride);
    };
    if (call.num_rows * layer.k < 32768)  // below some microseconds waking the others costs more
      prepare(0, call.num_rows);
    else
      parallel_for(call.num_rows, prepare);
  }
  parallel_for(row_blocks * groups, [&](int64_t begin, int64_t end) {
    Kernel kernel(layer);
    while (begin < end) {
      const int64_t row0 = begin / groups * kRowBlock, group0 = begin % groups;
      const int64_t rows = std::min(call.num_rows - row0, kRowBlock);
      const int64_t count = std::min(std::min(end - begin, kGroupBlock), groups - group0);
      const Rows<X> block{x.data + row0 * x.stride, x.stride};
      C* c = static_cast<C*>(scratch<kSums>(rows * count * kGroup * static_cast<int64_t>(sizeof(C))));
      const int64_t step = rows <= Kernel::kRows ? k : Kernel::kBlockK;
      for (int64_t k0 = 0; k0 < k; k0 += step)
        for (int64_t g = 0; g < count; g++)
          kernel.add(block, rows, group0 + g, k0, std::min(k0 + step, k), c + g * kGroup, count * kGroup);
      for (int64_t row = 0; row < rows; row++)
        for (int64_t g = 0; g < count; g++)
          Kernel::finish(call, block.data + row * x.stride, row0 + row, group0 + g, c + (row * count + g) * kGroup);
      begin += count;
    }
  });
}

// Copies a row of x into T, zeros after layer.k up to the padded length.
template <class T>
inline void copy_row(const Call& call, int64_t row, T* to) {
  const int64_t k = call.layer->k, padded = round_up(k, kPadK);
  auto copy = [&](const auto* from) {
    from += row * call.x_stride;
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
