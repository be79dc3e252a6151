// The inner loops of paged attention, for a few rows at a time: scores, softmax, weighted values. See attention.h.
// What a row gets does not depend on how many rows share a call: each has its own chain of operations.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>

#include "attention.h"
#include "simd.h"

namespace attention {

using simd::Vf;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kLog2E = 1.44269504f;
constexpr int kVectors = kSegment / simd::kWidth;  // in a segment
static_assert(kSegment % simd::kWidth == 0, "a segment is whole vectors");
#if defined(FL_SIMD_AVX512)
constexpr int kRows = 6, kWide = 4;  // rows and segments at once: 24 accumulators
#else
constexpr int kRows = 4, kWide = 1;
#endif
constexpr int kScoreStride = kTile + kSegment;  // floats; the mask's last vector may reach beyond the tile

// 2^x for x <= 0: exactly 1 for 0, 0 for -infinity, NaN for NaN; within 1e-4 of it, or 1e-7 if Exact.
#if defined(FL_SIMD_AVX512)
// 2^floor(x) times a polynomial of the fraction, of the least largest relative error among those that are 1 at 0.
template <bool Exact>
inline Vf exp2(Vf x) {
  Vf r = {_mm512_reduce_ps(x.v, 1)};  // x - floor(x), and 0 for -infinity
  constexpr float kRough[] = {1, 0.695116789f, 0.227644981f, 0.0770670512f};
  constexpr float kExact[] = {1,           0.693147044f,   0.240229306f,  0.0554852806f,
                              0.0096754516f, 0.00124678461f, 0.000216129164f};
  constexpr int kDegree = Exact ? 6 : 3;
  Vf p = simd::set1(Exact ? kExact[kDegree] : kRough[kDegree]);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; i--) p = simd::fma(p, r, simd::set1(Exact ? kExact[i] : kRough[i]));
  return {_mm512_scalef_ps(p.v, x.v)};  // takes the floor itself
}
#else
// By the Taylor polynomial of the distance to the nearest whole number.
template <bool Exact>
inline Vf exp2(Vf x) {
  x = simd::max(simd::set1(-252.0f), x);
  Vf n = simd::round(x), r = (x - n) * simd::set1(0.693147181f);
  constexpr float kInverse[] = {1, 1, 1.0f / 2, 1.0f / 6, 1.0f / 24, 1.0f / 120, 1.0f / 720, 1.0f / 5040};
  constexpr int kDegree = Exact ? 7 : 4;
  Vf p = simd::set1(kInverse[kDegree]);
#pragma GCC unroll 8
  for (int i = kDegree - 1; i >= 0; i--) p = simd::fma(p, r, simd::set1(kInverse[i]));
  Vf half = simd::round(n * simd::set1(0.5f));
  return p * simd::exp2_of_int(half) * simd::exp2_of_int(n - half);
}
#endif

// What a kernel multiplies with what is in the cache. A is an entry of the left side, of which kStep go with a unit.
struct Float32 {
  using A = float;
  using Element = float;
  static constexpr int kPair = 1, kStep = 1;
  static constexpr bool kTiled = false, kExact = true;
  static Vf multiply(Vf sum, const A* a, const uint32_t* b) {
    return simd::fma(simd::set1(*a), simd::load(reinterpret_cast<const float*>(b)), sum);
  }
  static void pack(const Element* x, int n, A* out) { std::memcpy(out, x, n * sizeof *x); }
  static void store(A* p, Vf x) { simd::store(p, x); }
};

#if defined(__AVX512BF16__)
struct Bfloat16 {  // pairs of bfloat16 on both sides
  using A = uint32_t;
  using Element = simd::bf16;
  static constexpr int kPair = 2, kStep = 1;
  static constexpr bool kExact = false;
#if defined(__AMX_BF16__)
  static constexpr bool kTiled = true;  // attention_tiles.h
#else
  static constexpr bool kTiled = false;
#endif
  static Vf multiply(Vf sum, const A* a, const uint32_t* b) {
    return {_mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)),
                             reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(*a))))};
  }
  static void pack(const Element* x, int n, A* out) {
    if (n % 2) out[n / 2] = 0;
    std::memcpy(out, x, n * sizeof *x);
  }
  static void store(A* p, Vf x) { simd::store(reinterpret_cast<simd::bf16*>(p), x); }
};
#else
struct Bfloat16 {  // pairs of floats times pairs of bfloat16
  using A = float;
  using Element = simd::bf16;
  static constexpr int kPair = 2, kStep = 2;
  static constexpr bool kTiled = false, kExact = false;
  static Vf multiply(Vf sum, const A* a, const uint32_t* b) {
    sum = simd::fma(simd::set1(a[0]), low(b), sum);
    return simd::fma(simd::set1(a[1]), high(b), sum);
  }
  static void pack(const Element* x, int n, A* out) {
    for (int i = 0; i < n; i++) out[i] = simd::to_float(x[i]);
    if (n % 2) out[n] = 0;
  }
  static void store(A* p, Vf x) { simd::store(p, x); }

