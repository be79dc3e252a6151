// Loops over rows, which threads share out, and over the vectors of a row.
#pragma once
#include "pool.h"
#include "simd.h"

namespace vectors {

using simd::Vf;
constexpr int64_t kMinParallel = 32 * 1024;  // elements: below, one thread is faster than waking another

template <class F>
void for_rows(int64_t num_rows, int64_t row_size, const F& f) {
  if (num_rows * row_size < kMinParallel)
    f(0, num_rows);
  else
    parallel_for(num_rows, f);
}

// f(offset, load, store) for the vectors of a row; load(p) and store(p, x) touch no more than the row has.
template <class F>
inline void for_vectors(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + simd::kWidth <= size; i += simd::kWidth)
    f(i, [i](const auto* p) { return simd::load(p + i); }, [i](auto* p, Vf x) { simd::store(p + i, x); });
  const int rest = static_cast<int>(size - i);
  if (rest)
    f(i, [i, rest](const auto* p) { return simd::load_n(p + i, rest); },
      [i, rest](auto* p, Vf x) { simd::store_n(p + i, x, rest); });
}

}  // namespace vectors
