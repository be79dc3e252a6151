// 8-bit floating point as a KV cache stores it: rounded to the nearest even, NaN kept, the rest saturated.
// Source: Open Compute Project, "OCP 8-bit Floating Point Specification (OFP8)" (2023), E4M3 and E5M2.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace fp8 {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline void put(uint32_t bits, float* to) { *to = of_bits(bits); }
inline void put(uint32_t bits, simd::bf16* to) { to->bits = static_cast<uint16_t>(bits >> 16); }  // exact: few digits

template <int ExponentBits, uint32_t Largest>
struct Format {
  static constexpr int kDigits = 7 - ExponentBits, kShift = 23 - kDigits;
  static constexpr uint32_t kBias = 127 - ((1u << (ExponentBits - 1)) - 1);  // between its exponents and a float's
  static constexpr uint32_t kNormal = (kBias + 1) << 23;                     // the bits of its least normal number
  static constexpr uint32_t kNaN = 0x7f;

  // The bits of a float. Below the least normal number the digits stand for what comes on top of it.
  static uint32_t widen(uint8_t code) {
    const uint32_t size = code & 0x7fu, shifted = size << kShift;
    const uint32_t small = bits_of(of_bits(kNormal + shifted) - of_bits(kNormal));
    uint32_t bits = size >> kDigits ? shifted + (kBias << 23) : small;
    bits = size > Largest ? 0x7fc00000u : bits;
    return bits | (code & 0x80u) << 24;
  }

  static uint8_t narrow(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 24 & 0x80u;
    if (x != x) return static_cast<uint8_t>(sign | kNaN);
    const float size = std::min(std::fabs(x), of_bits(widen(Largest)));
    if (size < of_bits(kNormal)) {  // whole steps of the least number: code 1
      return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::nearbyint(size / of_bits(widen(1)))));
    }
    uint32_t rounded = bits_of(size);
    rounded += (1u << (kShift - 1)) - 1 + (rounded >> kShift & 1);
    return static_cast<uint8_t>(sign | ((rounded >> kShift) - (kBias << kDigits)));
  }
};

using E4M3 = Format<4, 0x7e>;  // up to 448
using E5M2 = Format<5, 0x7b>;  // up to 57344

template <class F, class Element>
void widen(const uint8_t* from, int64_t n, Element* to) {
  for (int64_t i = 0; i < n; i++) put(F::widen(from[i]), to + i);
}

template <class F, class Element>
void narrow(const Element* from, int64_t n, uint8_t* to) {
  for (int64_t i = 0; i < n; i++) to[i] = F::narrow(simd::to_float(from[i]));
}

}  // namespace fp8
