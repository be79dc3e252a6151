// int4 weights (-8 to 7) with a bfloat16 scale per output and group of 32 inputs; the inputs are not quantised.
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
// Unpacking takes so long that the processor by itself looks too few lines ahead: 4 KiB ahead gave 11.3 GB/s of weights
// for one row where it gave 7.2 without (a thread, AVX512-BF16).
constexpr int64_t kAhead = 64 * kPanel;
inline void prefetch(const void* p) { __builtin_prefetch(p); }

struct Int4Layer {
  const uint32_t* weight;
  const bf16* scale;
  int64_t k;  // padded
  explicit Int4Layer(const FlLinear& layer)
      : weight(static_cast<const uint32_t*>(layer.weight)),
        scale(static_cast<const bf16*>(layer.scale)),
        k(round_up(layer.k, kPadK)) {}
  const uint32_t* words_at(int64_t panel, int64_t from) const {
    return weight + (panel * k + from) / kWordInputs * kPanel;
  }
  const bf16* scales_at(int64_t panel, int64_t from) const { return scale + (panel * k + from) / kQuantGroup * kPanel; }
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

// Few rows take two quantisation groups at a time: their sums do not wait for each other. K is padded to both.
template <class Element, int kTileRows>
inline void tile_int4(const Int4Layer& layer, const typename Element::X* x, int64_t x_stride, int64_t panel, int64_t k0,
                      int64_t k1, float* c, int64_t ldc) {
  constexpr int kAtOnce = kTileRows <= 4 && kTileRows < Element::kRows ? 2 : 1;
  static_assert(kAtOnce * kQuantGroup <= kPadK);
  for (int64_t group = k0; group < k1; group += kAtOnce * kQuantGroup) {
    Vf sum[kAtOnce][kTileRows][kColumns];
#pragma GCC unroll 16
    for (int n = 0; n < kAtOnce; n++)
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 16
        for (int j = 0; j < kColumns; j++) sum[n][i][j] = simd::zero();
    for (int64_t at = group; at < group + kQuantGroup; at += kWordInputs)
#pragma GCC unroll 2
      for (int n = 0; n < kAtOnce; n++) {
        const int64_t k = at + n * kQuantGroup;
        typename Element::Words words[kColumns];
#pragma GCC unroll 2
        for (int p = 0; p < kPanelsAtOnce; p++) prefetch(layer.words_at(panel + p, k) + kAhead);
#pragma GCC unroll 16
        for (int j = 0; j < kColumns; j++)
          words[j] = Element::words(layer.words_at(panel + j / kPanelVectors, k) + j % kPanelVectors * simd::kWidth);
        multiply<Element, 0>(sum[n], x, x_stride, k, words);
        multiply<Element, 1>(sum[n], x, x_stride, k, words);
        multiply<Element, 2>(sum[n], x, x_stride, k, words);
        multiply<Element, 3>(sum[n], x, x_stride, k, words);
      }
#pragma GCC unroll 2
    for (int n = 0; n < kAtOnce; n++)
#pragma GCC unroll 16
      for (int j = 0; j < kColumns; j++) {
        const int64_t k = group + n * kQuantGroup;
        Vf scale = simd::load(layer.scales_at(panel + j / kPanelVectors, k) + j % kPanelVectors * simd::kWidth);
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; i++) {
          float* to = c + i * ldc + j * simd::kWidth;
          simd::store(to, simd::fma(sum[n][i][j], scale, k == 0 ? simd::zero() : simd::load(to)));
        }
      }
  }
}

template <class Element>
struct TileInt4 {
  using X = typename Element::X;
  using C = float;
  static constexpr int kRows = Element::kRows;
  static constexpr int64_t kBlockK = 512, kGroupsAtOnce = 1;
  static constexpr bool kReusesRows = true;
  Int4Layer int4;
  explicit TileInt4(const FlLinear& layer) : int4(layer) {}
  void begin(const Block&) const {}
  void add(Rows<X> x, int64_t count, const Block& block, float* c, int64_t ldc) const {
    for (int panel = 0; panel < 2; panel += kPanelsAtOnce)
      each_tile<kRows>(0, count, [&](int64_t row, auto size) {
        tile_int4<Element, size()>(int4, x.data + row * x.stride, x.stride, 2 * block.group + panel, block.k0, block.k1,
                                   c + row * ldc + panel * kPanel, ldc);
      });
  }
};

