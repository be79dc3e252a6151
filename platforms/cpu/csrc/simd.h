// Vectors of floats at the width of the instruction set that this file is compiled for; kWidth lanes.
// load/store take float or bfloat16 memory of any alignment; stores to bfloat16 round to nearest even.
// The *_n forms touch the first n lanes' memory only (0 <= n <= kWidth); lanes that are not loaded are 0.
// load_i32 converts whole numbers; load_pairs splits 2 * kWidth bfloat16 by even and odd position; load_nibbles<s> takes
// bits s to s + 3 of each 32-bit word as a number from 0 to 15, less 8.
// store_i8 stores whole numbers from -128 to 127.
// reduce_* combine the lanes in one fixed order. max and min return NaN where their second argument is NaN.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "export.h"

#if defined(FL_PORTABLE)
#define FL_ISA "generic"
#elif defined(__AVX512F__)
#define FL_SIMD_AVX512 1
#if defined(__AMX_TILE__)
#define FL_ISA "amx"
#elif defined(__AVX512BF16__)
#define FL_ISA "avx512bf16"
#elif defined(__AVX512VNNI__)
#define FL_ISA "avx512vnni"
#else
#define FL_ISA "avx512"
#endif
#elif defined(__AVX2__)
#define FL_SIMD_AVX2 1
#define FL_ISA "avx2"
#elif defined(__ARM_NEON) && defined(__aarch64__)
#define FL_SIMD_NEON 1
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define FL_ISA "neon_bf16"
#else
#define FL_ISA "neon"
#endif
#else
#define FL_PORTABLE 1
#define FL_ISA "generic"
#endif

#if defined(FL_SIMD_AVX512) || defined(FL_SIMD_AVX2)
#include <immintrin.h>
#elif defined(FL_SIMD_NEON)
#include <arm_neon.h>
#endif

namespace simd {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
  uint32_t u = uint32_t{x.bits} << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline bf16 round_to_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return bf16{static_cast<uint16_t>((u >> 16) | 0x40)};  // NaN stays one
  return bf16{static_cast<uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
inline void from_float(float x, float* p) { *p = x; }
inline void from_float(float x, bf16* p) { *p = round_to_bf16(x); }

#if defined(__AVX2__) && !defined(FL_PORTABLE)
inline __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
#endif

#if defined(FL_SIMD_AVX512)

constexpr int kWidth = 16;
struct Vf {
  __m512 v;
};

inline __mmask16 lanes(int n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vf set1(float x) { return {_mm512_set1_ps(x)}; }
inline Vf load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vf load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(lanes(n), p)}; }
inline void store(float* p, Vf a) { _mm512_storeu_ps(p, a.v); }
inline void store_n(float* p, Vf a, int n) { _mm512_mask_storeu_ps(p, lanes(n), a.v); }

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i narrow(__m512 x) {
#if defined(__AVX512BF16__)
  // The instruction takes subnormals for 0, the rest is the same rounding; bfloat16's subnormals are float's.
  __m256bh b = _mm512_cvtneps_pbh(x);
  __m256i r;
  std::memcpy(&r, &b, sizeof r);
  return r;
#else
  __m512i u = _mm512_castps_si512(x);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __m512i nan = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(r, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), nan));
#endif
}
inline Vf load(const bf16* p) { return {widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
inline Vf load_n(const bf16* p, int n) { return {widen(_mm256_maskz_loadu_epi16(lanes(n), p))}; }
inline void store(bf16* p, Vf a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a.v)); }
inline void store_n(bf16* p, Vf a, int n) { _mm256_mask_storeu_epi16(p, lanes(n), narrow(a.v)); }