 private:
#if defined(FL_SIMD_AVX512)
  static Vf low(const uint32_t* b) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(b), 16))}; }
  static Vf high(const uint32_t* b) {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(b), _mm512_set1_epi32(~0xffff)))};
  }
#elif defined(FL_SIMD_AVX2)
  static __m256i units(const uint32_t* b) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)); }
  static Vf low(const uint32_t* b) { return {_mm256_castsi256_ps(_mm256_slli_epi32(units(b), 16))}; }
  static Vf high(const uint32_t* b) {
    return {_mm256_castsi256_ps(_mm256_and_si256(units(b), _mm256_set1_epi32(~0xffff)))};
  }
#elif defined(FL_SIMD_NEON)
  static Vf low(const uint32_t* b) { return {vreinterpretq_f32_u32(vshlq_n_u32(vld1q_u32(b), 16))}; }
  static Vf high(const uint32_t* b) {
    return {vreinterpretq_f32_u32(vandq_u32(vld1q_u32(b), vdupq_n_u32(0xffff0000)))};
  }
#else
  static Vf half(const uint32_t* b, int shift) {
    uint32_t bits[simd::kWidth];
    for (int i = 0; i < simd::kWidth; i++) bits[i] = b[i] << shift & 0xffff0000;
    Vf x;
    std::memcpy(&x, bits, sizeof bits);
    return x;
  }
  static Vf low(const uint32_t* b) { return half(b, 16); }
  static Vf high(const uint32_t* b) { return half(b, 0); }
#endif
};
#endif

// The right sides of the two products, 16 units at a time: `at(k, s)` of entry k and segment s of the columns, and
// `ahead(k, s)`, the same place a tile later. Asking for that one while this one is worked on keeps memory busy.
struct KeyUnits {
  const uint32_t* const* segments;
  const uint32_t* const* next;
  int stride;
  const uint32_t* at(int k, int s) const { return segments[s] + k * stride; }
  const uint32_t* ahead(int k, int s) const { return next[s] + k * stride; }
};

// `per_grain` entries stand `stride` units apart, `grain` segments later come the next.
struct ValueUnits {
  const uint32_t* const* segments;
  const uint32_t* const* next;
  int stride, per_grain, grain;
  const uint32_t* at(int k, int s) const { return from(segments, k, s); }
  const uint32_t* ahead(int k, int s) const { return from(next, k, s); }
  const uint32_t* from(const uint32_t* const* rows, int k, int s) const {
    return rows[k / per_grain * grain] + k % per_grain * stride + s * kSegment;
  }
};

// The products themselves. In both, c (rows at a stride) is num_rows x 16 num_segments, a has num_units * kStep entries per row,
// and `b(k, segment)` is where the 16 units of the right side stand that row's entry k is multiplied with.
// c is taken times scale[row] first; without scales it starts at 0.
template <class Kv, bool Ahead, int Rows, int Segments, class B>
inline void product_block(const typename Kv::A* a, int a_stride, const B& b, int first, int num_units, float* c, int c_stride,
                          const float* scale) {
  Vf sum[Rows][Segments * kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < Segments * kVectors; v++)
      sum[r][v] = scale ? simd::load(c + r * c_stride + v * simd::kWidth) * simd::set1(scale[r]) : simd::zero();
  }
  for (int k = 0; k < num_units; k++) {
#pragma GCC unroll 8
    for (int s = 0; s < Segments; s++) {
      const uint32_t* units = b.at(k, first + s);
      if constexpr (Ahead) __builtin_prefetch(b.ahead(k, first + s));
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; v++) {
#pragma GCC unroll 8
        for (int r = 0; r < Rows; r++) {
          Vf& x = sum[r][s * kVectors + v];
          x = Kv::multiply(x, a + r * a_stride + k * Kv::kStep, units + v * simd::kWidth);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < Segments * kVectors; v++) simd::store(c + r * c_stride + v * simd::kWidth, sum[r][v]);
  }
}

template <class Kv, bool Ahead, int Segments, class B>
inline void product_rows(int num_rows, const typename Kv::A* a, int a_stride, const B& b, int first, int num_units,
                         float* c, int c_stride, const float* scale) {
  int r = 0;
  auto block = [&](auto rows) {
    constexpr int kBlock = decltype(rows)::value;
    product_block<Kv, Ahead, kBlock, Segments>(a + r * a_stride, a_stride, b, first, num_units, c + r * c_stride,
                                               c_stride, scale ? scale + r : nullptr);
    r += kBlock;
  };
  while (num_rows - r >= kRows) block(std::integral_constant<int, kRows>{});
  if constexpr (kRows > 4) {
    if (num_rows - r >= 4) block(std::integral_constant<int, 4>{});
  }
  if (num_rows - r == 3) block(std::integral_constant<int, 3>{});
  if (num_rows - r == 2) block(std::integral_constant<int, 2>{});
  if (num_rows - r == 1) block(std::integral_constant<int, 1>{});
}

