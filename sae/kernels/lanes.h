// Sixteen floats at a time. GCC and Clang lower this to whatever vectors the processor has.
#pragma once
#include <cstdint>

#define EXPORT extern "C" __attribute__((visibility("default")))

// aligned(4): rows start anywhere; may_alias: they are arrays of float
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t LANES = 16;

inline Lanes& lanes(float* at) { return *reinterpret_cast<Lanes*>(at); }
inline const Lanes& lanes(const float* at) { return *reinterpret_cast<const Lanes*>(at); }

// The sum of sixteen floats, by halves.
inline float sum_of(const Lanes& given) {
  float half[8];
  for (int i = 0; i < 8; i++) half[i] = given[i] + given[i + 8];
  for (int i = 0; i < 4; i++) half[i] += half[i + 4];
  return (half[0] + half[2]) + (half[1] + half[3]);
}
