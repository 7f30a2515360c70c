// Approximate products in 8-bit integers, four at a time (AVX512-VNNI).
//
// Coordinates are balanced (x_j / s_j, w_j s_j), their signs flipped at random, and rotated by a
// Hadamard matrix, none of which changes a product; no coordinate then dominates a row, so one
// scale a row loses little. With x = x^ + r and w = w^ + t, x^ and w^ on the 8-bit grids,
//   |<x, w> - <x^, w^>| <= |r| |w| + |x^| |t|      (Cauchy-Schwarz, norms of the actual roundings)
#include "screen.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>

#include <algorithm>
#include <cmath>

namespace screen {
namespace {

constexpr int64_t ROWS = 6, WIDE = 4, PANEL = 16 * WIDE;  // of the innermost product: 24 sums
constexpr int64_t BLOCK = 384;
constexpr int64_t SAMPLED = 16384;  // about how many rows give the coordinates' sizes
constexpr float NEAREST = 12582912;          // 1.5 2^23: adding it rounds to the nearest integer
constexpr float ROTATED = 1.0f / (1 << 17);  // and rotating, scaling, adding up, relative

typedef int32_t Places __attribute__((vector_size(64)));

// A row of floats as 8-bit integers times `scale`; norms are in units of `scale`.
struct Rounded {
  float scale, norm, norm_rounded, norm_error;
};

// The sixteen-point Hadamard transform of each vector, then across vectors by halves.
inline Lanes exchange(const Lanes& v, int h) {
  Places at;
  Lanes sign;
  for (int i = 0; i < 16; i++) {
    at[i] = i ^ h;
    sign[i] = i & h ? -1.0f : 1.0f;
  }
  return __builtin_shuffle(v, at) + sign * v;
}

void rotate(float* row, int64_t vectors) {
  for (int64_t v = 0; v < vectors; v++) {
    Lanes& here = lanes(row + v * LANES);
    here = exchange(exchange(exchange(exchange(here, 1), 2), 4), 8);
  }
  for (int64_t length = vectors; length > 1 && length % 2 == 0; length /= 2) {
    for (int64_t from = 0; from < vectors; from += length) {
      for (int64_t v = from; v < from + length / 2; v++) {
        Lanes &low = lanes(row + v * LANES), &high = lanes(row + (v + length / 2) * LANES);
        const Lanes sum = low + high;
        high = low - high;
        low = sum;
      }
    }
  }
}

// Rotates and rounds x factor (room for `padded` floats in work). False if it is not fit for it.
bool round_row(const float* x, const float* factor, int64_t d, int64_t padded, float* work,
               int8_t* rounded, Rounded& out) {
  for (int64_t j = 0; j < d; j++) work[j] = x[j] * factor[j];
  std::fill(work + d, work + padded, 0.0f);
  rotate(work, padded / LANES);
  Lanes most{};
  for (int64_t j = 0; j < padded; j += LANES) {
    const Lanes v = lanes(work + j), size = v < 0 ? -v : v;
    most = size <= most ? most : size;  // NaN wins
  }
  float largest = 0;
  for (int i = 0; i < LANES; i++) largest = most[i] <= largest ? largest : most[i];
  if (!fit(largest)) return false;
  const float inverse = largest > 0 ? 127 / largest : 0;
  Lanes whole{}, kept{}, lost{};
  for (int64_t j = 0; j < padded; j += LANES) {
    const Lanes v = lanes(work + j) * inverse;
    const Lanes near = (v + NEAREST) - NEAREST, error = v - near;
    whole += v * v;
    kept += near * near;
    lost += error * error;
    const __m512i whole_numbers = (__m512i)__builtin_convertvector(near, Places);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(rounded + j),
                     _mm512_maskz_cvtepi32_epi8(0xFFFF, whole_numbers));
  }
  out = {largest / 127, std::sqrt(sum_of(whole)) * SUMMED, std::sqrt(sum_of(kept)) * SUMMED,
         std::sqrt(sum_of(lost)) * SUMMED};
  return true;
}

float norm(const float* x, int64_t d) { return std::sqrt(dot(x, x, d)) * SUMMED; }

// Mean squares of the columns over an even sample of rows.
std::vector<double> mean_squares(const float* x, int64_t rows, int64_t d, int64_t sample) {
  std::vector<double> sums(d, 0.0);
  const int64_t step = std::max<int64_t>(1, rows / sample);
  std::vector<float> piece(d);
  for (int64_t r = 0; r < rows; r += step) {
    for (int64_t j = 0; j < d; j++) piece[j] = x[r * d + j] * x[r * d + j];
    for (int64_t j = 0; j < d; j++) sums[j] += piece[j];
  }
  double total = 0;
  for (double& sum : sums) total += sum;
  // a coordinate that is hardly ever used must not be blown up
  for (double& sum : sums) sum = std::max(sum, 1e-6 * total / d);
  return sums;
}

// W as 8-bit integers + 128 in panels [feature / 64][d / 4][64][4], and factors for both sides.
class Packed {
 public:
  int64_t d, padded, panels;
  std::vector<float> for_x, for_w;
  Features features;
  float widest = 0;  // the largest |w| in units of features.a
  std::unique_ptr<uint8_t[]> memory;
  uint8_t* panel(int64_t p) const { return aligned_ + p * padded * PANEL; }

