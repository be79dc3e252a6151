// int4 weights (-8 to 7) with a bfloat16 scale per output and group of 32 or 64 inputs; the inputs are not quantised.
// A group is summed over whole-number weights and its sum then multiplied by the scale and added: the weights that a
// matmul sees are exactly number times scale, never rounded.
//
// Packed: per panel and 8 inputs one 32-bit word per output, input 2 r + j in bits 16 j + 4 r to 16 j + 4 r + 3, as
// number + 8. Scales: per panel and group, 16.
#include "amx.h"
#include "kernels.h"
#include "tile.h"

namespace matmul {
namespace {

constexpr int kWordInputs = 8;

struct Int4Layer {
  const uint32_t* weight;
  const bf16* scale;
  int64_t words, groups, quant_group;  // words and scales of a panel, by 16
  explicit Int4Layer(const FlLinear& layer)
      : weight(static_cast<const uint32_t*>(layer.weight)),
        scale(static_cast<const bf16*>(layer.scale)),
        words(round_up(layer.k, kPadK) / kWordInputs),
        groups(round_up(layer.k, kPadK) / layer.quant_group),
        quant_group(layer.quant_group) {}
  const uint32_t* words_at(int64_t panel, int64_t k) const { return weight + (panel * words + k / kWordInputs) * kPanel; }
  const bf16* scales_at(int64_t panel, int64_t k) const { return scale + (panel * groups + k / quant_group) * kPanel; }
};

// Float arithmetic, for float32 inputs and where there is no bfloat16 instruction.
struct WideInt4 {
  using X = float;
  struct A {
    Vf even, odd;
  };
  using B = A;
  using Words = const uint32_t*;
  static constexpr int kRows = simd::kWidth == 16 ? 8 : 2;
  static Words words(const uint32_t* p) { return p; }
  static A a(const float* x, int64_t pair) { return {simd::set1(x[2 * pair]), simd::set1(x[2 * pair + 1])}; }
  template <int r>
  static B b(Words words) {
    return {simd::load_nibbles<4 * r>(words), simd::load_nibbles<16 + 4 * r>(words)};
  }
  static Vf mul(Vf v, A a, B b) { return simd::fma(a.odd, b.odd, simd::fma(a.even, b.even, v)); }
};

#if defined(__AVX512BF16__)
// The bits of -8 to 7 in bfloat16, twice: the permutation looks at 5 bits, of which the fifth is another number's.
alignas(64) constexpr uint16_t kNumbers[32] = {
    0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000,
    0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
};
template <int r>
inline __m512i number_pairs(__m512i words) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * r), _mm512_load_si512(kNumbers));
}

struct DotInt4 {
  using X = bf16;
  using A = __m512i;
  using B = __m512i;
  using Words = __m512i;
  static constexpr int kRows = 8;
  static Words words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static A a(const bf16* x, int64_t pair) {
    int32_t both;
    std::memcpy(&both, x + 2 * pair, 4);
    return _mm512_set1_epi32(both);
  }
  template <int r>
  static B b(Words words) {
    return number_pairs<r>(words);
  }
  static Vf mul(Vf v, A a, B b) {
    return {_mm512_dpbf16_ps(v.v, reinterpret_cast<__m512bh>(b), reinterpret_cast<__m512bh>(a))};
  }
};
#endif

constexpr int kColumns = kPanelsAtOnce * kPanel / simd::kWidth;
constexpr int kPanelVectors = kPanel / simd::kWidth;

template <class Element, int r, int kTileRows>
inline void multiply(Vf (&sum)[kTileRows][kColumns], const typename Element::X* x, int64_t x_stride, int64_t k,
                     const typename Element::Words (&words)[kColumns]) {
  typename Element::B b[kColumns];
#pragma GCC unroll 16
  for (int j = 0; j < kColumns; j++) b[j] = Element::template b<r>(words[j]);
#pragma GCC unroll 16
  for (int i = 0; i < kTileRows; i++) {
    typename Element::A a = Element::a(x + i * x_stride, k / 2 + r);
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; j++) sum[i][j] = Element::mul(sum[i][j], a, b[j]);
  }
}

template <class Element, int kTileRows>
inline void tile_int4(const Int4Layer& layer, const typename Element::X* x, int64_t x_stride, int64_t panel, int64_t k0,
                      int64_t k1, float* c, int64_t ldc) {
  for (int64_t group = k0; group < k1; group += layer.quant_group) {
    Vf sum[kTileRows][kColumns];
#pragma GCC unroll 16
    for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; j++) sum[i][j] = simd::zero();
    for (int64_t k = group; k < group + layer.quant_group; k += kWordInputs) {
      typename Element::Words words[kColumns];
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; j++)
        words[j] = Element::words(layer.words_at(panel + j / kPanelVectors, k) + j % kPanelVectors * simd::kWidth);
      multiply<Element, 0>(sum, x, x_stride, k, words);
      multiply<Element, 1>(sum, x, x_stride, k, words);
      multiply<Element, 2>(sum, x, x_stride, k, words);
      multiply<Element, 3>(sum, x, x_stride, k, words);
    }
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; j++) {
      Vf scale = simd::load(layer.scales_at(panel + j / kPanelVectors, group) + j % kPanelVectors * simd::kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; i++) {
        float* at = c + i * ldc + j * simd::kWidth;
        simd::store(at, simd::fma(sum[i][j], scale, group == 0 ? simd::zero() : simd::load(at)));
      }
    }
  }
}

