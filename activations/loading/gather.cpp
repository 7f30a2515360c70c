// Rows of an array by their places, as they are or turned to what batches are made of.
#include <cstdint>
#include <cstring>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t LINE = 64;  // bytes that memory is written by

// A line past the caches, without reading what it overwrites: a batch is not read again before
// others have taken its place there.
inline void put(void* to, const void* line) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), _mm512_load_si512(line));
#elif defined(__SSE2__)
  for (int i = 0; i < 4; i++)
    _mm_stream_si128(static_cast<__m128i*>(to) + i,
                     _mm_load_si128(static_cast<const __m128i*>(line) + i));
#else
  std::memcpy(to, line, LINE);
#endif
}

// What was put is there for other threads after this.
inline void settle() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <typename To, typename From>
To bits_of(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "as many bits");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Same {
  template <typename T>
  T operator()(T given, float) const { return given; }
};

struct OfBfloat16 {
  float operator()(uint16_t given, float) const { return bits_of<float>(uint32_t(given) << 16); }
};

struct Scaled {
  float operator()(int8_t given, float scale) const { return float(given) * scale; }
};

// To the nearest bfloat16, ties to the even one; what is given is finite.
struct ScaledBfloat16 {
  uint16_t operator()(int8_t given, float scale) const {
    const uint32_t bits = bits_of<uint32_t>(float(given) * scale);
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

template <typename From, typename To, typename Turn>
void take(const void* rows, const float* scale, const int64_t* places, int64_t count,
          int64_t width, void* out, Turn turn) {
  constexpr int64_t BLOCK = 64, STEP = LINE / int64_t(sizeof(To));  // compilers make vectors of 64
  const bool lines = width % STEP == 0 && reinterpret_cast<uintptr_t>(out) % LINE == 0;
  const int64_t blocks = lines ? width / BLOCK * BLOCK : 0;
  for (int64_t i = 0; i < count; i++) {
    const From* from = static_cast<const From*>(rows) + places[i] * width;
    To* to = static_cast<To*>(out) + i * width;
    const float factor = scale ? scale[places[i]] : 1.0f;
    for (int64_t at = 0; at < blocks; at += BLOCK) {
      alignas(LINE) To turned[BLOCK];
      for (int64_t j = 0; j < BLOCK; j++) turned[j] = turn(from[at + j], factor);
      for (int64_t j = 0; j < BLOCK; j += STEP) put(to + at + j, turned + j);
    }
    for (int64_t at = blocks; at < width; at++) to[at] = turn(from[at], factor);
  }
  settle();
}

}  // namespace

// rows [n, width], scale [n] or null, places [count], out [count, width]
#define TAKE(name, From, To, Turn)                                                        \
  EXPORT void name(const void* rows, const float* scale, const int64_t* places,           \
                   int64_t count, int64_t width, void* out) {                             \
    take<From, To>(rows, scale, places, count, width, out, Turn());                       \
  }

TAKE(gather_uint16, uint16_t, uint16_t, Same)
TAKE(gather_int8, int8_t, int8_t, Same)
TAKE(gather_bfloat16_as_float32, uint16_t, float, OfBfloat16)
TAKE(gather_int8_as_float32, int8_t, float, Scaled)
TAKE(gather_int8_as_bfloat16, int8_t, uint16_t, ScaledBfloat16)