  explicit Packed(const Job& job)
      : d(job.d), padded((d + 63) / 64 * 64), panels((job.features + PANEL - 1) / PANEL),
        for_x(d), for_w(d) {
    memory.reset(new uint8_t[panels * PANEL * padded + 64]);
    aligned_ = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) % 64;
    features.scale.assign(panels * PANEL, 0.0f);
    features.a = features.b = features.scale;
    balance(job);
  }

  // False if W is not fit for it, or the job's biases are not.
  bool pack(const Job& job) {
    if (!make_base(job, features, panels * PANEL)) return false;
    bool good = true;
    float most = 0;
#pragma omp parallel num_threads(job.threads) reduction(&& : good) reduction(max : most)
    {
      std::vector<float> work(padded);
      std::vector<int8_t> rounded(padded * PANEL);
#pragma omp for
      for (int64_t p = 0; p < panels; p++) {
        good = pack_panel(job, p, work.data(), rounded.data(), most) && good;
      }
    }
    widest = most;
    return good;
  }

 private:
  uint8_t* aligned_;

  void balance(const Job& job) {
    const auto x = mean_squares(job.x, job.rows, d, std::max<int64_t>(64, SAMPLED / 16));
    const auto w = mean_squares(job.W, job.features, d, std::max<int64_t>(64, SAMPLED / 16));
    int64_t length = 16;  // of the Hadamard matrix
    for (int64_t v = padded / LANES; v > 1 && v % 2 == 0; v /= 2) length *= 2;
    uint32_t random = 1;
    for (int64_t j = 0; j < d; j++) {
      double s = x[j] > 0 && w[j] > 0 ? std::pow(x[j] / w[j], 0.25) : 1.0;
      if (!std::isfinite(s) || !(s > 0)) s = 1;
      random = random * 1664525u + 1013904223u;
      const double sign = random >> 31 ? -1 : 1;
      for_x[j] = static_cast<float>(sign / s);
      for_w[j] = static_cast<float>(sign * s / static_cast<double>(length));
    }
  }

  bool pack_panel(const Job& job, int64_t p, float* work, int8_t* rounded, float& most) {
    const int64_t first = p * PANEL, n = std::min(PANEL, job.features - first);
    std::fill(rounded + n * padded, rounded + PANEL * padded, 0);
    for (int64_t i = 0; i < n; i++) {
      const float* w = job.W + (first + i) * d;
      Rounded row;
      if (!round_row(w, for_w.data(), d, padded, work, rounded + i * padded, row)) return false;
      const int64_t f = first + i;
      const float size = norm(w, d);
      features.scale[f] = row.scale;
      features.a[f] = row.scale * row.norm;
      features.b[f] = row.scale * row.norm_error;
      if (!fit(size) || (size > 0 && row.norm == 0)) return false;
      if (size > 0) most = std::max(most, size / features.a[f]);
    }
    // column by column: the writes are in order, and what is read stays in the cache
    const __m512i sign = _mm512_set1_epi32(static_cast<int32_t>(0x80808080u));
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i row = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(padded)));
    uint8_t* out = panel(p);
    for (int64_t j = 0; j < padded; j += 4) {
      for (int64_t i = 0; i < PANEL; i += 16, out += 64) {
        // all lanes: without a mask GCC 12 warns of what the intrinsic starts from
        const __m512i four =
            _mm512_mask_i32gather_epi32(sign, 0xFFFF, row, rounded + i * padded + j, 1);
        _mm512_store_si512(out, _mm512_xor_si512(four, sign));
      }
    }
    return true;
  }
};

// A block of rows as 8-bit integers.
bool round_block(const Job& job, const Packed& W, Lists& lists, int64_t first, int64_t step,
                 int64_t rows, std::vector<int8_t>& rounded, std::vector<float>& work) {
  for (int64_t r = 0; r < rows; r++) {
    const float* x = job.x + (first + r * step) * job.d;
    int8_t* q = rounded.data() + r * W.padded;
    Rounded now;
    if (!round_row(x, W.for_x.data(), W.d, W.padded, work.data(), q, now)) return false;
    int32_t sum = 0;
    for (int64_t j = 0; j < W.padded; j++) sum += q[j];
    const float size = norm(x, W.d);
    if (!fit(size)) return false;
    // rounding of the exact product itself: at most its number of additions, in units of 2^-24
    const float exact = static_cast<float>(W.d / 32 + 64) / (1 << 24) * size * W.widest;
    Row& row = lists.rows[r];
    row.scale = now.scale;
    row.a = now.scale * (now.norm_error + ROTATED * now.norm) + exact;
    row.b = now.scale * now.norm_rounded;
    row.offset = -128 * sum;
  }
  return true;
}

#define UNROLL _Pragma("GCC unroll 16")

inline void append(Row& row, __m512 u, __mmask16 passed, int64_t feature) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(feature)));
  _mm512_storeu_ps(row.u + row.count, _mm512_maskz_compress_ps(passed, u));
  _mm512_storeu_si512(row.feature + row.count, _mm512_maskz_compress_epi32(passed, index));
  row.count += __builtin_popcount(passed);
}

