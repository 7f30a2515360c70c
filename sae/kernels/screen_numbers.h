// What a processor has for products in integers: the numbers, and vectors of them.
#pragma once
#include <algorithm>
#include <cstring>

#include "screen.h"

#if defined(__AVX512VNNI__) || defined(__AVX2__)
#define SCREENS_BY_INTEGERS

namespace screen {

#ifdef __AVX512VNNI__
typedef int8_t Number;
typedef uint8_t OfW;  // a number + SHIFT
constexpr int32_t BITS = 8, SHIFT = 128;
constexpr int64_t ROWS = 6, WIDE = 4, BLOCK = 384;  // of 32 registers 24 for sums
#else
typedef int16_t Number;
typedef int16_t OfW;
constexpr int32_t BITS = 16, SHIFT = 0;
constexpr int64_t ROWS = 4, WIDE = 2, BLOCK = 192;  // of 16 registers 8 for sums
#endif
constexpr int64_t TOGETHER = 4 / sizeof(Number);  // products that are added up at once
constexpr int64_t PANEL = WIDTH * WIDE;           // features of the innermost product

// The lanes i ^ h.
INLINE Lanes exchanged(const Lanes& given, int h) {
  Lanes out;
  if (h >= WIDTH) {
    EACH_PART out.part[v] = given.part[v ^ (h / WIDTH)];
    return out;
  }
  Whole at;
  for (int i = 0; i < WIDTH; i++) at[i] = i ^ h;
  EACH_PART {
#ifdef __AVX512F__
    out.part[v] = (Vector)_mm512_maskz_permutexvar_ps(0xFFFF, (__m512i)at, (__m512)given.part[v]);
#else
    out.part[v] = (Vector)_mm256_permutevar8x32_ps((__m256)given.part[v], (__m256i)at);
#endif
  }
  return out;
}

// Sixteen whole numbers.
INLINE void put(const Lanes& near, Number* to) {
#ifdef __AVX512VNNI__
  const auto whole = _mm512_maskz_cvtps_epi32(0xFFFF, (__m512)near.part[0]);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(0xFFFF, whole));
#else
  for (int i = 0; i < LANES; i++) to[i] = static_cast<Number>(near[i]);
#endif
}

#ifdef __AVX512VNNI__
typedef __m512i Sums;
INLINE Sums all(int32_t number) { return _mm512_set1_epi32(number); }
INLINE Sums load(const OfW* from) { return _mm512_load_si512(from); }
// not the intrinsic, nor by reference: GCC 12 then keeps the sums in memory, at half the speed
INLINE Sums with_products(Sums sum, Sums w, Sums x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}
#else
typedef __m256i Sums;
INLINE Sums all(int32_t number) { return _mm256_set1_epi32(number); }
INLINE Sums load(const OfW* from) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
}
INLINE Sums with_products(Sums sum, Sums w, Sums x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x));
}
#endif

}  // namespace screen
#endif
