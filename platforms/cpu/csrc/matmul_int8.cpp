// int8 weights with a scale per output; inputs quantised here, row by row, to int8 with a scale of their own.
// Sums are whole numbers, so every instruction set gives the same bits; |sum| <= 255 * 127 * k stays below 2^31 for
// k up to kMaxInt8K.
#include "amx.h"
#include "kernels.h"
#include "tile.h"

namespace matmul {
namespace {

// A prepared row: k bytes, then, in the line that parts rows, its scale. Where the instruction wants unsigned inputs,
// 128 is added to them, and 128 times the sum of the column's weights is taken off again in the epilogue.
#if defined(__AVX512VNNI__) && !defined(__AMX_TILE__)
constexpr int kOffset = 128;
#else
constexpr int kOffset = 0;
#endif

struct Int8Rows {
  static Rows<int8_t> direct(const Call&) { return {nullptr, 0}; }

  template <class T>
  static void quantise(const T* from, int64_t k, int8_t* to) {
    constexpr int kWidth = simd::kWidth;
    const int64_t padded = round_up(k, kPadK);
    const int tail = static_cast<int>(k % kWidth);
    Vf largest = simd::zero(), poison = simd::zero();
    auto look = [&](Vf v) {
      largest = simd::max(largest, simd::abs(v));
      poison = simd::fma(v, simd::zero(), poison);  // NaN from here on after a NaN or an infinity
    };
    for (int64_t i = 0; i + kWidth <= k; i += kWidth) look(simd::load(from + i));
    if (tail) look(simd::load_n(from + k - tail, tail));
    const float amax = simd::reduce_max(largest), unsound = simd::reduce_add(poison);
    const bool sound = unsound == 0.0f;
    const float scale = sound ? amax / 127.0f : unsound;
    const Vf inverse = simd::set1(sound && scale > 0.0f ? 1.0f / scale : 0.0f);
    const Vf low = simd::set1(-127.0f), high = simd::set1(127.0f);
    auto store = [&](int64_t i, Vf v) {
      simd::store_i8(to + i, sound ? simd::min(high, simd::max(low, simd::round(v * inverse))) : simd::zero());
    };
    for (int64_t i = 0; i + kWidth <= k; i += kWidth) store(i, simd::load(from + i));
    if (tail) store(k - tail, simd::load_n(from + k - tail, tail));  // a whole vector: rows are padded
    std::memset(to + k, 0, static_cast<size_t>(padded - k));
    if constexpr (kOffset != 0)
      for (int64_t i = 0; i < padded; i++) to[i] = static_cast<int8_t>(static_cast<uint8_t>(to[i]) ^ 0x80u);
    std::memcpy(to + padded, &scale, sizeof scale);
  }

  static void prepare(const Call& call, int64_t row, int8_t* to) {
    if (call.layer->x_dtype == kF32)
      quantise(static_cast<const float*>(call.x) + call.offset(row), call.layer->k, to);
    else
      quantise(static_cast<const bf16*>(call.x) + call.offset(row), call.layer->k, to);
  }