// Six rows times one panel of features; what reaches a row's bar is put on its list.
template <bool MAGNITUDE>
void product(const int8_t* x, const Packed& W, int64_t p, int64_t features, Row* rows) {
  __m512i sum[ROWS][WIDE];
  const uint8_t* w = W.panel(p);
  UNROLL for (int64_t r = 0; r < ROWS; r++) {
    UNROLL for (int64_t v = 0; v < WIDE; v++) sum[r][v] = _mm512_set1_epi32(rows[r].offset);
  }
  for (int64_t j = 0; j < W.padded; j += 4, w += 4 * PANEL) {
    __m512i four[WIDE];
    UNROLL for (int64_t v = 0; v < WIDE; v++) four[v] = _mm512_load_si512(w + 64 * v);
    UNROLL for (int64_t r = 0; r < ROWS; r++) {
      const __m512i mine =
          _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x + r * W.padded + j));
      UNROLL for (int64_t v = 0; v < WIDE; v++) {
        // not the intrinsic: GCC 12 then keeps the sums in memory, at half the speed
        asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][v]) : "v"(four[v]), "v"(mine));
      }
    }
  }
  const float* scale = W.features.scale.data() + p * PANEL;
  const float* base = W.features.base.data() + p * PANEL;
  const float* a = W.features.a.data() + p * PANEL;
  const float* b = W.features.b.data() + p * PANEL;
  UNROLL for (int64_t v = 0; v < WIDE; v++) {
    const int64_t first = p * PANEL + 16 * v;
    const auto valid = static_cast<__mmask16>(
        features - first >= 16 ? 0xFFFF : (1u << std::max<int64_t>(0, features - first)) - 1);
    const Lanes scales = lanes(scale + 16 * v), bases = lanes(base + 16 * v);
    const Lanes as = lanes(a + 16 * v), bs = lanes(b + 16 * v);
    UNROLL for (int64_t r = 0; r < ROWS; r++) {
      Lanes u = __builtin_convertvector((Places)sum[r][v], Lanes) * scales;
      u = u * rows[r].scale + bases;
      if (MAGNITUDE) u = u < 0 ? -u : u;
      u = u + as * rows[r].a;
      u = u + bs * rows[r].b;
      const __mmask16 passed =
          _mm512_mask_cmp_ps_mask(valid, u, _mm512_set1_ps(rows[r].tau), _CMP_GE_OQ);
      if (passed) append(rows[r], u, passed, first);
    }
  }
}

template <bool MAGNITUDE>
void collect(const Job& job, const Packed& W, Lists& lists, const int8_t* x, int64_t rows) {
  constexpr int64_t PANELS = STRIP / PANEL;
  Row last[ROWS];  // rows beyond the block's end: nothing passes
  for (Row& row : last) row = Row{}, row.tau = NAN;
  const int64_t whole = rows / ROWS * ROWS;
  std::copy(&lists.rows[0] + whole, &lists.rows[0] + rows, last);
  for (int64_t strip = 0; strip < W.panels; strip += PANELS) {
    const int64_t end = std::min(strip + PANELS, W.panels);
    std::copy(&lists.rows[0] + whole, &lists.rows[0] + rows, last);
    for (int64_t p = strip; p < end; p++) {
      for (int64_t r = 0; r < whole; r += ROWS) {
        product<MAGNITUDE>(x + r * W.padded, W, p, job.features, &lists.rows[r]);
      }
      if (whole < rows) product<MAGNITUDE>(x + whole * W.padded, W, p, job.features, last);
    }
    std::copy(last, last + (rows - whole), &lists.rows[0] + whole);
    look(job, W.features, lists, rows, end == W.panels);
  }
}

}  // namespace
}  // namespace screen

EXPORT int screen_int8_usable() { return 1; }

// Encodes with approximate products in 8-bit integers.
EXPORT void screen_int8(screen::Job* job) {
  using namespace screen;
  Packed W(*job);
  if (!W.pack(*job)) {
    job->status = UNFIT;
    return;
  }
  const int64_t share = (job->rows + job->threads - 1) / job->threads;
  const int64_t pieces = (share + BLOCK - 1) / BLOCK;
  const int64_t block = ((share + pieces - 1) / pieces + ROWS - 1) / ROWS * ROWS;
  run(*job, block, [&](Lists& lists, int64_t first, int64_t step, int64_t rows) {
    lists.reset(*job);
    std::vector<int8_t> x((rows + ROWS - 1) / ROWS * ROWS * W.padded);
    std::vector<float> work(W.padded);
    if (!round_block(*job, W, lists, first, step, rows, x, work)) return false;
    if (job->by_magnitude) {
      collect<true>(*job, W, lists, x.data(), rows);
    } else {
      collect<false>(*job, W, lists, x.data(), rows);
    }
    return true;
  });
}

#else

EXPORT int screen_int8_usable() { return 0; }

EXPORT void screen_int8(screen::Job* job) { job->status = screen::UNFIT; }

#endif