#if defined(FL_SIMD_AVX512)
// Float arithmetic on two groups' numbers, unpacked once for all rows, where there are many.
struct UnpackedInt4 : TileInt4<WideInt4> {
  static constexpr int kRows = 2 * kManyRows;
  static constexpr int64_t kBlockK = 128, kGroupsAtOnce = 2, kPanelSize = kBlockK * kPanel;
  float* numbers;  // four panels
  explicit UnpackedInt4(const FlLinear& layer)
      : TileInt4(layer), numbers(static_cast<float*>(scratch<kUnpacked>(4 * kPanelSize * int64_t{sizeof(float)}))) {}

  template <int r>
  static void unpack(const uint32_t* words, float* to) {
    const WideInt4::B pair = WideInt4::b<r>(words);
    simd::store(to + 2 * r * kPanel, pair.even);
    simd::store(to + (2 * r + 1) * kPanel, pair.odd);
  }

  void begin(const Block& block) {
    if (block.num_groups < 2) return;
    for (int panel = 0; panel < 4; panel++) {
      const uint32_t* words = int4.words_at(2 * block.group + panel, block.k0);
      float* to = numbers + panel * kPanelSize;
      for (int64_t k = block.k0; k < block.k1; k += kWordInputs, words += kPanel, to += kWordInputs * kPanel) {
        unpack<0>(words, to);
        unpack<1>(words, to);
        unpack<2>(words, to);
        unpack<3>(words, to);
      }
    }
  }

  void add(Rows<float> x, int64_t count, const Block& block, float* c, int64_t ldc) const {
    if (block.num_groups < 2) return TileInt4::add(x, count, block, c, ldc);
    each_tile<kManyRows>(0, count, [&](int64_t row, auto size) {
      tile<size()>(x.data + row * x.stride + block.k0, x.stride, block, c + row * ldc, ldc);
    });
  }

  template <int kTileRows>
  void tile(const float* x, int64_t x_stride, const Block& block, float* c, int64_t ldc) const {
    for (int64_t group = 0; group < block.k1 - block.k0; group += kQuantGroup) {
      Vf sum[kTileRows][4];
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; i++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[i][j] = simd::zero();
      for (int64_t k = group; k < group + kQuantGroup; k++) {
        Vf b[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) b[j] = simd::load(numbers + j * kPanelSize + k * kPanel);
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; i++) {
          const Vf a = simd::set1(x[i * x_stride + k]);
#pragma GCC unroll 4
          for (int j = 0; j < 4; j++) sum[i][j] = simd::fma(a, b[j], sum[i][j]);
        }
      }
      const int64_t k = block.k0 + group;
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const Vf scale = simd::load(int4.scales_at(2 * block.group + j, k));
#pragma GCC unroll 16
        for (int i = 0; i < kTileRows; i++) {
          float* to = c + i * ldc + j / 2 * block.c_step + j % 2 * kPanel;
          simd::store(to, simd::fma(sum[i][j], scale, k == 0 ? simd::zero() : simd::load(to)));
        }
      }
    }
  }
};
using FloatInt4 = UnpackedInt4;
#else
using FloatInt4 = TileInt4<WideInt4>;
#endif

