// Adapters of low rank, a row at a time: each row has its own. Adapter 0 is none. Sums are in float32 and in one order.
#include <cstring>

#include "pool.h"
#include "replay.h"
#include "simd.h"

namespace {

using simd::Vf;
constexpr int64_t kMinParallel = 32 * 1024;  // multiplications: below, one thread is faster than waking another

template <class F>
void for_rows(int64_t num_rows, int64_t work, const F& f) {
  auto run = [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) f(row);
  };
  if (num_rows * work < kMinParallel)
    run(0, num_rows);
  else
    parallel_for(num_rows, run);
}

// kRows products of rows of `b` with one `a`.
template <int kRows, class A, class B>
void dots(const A* a, const B* b, int64_t size, float* out) {
  Vf sum[kRows];
  for (int r = 0; r < kRows; r++) sum[r] = simd::zero();
  int64_t i = 0;
  for (; i + simd::kWidth <= size; i += simd::kWidth) {
    const Vf x = simd::load(a + i);
    for (int r = 0; r < kRows; r++) sum[r] = simd::fma(x, simd::load(b + r * size + i), sum[r]);
  }
  if (const int rest = static_cast<int>(size - i)) {
    const Vf x = simd::load_n(a + i, rest);
    for (int r = 0; r < kRows; r++) sum[r] = simd::fma(x, simd::load_n(b + r * size + i, rest), sum[r]);
  }
  for (int r = 0; r < kRows; r++) out[r] = simd::reduce_add(sum[r]);
}

template <class A, class B>
void all_dots(const A* a, const B* b, int64_t num, int64_t size, float* out) {
  int64_t r = 0;
  for (; r + 4 <= num; r += 4) dots<4>(a, b + r * size, size, out + r);
  for (; r < num; r++) dots<1>(a, b + r * size, size, out + r);
}

template <class T>
void shrink(const T* x, int64_t x_stride, const T* a, const int64_t* adapter, float* out, int64_t num_rows, int64_t rank,
            int64_t size) {
  for_rows(num_rows, rank * size, [=](int64_t row) {
    if (adapter[row] == 0)
      std::memset(out + row * rank, 0, static_cast<size_t>(rank) * sizeof(float));
    else
      all_dots(x + row * x_stride, a + adapter[row] * rank * size, rank, size, out + row * rank);
  });
}

template <class T>
void expand(const T* y, int64_t y_stride, const float* h, int64_t h_stride, const T* b, const int64_t* adapter, T* out,
            int64_t num_rows, int64_t size, int64_t rank) {
  constexpr int64_t kBlock = 64;
  for_rows(num_rows, rank * size, [=](int64_t row) {
    const T* from = y + row * y_stride;
    T* to = out + row * size;
    if (adapter[row] == 0) {
      std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(size) * sizeof(T));
      return;
    }
    const T* matrix = b + adapter[row] * size * rank;
    float sums[kBlock];
    for (int64_t i = 0; i < size; i += kBlock) {
      const int64_t count = size - i < kBlock ? size - i : kBlock;
      all_dots(h + row * h_stride, matrix + i * rank, count, rank, sums);
      for (int64_t j = 0; j < count; j++) simd::from_float(simd::to_float(from[i + j]) + sums[j], to + i + j);
    }
  });
}

template <class F>
void with_dtype(int32_t is_bf16, const F& f) {
  if (is_bf16)
    f(simd::bf16{});
  else
    f(0.0f);
}

}  // namespace

// x (rows, size), a (adapters, rank, size) to out (rows, rank) in float.
FL_API void fl_lora_shrink(int32_t is_bf16, const void* x, int64_t x_stride, const void* a, const int64_t* adapter,
                           float* out, int64_t num_rows, int64_t rank, int64_t size) {
  with_dtype(is_bf16, [&](auto zero) {
    using T = decltype(zero);
    shrink(static_cast<const T*>(x), x_stride, static_cast<const T*>(a), adapter, out, num_rows, rank, size);
  });
}

FL_RECORDABLE(fl_lora_shrink)

// y (rows, size) plus h (rows, rank) by b (adapters, size, rank), to out (rows, size) without gaps.
FL_API void fl_lora_expand(int32_t is_bf16, const void* y, int64_t y_stride, const float* h, int64_t h_stride,
                           const void* b, const int64_t* adapter, void* out, int64_t num_rows, int64_t size,
                           int64_t rank) {
  with_dtype(is_bf16, [&](auto zero) {
    using T = decltype(zero);
    expand(static_cast<const T*>(y), y_stride, h, h_stride, static_cast<const T*>(b), adapter, static_cast<T*>(out),
           num_rows, size, rank);
  });
}

FL_RECORDABLE(fl_lora_expand)
