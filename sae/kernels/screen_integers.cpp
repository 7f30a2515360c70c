// Approximate products in integers: of 8 bits, four at a time (AVX512-VNNI), or of up to 16 bits,
// two at a time (AVX2), on a grid as fine as sums of 32 bits allow.
//
// Coordinates are balanced (x_j / s_j, w_j s_j), their signs flipped at random, and rotated by a
// Hadamard matrix, none of which changes a product; no coordinate then dominates a row, so one
// scale a row loses little. With x = x^ + r and w = w^ + t, x^ and w^ on the grids,
//   |<x, w> - <x^, w^>| <= |r| |w| + |x^| |t|      (Cauchy-Schwarz, norms of the actual roundings)
#include "screen_numbers.h"

#ifdef SCREENS_BY_INTEGERS
#include <algorithm>
#include <cmath>
#include <cstring>

#include "threads.h"

namespace screen {
namespace {

constexpr int64_t SAMPLED = 16384;  // about how many rows give the coordinates' sizes
constexpr float NEAREST = 12582912;          // 1.5 2^23: adding it rounds to the nearest integer
constexpr float ROTATED = 1.0f / (1 << 17);  // and rotating, scaling, adding up, relative

// The largest number of a grid: a sum of d products of two such has 32 bits.
float largest_of(int64_t d) {
  if (BITS == 8) return 127;
  return static_cast<float>(std::min(32767.0, std::floor(std::sqrt(2147483647.0 / d))));
}

// A row of floats as integers times `scale`; norms are in units of `scale`.
struct Rounded {
  float scale, norm, norm_rounded, norm_error;
};

// The sixteen-point Hadamard transform of each vector, then across vectors by halves.
INLINE Lanes exchange(const Lanes& given, int h) {
  Lanes sign;
  EACH_PART {
    for (int i = 0; i < WIDTH; i++) sign.part[v][i] = (v * WIDTH + i) & h ? -1.0f : 1.0f;
  }
  return exchanged(given, h) + sign * given;
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
               Number* rounded, Rounded& out) {
  for (int64_t j = 0; j < d; j++) work[j] = x[j] * factor[j];
  std::fill(work + d, work + padded, 0.0f);
  rotate(work, padded / LANES);
  Lanes most{};
  for (int64_t j = 0; j < padded; j += LANES) {
    const Lanes size = magnitude_of(lanes(work + j));
    EACH_PART most.part[v] = size.part[v] <= most.part[v] ? most.part[v] : size.part[v];  // NaN wins
  }
  float largest = 0;
  for (int i = 0; i < LANES; i++) largest = most[i] <= largest ? largest : most[i];
  if (!fit(largest)) return false;
  const float end = largest_of(padded), inverse = largest > 0 ? end / largest : 0;
  Lanes whole{}, kept{}, lost{};
  for (int64_t j = 0; j < padded; j += LANES) {
    const Lanes given = lanes(work + j) * inverse;
    const Lanes near = (given + NEAREST) - NEAREST, error = given - near;
    whole += given * given;
    kept += near * near;
    lost += error * error;
    put(near, rounded + j);
  }
  out = {largest / end, std::sqrt(sum_of(whole)) * SUMMED, std::sqrt(sum_of(kept)) * SUMMED,
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

// W in panels [feature / PANEL][d / TOGETHER][PANEL][TOGETHER], and factors for both sides.
class Packed {
 public:
  int64_t d, padded, panels;
  std::vector<float> for_x, for_w;
  Features features;
  float widest = 0;  // the largest |w| in units of features.a
  std::unique_ptr<OfW[]> memory;
  OfW* panel(int64_t p) const { return aligned_ + p * padded * PANEL; }

  explicit Packed(const Job& job)
      : d(job.d), padded((d + 63) / 64 * 64), panels((job.features + PANEL - 1) / PANEL),
        for_x(d), for_w(d) {
    memory.reset(new OfW[panels * PANEL * padded + 64]);
    const auto beyond = reinterpret_cast<uintptr_t>(memory.get()) % 64;
    aligned_ = memory.get() + (64 - beyond) % 64 / sizeof(OfW);
    features.scale.assign(panels * PANEL, 0.0f);
    features.a = features.b = features.scale;
    balance(job);
  }

  // False if W is not fit for it, or the job's biases are not.
  bool pack(const Job& job) {
    if (!make_base(job, features, panels * PANEL)) return false;
    std::atomic<bool> good{true};
    std::vector<float> most(job.threads, 0.0f);  // of each thread
    Tasks tasks(panels);
    in_parallel(job.threads, [&](int64_t thread, int64_t) {
      std::vector<float> work(padded);
      std::vector<Number> rounded(padded * PANEL);
      float mine = 0;
      tasks.each([&](int64_t p) {
        if (!pack_panel(job, p, work.data(), rounded.data(), mine)) good = false;
      });
      most[thread] = mine;
    });
    widest = *std::max_element(most.begin(), most.end());
    return good;
  }

 private:
  OfW* aligned_;

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

  bool pack_panel(const Job& job, int64_t p, float* work, Number* rounded, float& most) {
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
    OfW* out = panel(p);
    for (int64_t j = 0; j < padded; j += TOGETHER) {
#ifdef __AVX512VNNI__
      const __m512i sign = _mm512_set1_epi32(static_cast<int32_t>(0x80808080u));
      const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      const __m512i row = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(padded)));
      for (int64_t i = 0; i < PANEL; i += 16, out += 64) {
        // all lanes: without a mask GCC 12 warns of what the intrinsic starts from
        const __m512i four =
            _mm512_mask_i32gather_epi32(sign, 0xFFFF, row, rounded + i * padded + j, 1);
        _mm512_store_si512(out, _mm512_xor_si512(four, sign));
      }
#else
      for (int64_t i = 0; i < PANEL; i++, out += TOGETHER)
        std::memcpy(out, rounded + i * padded + j, TOGETHER * sizeof(Number));
#endif
    }
    return true;
  }
};

// A block of rows as integers.
bool round_block(const Job& job, const Packed& W, Lists& lists, int64_t first, int64_t step,
                 int64_t rows, std::vector<Number>& rounded, std::vector<float>& work) {
  for (int64_t r = 0; r < rows; r++) {
    const float* x = job.x + (first + r * step) * job.d;
    Number* q = rounded.data() + r * W.padded;
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
    row.offset = -SHIFT * sum;
  }
  return true;
}

// Appends the lanes of u, features from `first` on, whose bit is set.
INLINE void append(Row& row, const Lanes& u, uint32_t passed, int64_t first) {
#ifdef __AVX512F__
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i index = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int32_t>(first)));
  const auto mask = static_cast<__mmask16>(passed);
  _mm512_storeu_ps(row.u + row.count, _mm512_maskz_compress_ps(mask, (__m512)u.part[0]));
  _mm512_storeu_si512(row.feature + row.count, _mm512_maskz_compress_epi32(mask, index));
  row.count += __builtin_popcount(passed);
#else
  float values[LANES];
  lanes(values) = u;
  for (; passed; passed &= passed - 1) {
    const int i = __builtin_ctz(passed);
    row.u[row.count] = values[i];
    row.feature[row.count++] = static_cast<int32_t>(first + i);
  }
#endif
}

