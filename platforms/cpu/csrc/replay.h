// Recorded calls: a function's arguments as 64-bit words, so that many calls can be replayed as one.
#pragma once
#include <cstring>
#include <type_traits>
#include <utility>

#include "export.h"

namespace replay {

template <class T>
T from_word(uint64_t word) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(static_cast<uintptr_t>(word));
  } else if constexpr (std::is_same_v<T, float>) {
    const uint32_t bits = static_cast<uint32_t>(word);
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  } else {
    static_assert(std::is_integral_v<T>, "arguments are pointers, integers and floats");
    return static_cast<T>(word);
  }
}

template <class... A, size_t... I>
void invoke(void (*function)(A...), const uint64_t* words, std::index_sequence<I...>) {
  function(from_word<A>(words[I])...);
}

template <class... A>
void invoke(void (*function)(A...), const uint64_t* words) {
  invoke(function, words, std::index_sequence_for<A...>());
}

}  // namespace replay

// Behind a function of the interface: exports NAME_invoke, which calls it with recorded arguments.
#define FL_RECORDABLE(name) \
  FL_API void name##_invoke(const uint64_t* words) { replay::invoke(name, words); }
