// Sixteen floats at a time, in vectors as wide as the processor's.
//
// GCC keeps vectors of 64 bytes in memory where the processor's are narrower, at a quarter of the
// speed; so they are as many as it takes. A sum has the same order whatever the width: what lane i
// of sixteen adds up is the same.
#pragma once
#include <cstdint>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// no vector crosses the library's boundary, so how one would does not matter
#pragma GCC diagnostic ignored "-Wpsabi"

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

constexpr int64_t LANES = 16;
constexpr int WIDTH = VECTOR_BYTES / sizeof(float), VECTORS = LANES / WIDTH;

// aligned(4): rows start anywhere; may_alias: they are arrays of float
typedef float Vector __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int32_t Whole __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));

typedef float Four __attribute__((vector_size(16), aligned(4)));

// Four of the eight floats of two vectors.
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t FourWhole __attribute__((vector_size(16)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, FourWhole{__VA_ARGS__})
#endif

struct __attribute__((may_alias)) Lanes {
  Vector part[VECTORS];

  INLINE float operator[](int64_t i) const { return part[i / WIDTH][i % WIDTH]; }
};

#define EACH_PART UNROLL for (int v = 0; v < VECTORS; v++)

INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
  Lanes out;
  EACH_PART out.part[v] = a.part[v] + b.part[v];
  return out;
}

INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
  Lanes out;
  EACH_PART out.part[v] = a.part[v] - b.part[v];
  return out;
}

INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
  Lanes out;
  EACH_PART out.part[v] = a.part[v] * b.part[v];
  return out;
}

INLINE Lanes operator*(const Lanes& a, float b) {
  Lanes out;
  EACH_PART out.part[v] = a.part[v] * b;
  return out;
}

INLINE Lanes operator*(float a, const Lanes& b) { return b * a; }

INLINE Lanes operator+(const Lanes& a, float b) {
  Lanes out;
  EACH_PART out.part[v] = a.part[v] + b;
  return out;
}

INLINE Lanes operator-(const Lanes& a, float b) { return a + -b; }

INLINE Lanes& operator+=(Lanes& a, const Lanes& b) {
  EACH_PART a.part[v] += b.part[v];
  return a;
}

// a where it is smaller (larger), otherwise b: what is not a number is no smaller.
INLINE Lanes smaller(const Lanes& a, const Lanes& b) {
  Lanes out;
  EACH_PART out.part[v] = a.part[v] < b.part[v] ? a.part[v] : b.part[v];
  return out;
}

INLINE Lanes larger(const Lanes& a, const Lanes& b) {
  Lanes out;
  EACH_PART out.part[v] = a.part[v] > b.part[v] ? a.part[v] : b.part[v];
  return out;
}

INLINE Lanes magnitude_of(const Lanes& a) {
  Lanes out;
  EACH_PART out.part[v] = reinterpret_cast<Vector>(reinterpret_cast<Whole>(a.part[v]) & 0x7fffffff);
  return out;
}

INLINE Lanes& lanes(float* at) { return *reinterpret_cast<Lanes*>(at); }
INLINE const Lanes& lanes(const float* at) { return *reinterpret_cast<const Lanes*>(at); }

#ifndef __AVX512F__
// A bit for each lane of a comparison of two vectors; AVX-512 compares to bits.
INLINE uint32_t bits_of(const Whole& test) {
#if defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(test)));
#elif defined(__SSE2__)
  return static_cast<uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(test)));
#elif defined(__aarch64__)
  const uint32x4_t bit = {1, 2, 4, 8};
  return vaddvq_u32(vandq_u32(reinterpret_cast<uint32x4_t>(test), bit));
#else
  uint32_t bits = 0;
  for (int i = 0; i < WIDTH; i++) bits |= (test[i] & 1u) << i;
  return bits;
#endif
}
#endif

// A bit for each lane that is at least the bar.
INLINE uint32_t reaching(const Lanes& given, float bar) {
#ifdef __AVX512F__
  return _mm512_cmp_ps_mask((__m512)given.part[0], _mm512_set1_ps(bar), _CMP_GE_OQ);
#else
  uint32_t bits = 0;
  EACH_PART bits |= bits_of(given.part[v] >= bar) << (v * WIDTH);
  return bits;
#endif
}

// The sum of sixteen floats, by halves.
inline float sum_of(const Lanes& given) {
  float half[8];
  for (int i = 0; i < 8; i++) half[i] = given[i] + given[i + 8];
  for (int i = 0; i < 4; i++) half[i] += half[i + 4];
  return (half[0] + half[2]) + (half[1] + half[3]);
}