inline Vf operator+(Vf a, Vf b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vf operator-(Vf a, Vf b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vf operator*(Vf a, Vf b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vf operator/(Vf a, Vf b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Vf fma(Vf a, Vf b, Vf c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vf max(Vf a, Vf b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vf min(Vf a, Vf b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vf abs(Vf a) { return {_mm512_abs_ps(a.v)}; }
inline Vf sqrt(Vf a) { return {_mm512_sqrt_ps(a.v)}; }
inline Vf round(Vf a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n for whole n in [-126, 127]
inline Vf exp2_of_int(Vf n) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127)), 23))};
}
inline Vf load_i32(const int32_t* p) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(p))}; }
inline void store_i8(int8_t* p, Vf a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline void load_pairs(const bf16* p, Vf& even, Vf& odd) {
  __m512i u = _mm512_loadu_si512(p);
  even = {_mm512_castsi512_ps(_mm512_slli_epi32(u, 16))};
  odd = {_mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(-65536)))};
}
template <int kShift>
inline Vf load_nibbles(const uint32_t* p) {
  __m512i u = _mm512_and_si512(_mm512_srli_epi32(_mm512_loadu_si512(p), kShift), _mm512_set1_epi32(15));
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(u, _mm512_set1_epi32(8)))};
}
inline float reduce_add(Vf a) { return _mm512_reduce_add_ps(a.v); }
inline float reduce_max(Vf a) { return _mm512_reduce_max_ps(a.v); }

#elif defined(FL_SIMD_AVX2)

constexpr int kWidth = 8;
struct Vf {
  __m256 v;
};

inline __m256i lanes(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vf set1(float x) { return {_mm256_set1_ps(x)}; }
inline Vf load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vf load_n(const float* p, int n) { return {_mm256_maskload_ps(p, lanes(n))}; }
inline void store(float* p, Vf a) { _mm256_storeu_ps(p, a.v); }
inline void store_n(float* p, Vf a, int n) { _mm256_maskstore_ps(p, lanes(n), a.v); }

inline __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline __m128i narrow(__m256 x) {
  __m256i u = _mm256_castps_si256(x);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  r = _mm256_blendv_epi8(r, nan, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xd8));
}
inline Vf load(const bf16* p) { return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vf load_n(const bf16* p, int n) {
  uint16_t t[8] = {};
  std::memcpy(t, p, 2 * n);
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(t)))};
}
inline void store(bf16* p, Vf a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(a.v)); }
inline void store_n(bf16* p, Vf a, int n) {
  uint16_t t[8];
  _mm_storeu_si128(reinterpret_cast<__m128i*>(t), narrow(a.v));
  std::memcpy(p, t, 2 * n);
}