template <class Element, int kTileRows, class... Args>
inline void tile_int4_of(int64_t rows, const Args&... args) {
  if constexpr (kTileRows > 1) {
    if (rows < kTileRows) return tile_int4_of<Element, kTileRows - 1>(rows, args...);
  }
  tile_int4<Element, kTileRows>(args...);
}

template <class Element>
struct TileInt4 {
  using X = typename Element::X;
  using C = float;
  static constexpr int kRows = Element::kRows;
  static constexpr int64_t kBlockK = 512;
  Int4Layer int4;
  explicit TileInt4(const FlLinear& layer) : int4(layer) {}
  void add(Rows<X> x, int64_t num_rows, int64_t group, int64_t k0, int64_t k1, float* c, int64_t ldc) const {
    for (int panel = 0; panel < 2; panel += kPanelsAtOnce)
      for (int64_t row = 0; row < num_rows; row += kRows)
        tile_int4_of<Element, kRows>(num_rows - row, int4, x.data + row * x.stride, x.stride, 2 * group + panel, k0, k1,
                                     c + row * ldc + panel * kPanel, ldc);
  }
};

#if defined(__AMX_TILE__)
// The numbers of one block of K are unpacked to bfloat16 once for all rows.
struct AmxInt4 {
  using X = bf16;
  using C = float;
  static constexpr int kRows = 0;
  static constexpr int64_t kBlockK = 256;
  Int4Layer int4;
  amx::Tiles tiles;
  explicit AmxInt4(const FlLinear& layer) : int4(layer) {}

  void add(Rows<bf16> x, int64_t num_rows, int64_t group, int64_t k0, int64_t k1, float* c, int64_t ldc) {
    constexpr int64_t kPanelSize = kBlockK * kPanel;
    bf16* unpacked = static_cast<bf16*>(scratch<kUnpacked>(2 * kPanelSize * 2 + 32 * kGroup * 4));
    float* sums = reinterpret_cast<float*>(unpacked + 2 * kPanelSize);
    for (int panel = 0; panel < 2; panel++) {
      const uint32_t* words = int4.words_at(2 * group + panel, k0);
      bf16* to = unpacked + panel * kPanelSize;
      for (int64_t k = k0; k < k1; k += kWordInputs, words += kPanel, to += kWordInputs * kPanel) {
        const __m512i w = _mm512_loadu_si512(words);
        _mm512_storeu_si512(to, number_pairs<0>(w));
        _mm512_storeu_si512(to + 32, number_pairs<1>(w));
        _mm512_storeu_si512(to + 64, number_pairs<2>(w));
        _mm512_storeu_si512(to + 96, number_pairs<3>(w));
      }
    }
    for (int64_t row = 0; row < num_rows; row += 32) {
      const int64_t rows = std::min<int64_t>(num_rows - row, 32);
      float* to = c + row * ldc;
      for (int64_t k = k0; k < k1; k += int4.quant_group) {
        tiles.add<amx::Bf16>(x.data + row * x.stride + k, x.stride, rows, unpacked + (k - k0) * kPanel, kPanelSize,
                             int4.quant_group, sums, kGroup, true);
        const Vf left = simd::load(int4.scales_at(2 * group, k)), right = simd::load(int4.scales_at(2 * group + 1, k));
        for (int64_t i = 0; i < rows; i++) {
          float* at = to + i * ldc;
          const float* sum = sums + i * kGroup;
          simd::store(at, simd::fma(simd::load(sum), left, k == 0 ? simd::zero() : simd::load(at)));
          simd::store(at + 16, simd::fma(simd::load(sum + 16), right, k == 0 ? simd::zero() : simd::load(at + 16)));
        }
      }
    }
  }
};
using Bf16Base = AmxInt4;
#elif defined(__AVX512BF16__)
using Bf16Base = TileInt4<DotInt4>;
#endif

template <class Base>
struct Int4Kernel : Base {
  using Base::Base;
  using X = typename Base::X;
  static Rows<X> direct(const Call& call) {
    bool as_it_is = call.layer->k % kPadK == 0 && call.layer->x_dtype == (sizeof(X) == 2 ? kBf16 : kF32);
    return {as_it_is ? static_cast<const X*>(call.x) : nullptr, call.x_stride};
  }
  static int64_t row_size(const FlLinear& layer) { return round_up(layer.k, kPadK); }
  static void prepare(const Call& call, int64_t row, X* to) { copy_row(call, row, to); }
  static void finish(const Call& call, const X*, int64_t row, int64_t group, const float* c) {
    finish_group(call, row, group, [&](int64_t at) { return simd::load(c + (at - group * kGroup)); });
  }
};

}  // namespace

void run_int4(const Call& call) {
#if defined(__AVX512BF16__)
  if (call.layer->x_dtype == kBf16) return run<Int4Kernel<Bf16Base>>(call);
#endif
  run<Int4Kernel<TileInt4<WideInt4>>>(call);
}

}  // namespace matmul
