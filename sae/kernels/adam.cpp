// The optimiser's step: each row is read once from memory, and all that is done to it is done while
// it is in the cache. A row is summed by one thread in a fixed order, so results do not depend on
// the number of threads.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "threads.h"

namespace {

constexpr int64_t kLanes = 8;     // doubles summed at a time
constexpr int64_t kSums = 4;       // independent sums, so that additions overlap
constexpr int64_t kBlock = 4096;   // "row" of a parameter without rows of its own
constexpr int64_t kSmall = 32768;  // elements up to which a second thread costs more than it gives

// Moments of features that get no gradient decay until they are denormal, where arithmetic is a
// hundred times slower; within a kernel such numbers are 0.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
};

// Eight doubles, in vectors as wide as the processor's.
constexpr int kWidth = VECTOR_BYTES / sizeof(double), kParts = kLanes / kWidth;
typedef float Floats __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef double Part __attribute__((vector_size(VECTOR_BYTES)));

struct Doubles {
  Part part[kParts];
  double operator[](int i) const { return part[i / kWidth][i % kWidth]; }
};

#define EACH UNROLL for (int v = 0; v < kParts; v++)

INLINE Doubles load(const float *from) {
  Doubles out;
  EACH {
#if defined(__AVX512F__)  // GCC 12 makes six instructions of what is below
    out.part[v] = (Part)_mm512_maskz_cvtps_pd(0xFF, _mm256_loadu_ps(from));
#else
    Floats values;
    std::memcpy(&values, from + v * kWidth, sizeof values);
    out.part[v] = __builtin_convertvector(values, Part);
#endif
  }
  return out;
}

INLINE void add_product(Doubles &sum, const Doubles &a, const Doubles &b) {
  EACH sum.part[v] += a.part[v] * b.part[v];
}

INLINE Doubles operator+(const Doubles &a, const Doubles &b) {
  Doubles sum;
  EACH sum.part[v] = a.part[v] + b.part[v];
  return sum;
}

inline double sum_of(const Doubles &all) {
  return ((all[0] + all[1]) + (all[2] + all[3])) + ((all[4] + all[5]) + (all[6] + all[7]));
}

// Sums over n values a, b: of a b, and if asked those of a a and b b.
struct Products {
  double ab, aa, bb;
};

template <bool SQUARES>
inline Products products(const float *a, const float *b, int64_t n) {
  Doubles ab[kSums] = {}, aa[kSums] = {}, bb[kSums] = {};
  const auto add = [&](const Doubles &of_a, const Doubles &of_b, int64_t s) {
    add_product(ab[s], of_a, of_b);
    if (SQUARES) {
      add_product(aa[s], of_a, of_a);
      add_product(bb[s], of_b, of_b);
    }
  };
  int64_t i = 0;
  for (; i + kSums * kLanes <= n; i += kSums * kLanes)
    for (int64_t s = 0; s < kSums; ++s) add(load(a + i + s * kLanes), load(b + i + s * kLanes), s);
  for (; i < n; i += kLanes) {
    const size_t left = static_cast<size_t>(std::min(kLanes, n - i)) * sizeof(float);
    float of_a[kLanes] = {}, of_b[kLanes] = {};
    std::memcpy(of_a, a + i, left);
    std::memcpy(of_b, b + i, left);
    add(load(of_a), load(of_b), 0);
  }
  const auto total = [](const Doubles(&of)[kSums]) {
    return sum_of((of[0] + of[1]) + (of[2] + of[3]));
  };
  return {total(ab), SQUARES ? total(aa) : 0, SQUARES ? total(bb) : 0};
}

inline double dot(const float *a, const float *b, int64_t n) {
  return products<false>(a, b, n).ab;
}

struct Constants {
  float one_minus_beta1, beta2, one_minus_beta2, eps, step_size, root_correction, scale;
};

// Adam on n values; the gradient is (grad - along * p) * scale.
inline void adam(float *__restrict p, const float *__restrict grad, float *__restrict m,
                 float *__restrict v, int64_t n, float along, const Constants &c) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float g = (grad[i] - along * p[i]) * c.scale;
    const float mean = m[i] + c.one_minus_beta1 * (g - m[i]);
    const float square = c.beta2 * v[i] + c.one_minus_beta2 * (g * g);
    m[i] = mean;
    v[i] = square;
    p[i] -= c.step_size * mean / (std::sqrt(square) * c.root_correction + c.eps);
  }
}

inline void scale_row(float *p, int64_t n, float factor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] *= factor;
}

inline int64_t blocks(int64_t total, int64_t width) { return (total + width - 1) / width; }

}  // namespace

// Squared norm of grad [total]; with unit (rows of `width`, each of norm 1) of what is left of it
// when each row's part along the unit row is taken away.
EXPORT double saescope_gradient_square(const float *grad, const float *unit, int64_t total,
                                       int64_t width, int threads) {
  if (unit == nullptr) width = kBlock;
  const int64_t rows = width > 0 ? blocks(total, width) : 0;
  std::vector<double> squares(static_cast<size_t>(rows));
  in_parallel(total > kSmall ? threads : 1, [&](int64_t thread, int64_t of) {
    const FlushDenormals flush;
    for (int64_t r = rows * thread / of; r < rows * (thread + 1) / of; ++r) {
      const float *g = grad + r * width;
      const int64_t n = std::min(width, total - r * width);
      double square;
      if (unit == nullptr) {
        square = dot(g, g, n);
      } else {  // |g - (g.w) w|^2, with a w that is of norm 1 but for rounding
        const Products sums = products<true>(g, unit + r * width, n);
        square = std::max(sums.aa - sums.ab * sums.ab * (2 - sums.bb), 0.0);  // NaN stays
      }
      squares[static_cast<size_t>(r)] = square;
    }
  });
  double sum = 0.0;
  for (const double each : squares) sum += each;
  return sum;
}

// One step of Adam on p [total]. unit_rows: rows of `width` have norm 1 before and after, and their
// gradient is taken without its part along them. step_size is lr / (1 - beta1^t), root_correction
// (1 - beta2^t)^-1/2.
EXPORT void saescope_adam(float *p, const float *grad, float *m, float *v, int64_t total,
                          int64_t width, int unit_rows, double beta1, double beta2, double eps,
                          double step_size, double root_correction, double scale, int threads) {
  const Constants constants = {
      static_cast<float>(1 - beta1),       static_cast<float>(beta2),
      static_cast<float>(1 - beta2),       static_cast<float>(eps),
      static_cast<float>(step_size),       static_cast<float>(root_correction),
      static_cast<float>(scale)};
  if (!unit_rows) width = kBlock;
  const int64_t rows = width > 0 ? blocks(total, width) : 0;
  in_parallel(total > kSmall ? threads : 1, [&](int64_t thread, int64_t of) {
    const FlushDenormals flush;
    for (int64_t r = rows * thread / of; r < rows * (thread + 1) / of; ++r) {
      const int64_t at = r * width, n = std::min(width, total - at);
      const float along = unit_rows ? static_cast<float>(dot(grad + at, p + at, n)) : 0.0f;
      adam(p + at, grad + at, m + at, v + at, n, along, constants);
      if (unit_rows) {
        const double norm = std::sqrt(dot(p + at, p + at, n));
        if (norm > FLT_MIN) scale_row(p + at, n, static_cast<float>(1.0 / norm));
      }
    }
  });
}