inline Vf operator+(Vf a, Vf b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vf operator-(Vf a, Vf b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vf operator*(Vf a, Vf b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vf operator/(Vf a, Vf b) { return {_mm256_div_ps(a.v, b.v)}; }
inline Vf fma(Vf a, Vf b, Vf c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vf max(Vf a, Vf b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vf min(Vf a, Vf b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vf abs(Vf a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline Vf sqrt(Vf a) { return {_mm256_sqrt_ps(a.v)}; }
inline Vf round(Vf a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Vf exp2_of_int(Vf n) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23))};
}
inline Vf load_i32(const int32_t* p) { return {_mm256_cvtepi32_ps(load_256(p))}; }
inline void store_i8(int8_t* p, Vf a) {
  __m256i n = _mm256_cvtps_epi32(a.v);
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline void load_pairs(const bf16* p, Vf& even, Vf& odd) {
  __m256i u = load_256(p);
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(u, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(u, _mm256_set1_epi32(-65536)))};
}
template <int kShift>
inline Vf load_nibbles(const uint32_t* p) {
  __m256i u = _mm256_and_si256(_mm256_srli_epi32(load_256(p), kShift), _mm256_set1_epi32(15));
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(u, _mm256_set1_epi32(8)))};
}

#elif defined(FL_SIMD_NEON)

constexpr int kWidth = 4;
struct Vf {
  float32x4_t v;
};

inline Vf set1(float x) { return {vdupq_n_f32(x)}; }
inline Vf load(const float* p) { return {vld1q_f32(p)}; }
inline Vf load_n(const float* p, int n) {
  float t[4] = {};
  std::memcpy(t, p, 4 * n);
  return {vld1q_f32(t)};
}
inline void store(float* p, Vf a) { vst1q_f32(p, a.v); }
inline void store_n(float* p, Vf a, int n) {
  float t[4];
  vst1q_f32(t, a.v);
  std::memcpy(p, t, 4 * n);
}

inline float32x4_t widen(uint16x4_t x) { return vreinterpretq_f32_u32(vshll_n_u16(x, 15 + 1)); }
inline uint16x4_t narrow(float32x4_t x) {
  uint32x4_t u = vreinterpretq_u32_f32(x);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  uint32x4_t r = vshrq_n_u32(vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  uint32x4_t nan = vorrq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(0x40));
  return vmovn_u32(vbslq_u32(vceqq_f32(x, x), r, nan));
}
inline Vf load(const bf16* p) { return {widen(vld1_u16(&p->bits))}; }
inline Vf load_n(const bf16* p, int n) {
  uint16_t t[4] = {};
  std::memcpy(t, p, 2 * n);
  return {widen(vld1_u16(t))};
}
inline void store(bf16* p, Vf a) { vst1_u16(&p->bits, narrow(a.v)); }
inline void store_n(bf16* p, Vf a, int n) {
  uint16_t t[4];
  vst1_u16(t, narrow(a.v));
  std::memcpy(p, t, 2 * n);
}

inline Vf operator+(Vf a, Vf b) { return {vaddq_f32(a.v, b.v)}; }
inline Vf operator-(Vf a, Vf b) { return {vsubq_f32(a.v, b.v)}; }
inline Vf operator*(Vf a, Vf b) { return {vmulq_f32(a.v, b.v)}; }
inline Vf operator/(Vf a, Vf b) { return {vdivq_f32(a.v, b.v)}; }
inline Vf fma(Vf a, Vf b, Vf c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
inline Vf max(Vf a, Vf b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
inline Vf min(Vf a, Vf b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
inline Vf abs(Vf a) { return {vabsq_f32(a.v)}; }
inline Vf sqrt(Vf a) { return {vsqrtq_f32(a.v)}; }
inline Vf round(Vf a) { return {vrndnq_f32(a.v)}; }
inline Vf exp2_of_int(Vf n) {
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.v), vdupq_n_s32(127)), 23))};
}
inline Vf load_i32(const int32_t* p) { return {vcvtq_f32_s32(vld1q_s32(p))}; }
inline void store_i8(int8_t* p, Vf a) {
  int16x4_t words = vqmovn_s32(vcvtnq_s32_f32(a.v));
  vst1_lane_s32(reinterpret_cast<int32_t*>(p), vreinterpret_s32_s8(vqmovn_s16(vcombine_s16(words, words))), 0);
}
inline void load_pairs(const bf16* p, Vf& even, Vf& odd) {
  uint32x4_t u = vreinterpretq_u32_u16(vld1q_u16(&p->bits));
  even = {vreinterpretq_f32_u32(vshlq_n_u32(u, 16))};
  odd = {vreinterpretq_f32_u32(vandq_u32(u, vdupq_n_u32(0xffff0000)))};
}
template <int kShift>
inline Vf load_nibbles(const uint32_t* p) {
  uint32x4_t u = vandq_u32(vshlq_u32(vld1q_u32(p), vdupq_n_s32(-kShift)), vdupq_n_u32(15));
  return {vcvtq_f32_s32(vsubq_s32(vreinterpretq_s32_u32(u), vdupq_n_s32(8)))};
}

#else  // portable

constexpr int kWidth = 8;
struct Vf {
  float v[kWidth];
};

