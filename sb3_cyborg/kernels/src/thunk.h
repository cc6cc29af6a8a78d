// Kernels whose arguments lie in an array of 64-bit words, so that a list of calls can be replayed, see operations.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

namespace {

// An argument from a word: an address, an integer, or the bits of a float.
template <class A>
inline A argument(int64_t word) {
  if constexpr (std::is_pointer_v<A>) {
    return reinterpret_cast<A>(word);
  } else if constexpr (std::is_integral_v<A>) {
    return static_cast<A>(word);
  } else {
    static_assert(sizeof(A) == 4, "floats of 32 bits");
    const int32_t low = static_cast<int32_t>(word);
    A value;
    std::memcpy(&value, &low, 4);
    return value;
  }
}

template <class... A, size_t... I>
inline void call_with(void (*kernel)(A...), const int64_t* words, std::index_sequence<I...>) {
  kernel(argument<A>(words[I])...);
}
template <class... A>
inline void call_with_words(void (*kernel)(A...), const int64_t* words) {
  call_with(kernel, words, std::index_sequence_for<A...>{});
}

}  // namespace

// <name>_thunk: the kernel with its arguments as words.
#define RECORDABLE(name) \
  EXPORT void KERNEL(name##_thunk)(const int64_t* words) { call_with_words(KERNEL(name), words); }