#if defined(__AMX_TILE__)
// The numbers of one block of K are unpacked to bfloat16 once for all rows.
struct AmxInt4 {
  using X = bf16;
  using C = float;
  static constexpr int kRows = 32;
  static constexpr int64_t kBlockK = 256, kGroupsAtOnce = 1, kPanelSize = kBlockK * kPanel;
  static constexpr bool kReusesRows = true;
  Int4Layer int4;
  amx::Tiles tiles;
  bf16* unpacked;
  float* sums;
  explicit AmxInt4(const FlLinear& layer)
      : int4(layer), unpacked(static_cast<bf16*>(scratch<kUnpacked>(2 * kPanelSize * 2 + kRows * kGroup * 4))) {
    sums = reinterpret_cast<float*>(unpacked + 2 * kPanelSize);
  }

  void unpack(int64_t group, int64_t k0, int64_t k1) {
    for (int panel = 0; panel < 2; panel++) {
      const uint32_t* words = int4.words_at(2 * group + panel, k0);
      bf16* to = unpacked + panel * kPanelSize;
      for (int64_t k = k0; k < k1; k += kWordInputs, words += kPanel, to += kWordInputs * kPanel) {
        prefetch(words + kAhead);
        const __m512i w = _mm512_loadu_si512(words);
        _mm512_storeu_si512(to, number_pairs<0>(w));
        _mm512_storeu_si512(to + 32, number_pairs<1>(w));
        _mm512_storeu_si512(to + 64, number_pairs<2>(w));
        _mm512_storeu_si512(to + 96, number_pairs<3>(w));
      }
    }
  }

  void begin(const Block& block) {
    if (block.k1 - block.k0 <= kBlockK) unpack(block.group, block.k0, block.k1);
  }

  // All of K at once comes in blocks as well, unpacked here.
  void add(Rows<bf16> x, int64_t rows, const Block& all, float* c, int64_t ldc) {
    const int64_t group = all.group;
    for (int64_t block = all.k0; block < all.k1; block += kBlockK) {
      const int64_t end = std::min(block + kBlockK, all.k1);
      if (all.k1 - all.k0 > kBlockK) unpack(group, block, end);
      if (rows <= 16) {
        for (int64_t k = block; k < end; k += 2 * kQuantGroup) {
          tiles.two(x.data + k, x.stride, rows, unpacked + (k - block) * kPanel, kPanelSize, sums);
          scale_and_add(sums, rows, group, k, c, ldc);
          scale_and_add(sums + 16 * kGroup, rows, group, k + kQuantGroup, c, ldc);
        }
      } else {
        for (int64_t k = block; k < end; k += kQuantGroup) {
          tiles.add<amx::Bf16>(x.data + k, x.stride, rows, unpacked + (k - block) * kPanel, kPanelSize, kQuantGroup,
                               sums, kGroup, true);
          scale_and_add(sums, rows, group, k, c, ldc);
        }
      }
    }
  }

  void scale_and_add(const float* sum, int64_t rows, int64_t group, int64_t k, float* c, int64_t ldc) const {
    const Vf left = simd::load(int4.scales_at(2 * group, k)), right = simd::load(int4.scales_at(2 * group + 1, k));
    for (int64_t i = 0; i < rows; i++, sum += kGroup, c += ldc) {
      simd::store(c, simd::fma(simd::load(sum), left, k == 0 ? simd::zero() : simd::load(c)));
      simd::store(c + 16, simd::fma(simd::load(sum + 16), right, k == 0 ? simd::zero() : simd::load(c + 16)));
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
  static Rows<X> direct(const Call& call) { return direct_rows<X>(call, Base::kReusesRows); }
  static void prepare(const Call& call, int64_t row, X* to) { copy_row(call, row, to); }
  static void finish(const Call& call, Rows<X>, int64_t row, int64_t count, int64_t group, const float* c) {
    finish_group(call, row, count, group, [&](int64_t i, int64_t at) {
      return simd::load(c + i * kGroup + (at - group * kGroup));
    });
  }
};

}  // namespace

void run_int4(const Call* calls, int64_t num_calls) {
#if defined(__AVX512BF16__)
  if (calls->layer->x_dtype == kBf16) return run<Int4Kernel<Bf16Base>>(calls, num_calls);
#endif
  run<Int4Kernel<FloatInt4>>(calls, num_calls);
}

}  // namespace matmul