template <class F>
inline Vf each(F f) {
  Vf r;
  for (int i = 0; i < kWidth; i++) r.v[i] = f(i);
  return r;
}
inline Vf set1(float x) {
  return each([&](int) { return x; });
}
template <class T>
inline Vf load(const T* p) {
  return each([&](int i) { return to_float(p[i]); });
}
template <class T>
inline Vf load_n(const T* p, int n) {
  return each([&](int i) { return i < n ? to_float(p[i]) : 0.0f; });
}
template <class T>
inline void store(T* p, Vf a) {
  for (int i = 0; i < kWidth; i++) from_float(a.v[i], p + i);
}
template <class T>
inline void store_n(T* p, Vf a, int n) {
  for (int i = 0; i < n; i++) from_float(a.v[i], p + i);
}
inline Vf operator+(Vf a, Vf b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vf operator-(Vf a, Vf b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vf operator*(Vf a, Vf b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vf operator/(Vf a, Vf b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
// Two roundings here: a fused multiply-add without the instruction is a library call per lane.
inline Vf fma(Vf a, Vf b, Vf c) {
  return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vf max(Vf a, Vf b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vf min(Vf a, Vf b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vf abs(Vf a) {
  return each([&](int i) { return std::fabs(a.v[i]); });
}
inline Vf sqrt(Vf a) {
  return each([&](int i) { return std::sqrt(a.v[i]); });
}
// Adding 1.5 * 2^23 leaves no room for a fraction; beyond 2^22 a float has at most a half to lose.
inline Vf round(Vf a) {
  return each([&](int i) {
    constexpr float kMagic = 12582912.0f;
    float r = (a.v[i] + kMagic) - kMagic;
    return std::fabs(a.v[i]) < 4194304.0f ? r : std::nearbyint(a.v[i]);
  });
}
inline Vf exp2_of_int(Vf n) {
  return each([&](int i) {
    uint32_t u = static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
  });
}
inline Vf load_i32(const int32_t* p) {
  return each([&](int i) { return static_cast<float>(p[i]); });
}
inline void store_i8(int8_t* p, Vf a) {
  for (int i = 0; i < kWidth; i++) p[i] = static_cast<int8_t>(a.v[i]);
}
inline void load_pairs(const bf16* p, Vf& even, Vf& odd) {
  for (int i = 0; i < kWidth; i++) {
    even.v[i] = to_float(p[2 * i]);
    odd.v[i] = to_float(p[2 * i + 1]);
  }
}
template <int kShift>
inline Vf load_nibbles(const uint32_t* p) {
  return each([&](int i) { return static_cast<float>(static_cast<int32_t>(p[i] >> kShift & 15) - 8); });
}

#endif

#if !defined(FL_SIMD_AVX512)
template <class F>
inline float fold(Vf a, F f) {
  float t[kWidth];
  store(t, a);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) t[i] = f(t[i], t[i + half]);
  return t[0];
}
inline float reduce_add(Vf a) {
  return fold(a, [](float x, float y) { return x + y; });
}
inline float reduce_max(Vf a) {
  return fold(a, [](float x, float y) { return x > y ? x : y; });
}
#endif

inline Vf zero() { return set1(0.0f); }

// e^x within 2 units in the last place; 0 below -104, infinity above 89, NaN for NaN.
// x = n ln 2 + r with |r| <= ln 2 / 2, ln 2 in two parts (Cody and Waite); e^r by its Taylor polynomial of degree 7.
inline Vf exp(Vf x) {
  x = min(set1(89.0f), max(set1(-104.0f), x));
  Vf n = round(x * set1(1.44269504f));
  Vf r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  Vf p = set1(1.0f / 5040);
  p = fma(p, r, set1(1.0f / 720));
  p = fma(p, r, set1(1.0f / 120));
  p = fma(p, r, set1(1.0f / 24));
  p = fma(p, r, set1(1.0f / 6));
  p = fma(p, r, set1(0.5f));
  p = fma(p, r, set1(1.0f));
  p = fma(p, r, set1(1.0f));
  Vf half = round(n * set1(0.5f));  // 2^n in two factors: n reaches -150 and 128
  return p * exp2_of_int(half) * exp2_of_int(n - half);
}

}  // namespace simd