  static void finish(const Call& call, Rows<int8_t> x, int64_t row, int64_t count, int64_t group, int32_t* c) {
    const FlLinear& layer = *call.layer;
    const int64_t padded = round_up(layer.k, kPadK), first = group * kGroup;
    if constexpr (kOffset != 0) {
      const int32_t* sums = layer.sums + first;
      for (int64_t i = 0; i < count; i++)
        for (int j = 0; j < kGroup; j++) c[i * kGroup + j] -= kOffset * sums[j];
    }
    const float* scale = static_cast<const float*>(layer.scale);
    finish_group(call, row, count, group, [&](int64_t i, int64_t at) {
      float row_scale;
      std::memcpy(&row_scale, x.data + i * x.stride + padded, sizeof row_scale);
      return simd::load_i32(c + i * kGroup + (at - first)) * (simd::load(scale + at) * simd::set1(row_scale));
    });
  }
};

#if defined(__AMX_TILE__)

struct Int8Base {
  using X = int8_t;
  using C = int32_t;
  static constexpr int kRows = 32;
  static constexpr int64_t kBlockK = 1024, kGroupsAtOnce = 1;
  const int8_t* weight;
  int64_t panel_size;
  amx::Tiles tiles;
  explicit Int8Base(const FlLinear& layer)
      : weight(static_cast<const int8_t*>(layer.weight)), panel_size(round_up(layer.k, kPadK) * kPanel) {}
  void begin(const Block&) const {}
  void add(Rows<int8_t> x, int64_t rows, const Block& block, int32_t* c, int64_t ldc) {
    const int8_t* w = weight + 2 * block.group * panel_size + block.k0 * kPanel;
    tiles.add<amx::Int8>(x.data + block.k0, x.stride, rows, w, panel_size, block.k1 - block.k0, c, ldc, block.k0 == 0);
  }
};

#else

struct Int8Common {
  using X = int8_t;
  using W = int8_t;
  using C = int32_t;
  static constexpr int kStep = 4;
  static int32_t quad(const int8_t* x, int64_t step) {
    int32_t q;
    std::memcpy(&q, x + 4 * step, 4);
    return q;
  }
};

#if defined(__AVX512VNNI__)
struct Int8 : Int8Common {
  using A = __m512i;
  using B = __m512i;
  using V = __m512i;
  static constexpr int kLanes = 16, kRows = 12;
  static V zero() { return _mm512_setzero_si512(); }
  static V load(const int32_t* c) { return _mm512_loadu_si512(c); }
  static void store(int32_t* c, V v) { _mm512_storeu_si512(c, v); }
  static A a(const int8_t* x, int64_t step) { return _mm512_set1_epi32(quad(x, step)); }
  static B b(const int8_t* w) { return _mm512_loadu_si512(w); }
  static V mul(V v, A a, B b) { return _mm512_dpbusd_epi32(v, a, b); }
};
#elif defined(__AVX2__)
// Unsigned times signed with the input's sign moved to the weight: two products of at most 127 * 127 fit 16 bits.
struct Int8 : Int8Common {
  struct A {
    __m256i value, magnitude;
  };
  using B = __m256i;
  using V = __m256i;
  static constexpr int kLanes = 8, kRows = 4;
  static V zero() { return _mm256_setzero_si256(); }
  static V load(const int32_t* c) { return simd::load_256(c); }
  static void store(int32_t* c, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(c), v); }
  static A a(const int8_t* x, int64_t step) {
    __m256i value = _mm256_set1_epi32(quad(x, step));
    return {value, _mm256_abs_epi8(value)};
  }
  static B b(const int8_t* w) { return simd::load_256(w); }
  static V mul(V v, A a, B b) {
    __m256i pairs = _mm256_maddubs_epi16(a.magnitude, _mm256_sign_epi8(b, a.value));
    return _mm256_add_epi32(v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};
#elif defined(FL_SIMD_NEON)
struct Int8 : Int8Common {
  using A = int8x16_t;
  using B = int8x16_t;
  using V = int32x4_t;
  static constexpr int kLanes = 4, kRows = 4;
  static V zero() { return vdupq_n_s32(0); }
  static V load(const int32_t* c) { return vld1q_s32(c); }
  static void store(int32_t* c, V v) { vst1q_s32(c, v); }
  static A a(const int8_t* x, int64_t step) { return vreinterpretq_s8_s32(vdupq_n_s32(quad(x, step))); }
  static B b(const int8_t* w) { return vld1q_s8(w); }
  static V mul(V v, A a, B b) {
#if defined(__ARM_FEATURE_DOTPROD)
    return vdotq_s32(v, b, a);
#else
    int16x8_t low = vmull_s8(vget_low_s8(b), vget_low_s8(a)), high = vmull_high_s8(b, a);
    return vaddq_s32(v, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
  }
};
#else
struct Int8 : Int8Common {
  struct V {
    int32_t v[8];
  };
  using A = const int8_t*;
  using B = const int8_t*;
  static constexpr int kLanes = 8, kRows = 2;
  static V zero() { return {}; }
  static V load(const int32_t* c) {
    V v;
    std::memcpy(v.v, c, sizeof v.v);
    return v;
  }
  static void store(int32_t* c, V v) { std::memcpy(c, v.v, sizeof v.v); }
  static A a(const int8_t* x, int64_t step) { return x + 4 * step; }
  static B b(const int8_t* w) { return w; }
  static V mul(V v, A a, B b) {
    for (int i = 0; i < kLanes; i++)
      v.v[i] += a[0] * b[4 * i] + a[1] * b[4 * i + 1] + a[2] * b[4 * i + 2] + a[3] * b[4 * i + 3];
    return v;
  }
};
#endif
using Int8Base = TileKernel<Int8>;

#endif

struct Int8Kernel : Int8Base, Int8Rows {
  using Int8Base::Int8Base;
};

}  // namespace

void run_int8(const Call* calls, int64_t num_calls) { run<Int8Kernel>(calls, num_calls); }

}  // namespace matmul