// ROWS rows times one panel of features; what reaches a row's bar is put on its list.
template <bool MAGNITUDE>
void product(const Number* x, const Packed& W, int64_t p, int64_t features, Row* rows) {
  Sums sum[ROWS][WIDE];
  const OfW* w = W.panel(p);
  UNROLL for (int64_t r = 0; r < ROWS; r++) {
    UNROLL for (int64_t v = 0; v < WIDE; v++) sum[r][v] = all(rows[r].offset);
  }
  for (int64_t j = 0; j < W.padded; j += TOGETHER, w += TOGETHER * PANEL) {
    Sums of_w[WIDE];
    UNROLL for (int64_t v = 0; v < WIDE; v++) of_w[v] = load(w + TOGETHER * WIDTH * v);
    UNROLL for (int64_t r = 0; r < ROWS; r++) {
      int32_t mine;
      std::memcpy(&mine, x + r * W.padded + j, sizeof mine);
      const Sums of_x = all(mine);
      UNROLL for (int64_t v = 0; v < WIDE; v++) sum[r][v] = with_products(sum[r][v], of_w[v], of_x);
    }
  }
  const float* scale = W.features.scale.data() + p * PANEL;
  const float* base = W.features.base.data() + p * PANEL;
  const float* a = W.features.a.data() + p * PANEL;
  const float* b = W.features.b.data() + p * PANEL;
  UNROLL for (int64_t q = 0; q < PANEL / LANES; q++) {
    const int64_t first = p * PANEL + LANES * q, left = features - first;
    const uint32_t valid = left >= LANES ? 0xFFFF : (1u << std::max<int64_t>(0, left)) - 1;
    const Lanes scales = lanes(scale + LANES * q), bases = lanes(base + LANES * q);
    const Lanes as = lanes(a + LANES * q), bs = lanes(b + LANES * q);
    UNROLL for (int64_t r = 0; r < ROWS; r++) {
      Lanes u;
      EACH_PART u.part[v] = __builtin_convertvector((Whole)sum[r][q * VECTORS + v], Vector);
      u = u * scales * rows[r].scale + bases;
      if (MAGNITUDE) u = magnitude_of(u);
      u = u + as * rows[r].a;
      u = u + bs * rows[r].b;
      const uint32_t passed = reaching(u, rows[r].tau) & valid;
      if (passed) append(rows[r], u, passed, first);
    }
  }
}

template <bool MAGNITUDE>
void collect(const Job& job, const Packed& W, Lists& lists, const Number* x, int64_t rows) {
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

// How many bits the integers have.
EXPORT int screen_integers_bits() { return screen::BITS; }

// Encodes with approximate products in integers.
EXPORT void screen_integers(screen::Job* job) {
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
    std::vector<Number> x((rows + ROWS - 1) / ROWS * ROWS * W.padded);
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

EXPORT int screen_integers_bits() { return 0; }

EXPORT void screen_integers(screen::Job* job) { job->status = screen::UNFIT; }

#endif
