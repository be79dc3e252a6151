// float32 and bfloat16 weights.
#include "amx.h"
#include "kernels.h"
#include "tile.h"

namespace matmul {
namespace {

// Sums in float vectors of any instruction set.
struct FloatSums {
  using C = float;
  using V = Vf;
  static constexpr int kLanes = simd::kWidth;
  static Vf zero() { return simd::zero(); }
  static Vf load(const float* c) { return simd::load(c); }
  static void store(float* c, Vf v) { simd::store(c, v); }
};

template <class Base>
struct FloatKernel : Base {
  using Base::Base;
  using X = typename Base::X;
  static void finish(const Call& call, Rows<X>, int64_t row, int64_t count, int64_t group, const float* c) {
    finish_group(call, row, count, group, [&](int64_t i, int64_t at) {
      return simd::load(c + i * kGroup + (at - group * kGroup));
    });
  }
};

struct Float32 : FloatSums {
  using X = float;
  using W = float;
  using A = Vf;
  using B = Vf;
  static constexpr int kStep = 1, kRows = simd::kWidth == 16 ? 12 : 6;
  static Vf a(const float* x, int64_t step) { return simd::set1(x[step]); }
  static Vf b(const float* w) { return simd::load(w); }
  static Vf mul(Vf v, Vf a, Vf b) { return simd::fma(a, b, v); }
};

struct Float32Kernel : FloatKernel<TileKernel<Float32>> {
  using FloatKernel::FloatKernel;
  static Rows<float> direct(const Call& call) { return direct_rows<float>(call, true); }
  static void prepare(const Call& call, int64_t row, float* to) { copy_row(call, row, to); }
};

#if defined(__AMX_TILE__)

struct Bfloat16Base {
  using X = bf16;
  using C = float;
  static constexpr int kRows = 32;
  static constexpr int64_t kBlockK = 256, kGroupsAtOnce = 1;
  static constexpr bool kReusesRows = true;
  const bf16* weight;
  int64_t panel_size;
  amx::Tiles tiles;
  explicit Bfloat16Base(const FlLinear& layer)
      : weight(static_cast<const bf16*>(layer.weight)), panel_size(round_up(layer.k, kPadK) * kPanel) {}
  void begin(const Block&) const {}
  void add(Rows<bf16> x, int64_t rows, const Block& block, float* c, int64_t ldc) {
    const bf16* w = weight + 2 * block.group * panel_size + block.k0 * kPanel;
    tiles.add<amx::Bf16>(x.data + block.k0, x.stride, rows, w, panel_size, block.k1 - block.k0, c, ldc, block.k0 == 0);
  }
};

#else

#if defined(__AVX512BF16__)
struct Bfloat16 : FloatSums {
  using X = bf16;
  using W = bf16;
  using A = __m512i;
  using B = __m512i;
  static constexpr int kStep = 2, kRows = 12;
  static A a(const bf16* x, int64_t step) {
    int32_t pair;
    std::memcpy(&pair, x + 2 * step, 4);
    return _mm512_set1_epi32(pair);
  }
  static B b(const bf16* w) { return _mm512_loadu_si512(w); }
  static Vf mul(Vf v, A a, B b) {
    return {_mm512_dpbf16_ps(v.v, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a))};
  }
};
#elif defined(FL_SIMD_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
struct Bfloat16 : FloatSums {
  using X = bf16;
  using W = bf16;
  using A = bfloat16x8_t;
  using B = bfloat16x8_t;
  static constexpr int kStep = 2, kRows = 6;
  static A a(const bf16* x, int64_t step) {
    uint32_t pair;
    std::memcpy(&pair, x + 2 * step, 4);
    return vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  }
  static B b(const bf16* w) { return vreinterpretq_bf16_u16(vld1q_u16(&w->bits)); }
  static Vf mul(Vf v, A a, B b) { return {vbfdotq_f32(v.v, b, a)}; }
};
#else
struct Pair {
  Vf even, odd;
};
struct Bfloat16 : FloatSums {
  using X = float;
  using W = bf16;
  using A = Pair;
  using B = Pair;
  static constexpr int kStep = 2, kRows = simd::kWidth == 16 ? 12 : 4;
  static A a(const float* x, int64_t step) { return {simd::set1(x[2 * step]), simd::set1(x[2 * step + 1])}; }
  static B b(const bf16* w) {
    Pair b;
    simd::load_pairs(w, b.even, b.odd);
    return b;
  }
  static Vf mul(Vf v, A a, B b) { return simd::fma(a.odd, b.odd, simd::fma(a.even, b.even, v)); }
};
#endif

#if defined(FL_SIMD_AVX512) && !defined(__AVX512BF16__)
// Without an instruction for bfloat16, two groups' weights are widened once for all rows, where there are many.
struct Bfloat16Base : TileKernel<Bfloat16> {
  static constexpr int64_t kBlockK = 128, kPanelSize = kBlockK * kPanel;
  float* wide;  // four panels
  explicit Bfloat16Base(const FlLinear& layer)
      : TileKernel(layer), wide(static_cast<float*>(scratch<kUnpacked>(4 * kPanelSize * int64_t{sizeof(float)}))) {}

  void begin(const Block& block) {
    if (block.num_groups < 2) return;
    for (int panel = 0; panel < 4; panel++) {
      const bf16* w = weight + (2 * block.group + panel) * panel_size + block.k0 * kPanel;
      float* to = wide + panel * kPanelSize;
      for (int64_t k = block.k0; k < block.k1; k += 2, w += 2 * kPanel, to += 2 * kPanel) {
        const Pair pair = Bfloat16::b(w);
        simd::store(to, pair.even);
        simd::store(to + kPanel, pair.odd);
      }
    }
  }

  void add(Rows<float> x, int64_t count, const Block& block, float* c, int64_t ldc) const {
    if (block.num_groups < 2) return TileKernel::add(x, count, block, c, ldc);
    each_tile<kManyRows>(0, count, [&](int64_t row, auto size) {
      tile<Float32, size(), 4>(x.data + row * x.stride + block.k0, x.stride, wide, kPanelSize, 0, block.k1 - block.k0,
                               c + row * ldc, ldc, block.c_step, block.k0 == 0);
    });
  }
};
#else
using Bfloat16Base = TileKernel<Bfloat16>;
#endif

#endif

struct Bfloat16Kernel : FloatKernel<Bfloat16Base> {
  using FloatKernel::FloatKernel;
  static Rows<X> direct(const Call& call) { return direct_rows<X>(call, Bfloat16Base::kReusesRows); }
  static void prepare(const Call& call, int64_t row, X* to) { copy_row(call, row, to); }
};

}  // namespace

void run_float32(const Call* calls, int64_t num_calls) { run<Float32Kernel>(calls, num_calls); }
void run_bfloat16(const Call* calls, int64_t num_calls) { run<Bfloat16Kernel>(calls, num_calls); }

}  // namespace matmul
