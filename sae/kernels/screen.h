// Exact encoding through an approximate product: what its parts share.
//
// Every pre-activation v has an upper bound u = approximation + error bound. A row's list collects
// the features whose u reaches the row's bar. While a row's k best are sought the bar is a guess,
// raised as features come in; the certificate is taken at the end: the k-th largest exact value of
// the list is no smaller than the bar, so nothing that was left out is among the k largest. A row
// without it is done again with all features.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "lanes.h"

namespace screen {

enum Status : int32_t { DONE = 0, TOO_MANY = 1, UNFIT = 2 };  // UNFIT: not finite, or too large

// One call; mirrored by `_Job` in screen.py.
struct Job {
  const float *x, *W, *b, *threshold;  // [rows, d], [features, d], [features] or null (both)
  const void* scores;                  // approximate x W^T, if it was made outside
  const float *row_bounds, *feature_bounds;  // with it: [rows, 2], [features, 2]; see Row, Features
  int64_t *row_ptr, *index;                  // k = 0: [rows + 1]; otherwise index [rows, k]
  float* value;                              // [rows, k]
  void* entries;                             // k = 0: what screen_take takes
  float* upper;                              // if given, [rows, features]: only bounds are wanted
  int64_t rows, d, features, k;              // k = 0: all above the threshold
  int64_t candidates;                        // exact products that were taken
  double limit;                              // mean candidates a row that pay; 0: any number
  double deviations;                         // how cautious a row's first bar is; see tighten
  int32_t by_magnitude, half, threads, status;  // half: scores are bfloat16
};

// An approximation without its bias is off by at most row.a feature.a + row.b feature.b.
struct Features {
  std::vector<float> scale, base, a, b;  // base: the bias, less the threshold if there is one
};

struct Row {
  float scale, a, b;
  float bar, tau;     // tau: the bar, less what rounding u may have cost
  int32_t offset;     // where the integer sum starts
  int32_t count, watermark;
  bool overflown;
  float* u;           // upper bounds, later exact values
  int32_t* feature;
};

// Copies the pairs whose u reaches a bar, in order (to the same place, if so wanted); how many.
// Writes up to SPARE more.
inline int32_t sieve(const float* u, const int32_t* feature, int32_t n, float bar, float* u_out,
                     int32_t* feature_out) {
  int32_t kept = 0, i = 0;
#ifdef __AVX512F__
  for (; i + 16 <= n; i += 16) {
    const __m512 now = _mm512_loadu_ps(u + i);
    const __m512i which = _mm512_loadu_si512(feature + i);
    const __mmask16 passed = _mm512_cmp_ps_mask(now, _mm512_set1_ps(bar), _CMP_GE_OQ);
    _mm512_storeu_ps(u_out + kept, _mm512_maskz_compress_ps(passed, now));
    _mm512_storeu_si512(feature_out + kept, _mm512_maskz_compress_epi32(passed, which));
    kept += __builtin_popcount(passed);
  }
#endif
  for (; i < n; i++) {
    const bool passed = u[i] >= bar;
    u_out[kept] = u[i];
    feature_out[kept] = feature[i];
    kept += passed;
  }
  return kept;
}

// The candidates of a block of rows.
struct Lists {
  Lists(const Job& job, int64_t rows);
  void reset(const Job& job);
  std::vector<Row> rows;
  int64_t capacity;
  std::unique_ptr<float[]> u;
  std::unique_ptr<int32_t[]> feature;
  std::vector<float> sure;  // values that one row's candidates surely have
};

// The product whose values are returned: always summed in this order.
float dot(const float* x, const float* w, int64_t d);

// Memory that is kept from use to use, and is not filled with anything.
template <class T>
class Room {
 public:
  T* of(int64_t n) {
    if (n > size_) {
      memory_.reset(new T[n]);
      size_ = n;
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
  int64_t size_ = 0;
};

// The candidates of some rows of x, one thread's, that are done together.
class Pool {
 public:
  std::vector<int64_t> row, start;  // start [rows + 1]: where each row's candidates begin
  std::vector<float> bar;
  std::vector<bool> overflown;  // rows that have none, since there were too many
  std::vector<int32_t> feature;
  const float* value = nullptr;  // exact, after `rescore`

  Pool() { clear(); }
  void clear();
  bool full() const;
  void add(const Row& list, int64_t at);
  void rescore(const Job& job);

 private:
  void deal(int64_t features);
  void add_slice(const float* x, const float* W, int64_t distance);
  std::vector<int32_t> first_, last_;  // [features]: where each one's pairs are
  int64_t places_ = 0;                 // for the pairs, and some between features
  Room<int32_t> source_, feature_of_;  // rows of the pairs; features, one for each GROUP of them
  Room<float> sum_, tile_, value_;
};

// Whether a row of this size has squares, and products with others, that floats hold well.
inline bool fit(float size) { return size == 0 || (size >= 1e-15f && size <= 1e15f); }

constexpr float HALF_ROUNDING = 1.0f / 256;  // storing a number as bfloat16, relative
constexpr float SUMMED = 1 + 1.0f / 1024;            // what adding up squares may lose, relative

constexpr int64_t STRIP = 512;  // features between two looks at the lists
constexpr int64_t SPARE = 16;   // appending writes whole vectors

// Row i of what is collected is row first + i step of x. False if x is unfit.
using Collect = std::function<bool(Lists&, int64_t first, int64_t step, int64_t rows)>;

// Collects and settles all rows, after a trial on a sample of them if there is a limit.
void run(Job& job, int64_t block, const Collect& collect);

// Raises the bar where a list has become long; `last`: after the last feature.
void look(const Job& job, const Features& features, Lists& lists, int64_t rows, bool last);

// Biases less thresholds, padded. False if a bias is not finite.
bool make_base(const Job& job, Features& features, int64_t padded);

}  // namespace screen