template <class Kv, bool Ahead, class B>
inline void product(int num_rows, int num_segments, const typename Kv::A* a, int a_stride, const B& b, int num_units,
                    float* c, int c_stride, const float* scale) {
  int s = 0;
  auto part = [&](auto segments) {
    constexpr int kBlock = decltype(segments)::value;
    product_rows<Kv, Ahead, kBlock>(num_rows, a, a_stride, b, s, num_units, c + s * kSegment, c_stride, scale);
    s += kBlock;
  };
  while (num_segments - s >= kWide) part(std::integral_constant<int, kWide>{});
  if constexpr (kWide > 1) {
    if (num_segments - s >= 2) part(std::integral_constant<int, 2>{});
    if (num_segments - s == 1) part(std::integral_constant<int, 1>{});
  }
}

// Scores become log2 of the weights up to the row's constant. Keys first, first + 1, ... relative to the query.
inline void transform_scores(const Shape& shape, float* s, int begin, int end, int first_key, float slope) {
  alignas(64) static const float kCount[kSegment] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int i = begin; i < end; i += simd::kWidth) {
    Vf x = simd::load(s + i) * simd::set1(shape.scale);
    if (shape.soft_cap > 0) {
      Vf e = simd::exp(x * simd::set1(2.0f / shape.soft_cap));  // tanh y = 1 - 2 / (e^2y + 1)
      x = simd::set1(shape.soft_cap) * (simd::set1(1.0f) - simd::set1(2.0f) / (e + simd::set1(1.0f)));
    }
    Vf distance = simd::load(kCount + i % kSegment) + simd::set1(static_cast<float>(first_key + i / kSegment * kSegment));
    x = simd::fma(simd::set1(slope), distance, x);
    simd::store(s + i, x * simd::set1(kLog2E));
  }
}

// Of a row's scores [begin, end), whole segments, those outside [low, high) become -infinity.
inline void hide_scores(float* s, int begin, int end, int low, int high) {
  const Vf none = simd::set1(-kInfinity);
  for (int i = begin; i < std::min(low, end); i += simd::kWidth) simd::store_n(s + i, none, std::min(low - i, simd::kWidth));
  for (int i = std::max(high, begin); i < end; i += simd::kWidth) simd::store(s + i, none);
}

template <int Vectors>
inline float largest(const float* s, int num_vectors) {
  const int count = Vectors ? Vectors : num_vectors;
  Vf most = simd::load(s);
#pragma GCC unroll 8
  for (int i = 1; i < count; i++) most = simd::max(most, simd::load(s + i * simd::kWidth));
  return simd::reduce_max(most);
}

// Scores of a row to weights, 2^(score * scale - best); returns the weights' sum by lane.
template <class Kv, int Vectors>
inline Vf weigh_row(const float* s, int num_vectors, float scale, float best, typename Kv::A* p) {
  constexpr int kEntries = Kv::kStep * simd::kWidth / Kv::kPair;  // of p in a vector
  const int count = Vectors ? Vectors : num_vectors;
  const Vf shift = simd::set1(best == -kInfinity ? 0.0f : -best);
  Vf total = simd::zero();
#pragma GCC unroll 8
  for (int i = 0; i < count; i++) {
    Vf x = exp2<Kv::kExact>(simd::fma(simd::load(s + i * simd::kWidth), simd::set1(scale), shift));
    Kv::store(p + i * kEntries, x);
    total = total + x;
  }
  return total;
}

// What a unit keeps of its rows within a span: the largest score (log2), the factor that brings the sums so far to a
// larger one, the weights' sum by lane.
struct RowSums {
  float *best, *factor, *lanes;
};

// Scores of a tile, [begin, end) of each row, to weights; the rows' sums are brought up to date but for the values.
template <class Kv, int Vectors>
inline void softmax_tile(int num_rows, const float* scores, int num_vectors, float scale, const RowSums& sums,
                         typename Kv::A* weights, int weight_stride) {
  for (int r = 0; r < num_rows; r++)
    sums.factor[r] = largest<Vectors>(scores + r * kScoreStride, num_vectors) * scale;
  for (int r = 0; r < num_rows; r += simd::kWidth) {  // by whole vectors: there is room for them
    Vf old = simd::load(sums.best + r), best = simd::max(simd::load(sums.factor + r), old);
    simd::store(sums.best + r, best);
    simd::store(sums.factor + r, exp2<Kv::kExact>(old - simd::max(simd::set1(-kLargest), best)));
  }
  for (int r = 0; r < num_rows; r++) {
    Vf total = weigh_row<Kv, Vectors>(scores + r * kScoreStride, num_vectors, scale, sums.best[r], weights + r * weight_stride);
    float* lanes = sums.lanes + r * simd::kWidth;
    simd::store(lanes, simd::fma(simd::load(lanes), simd::set1(sums.factor[r]), total));
  }
}

}  // namespace attention
