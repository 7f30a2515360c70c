// Exact encoding through approximate products that were made elsewhere, in bfloat16 or float32.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "screen.h"
#include "threads.h"

namespace screen {
namespace {

inline float from_half(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Sixty-four bounds of a row from its scores.
template <bool HALF>
void bounds(const Job& job, const Features& features, const Row& row, const void* scores,
            int64_t first, int64_t n, float* u) {
  for (int64_t i = 0; i < n; i++) {
    float score = HALF ? from_half(static_cast<const uint16_t*>(scores)[i])
                       : static_cast<const float*>(scores)[i];
    const float stored = HALF ? HALF_ROUNDING * std::fabs(score) : 0;
    score += features.base[first + i];
    if (job.by_magnitude) score = std::fabs(score);
    u[i] = score + stored + (row.a * features.a[first + i] + row.b * features.b[first + i]);
  }
}

template <bool HALF>
void collect_scores(const Job& job, const Features& features, Lists& lists, int64_t at,
                    int64_t rows, int64_t step) {
  lists.reset(job);
  const auto* scores = static_cast<const char*>(job.scores);
  for (int64_t r = 0; r < rows; r++) {
    const int64_t mine = at + r * step;
    lists.rows[r].a = job.row_bounds[2 * mine];
    lists.rows[r].b = job.row_bounds[2 * mine + 1];
  }
  constexpr int64_t WIDTH = 64;
  for (int64_t strip = 0; strip < job.features; strip += STRIP) {
    const int64_t end = std::min(strip + STRIP, job.features);
    for (int64_t r = 0; r < rows; r++) {
      Row& row = lists.rows[r];
      const char* mine = scores + (at + r * step) * job.features * (HALF ? 2 : 4);
      for (int64_t f = strip; f < end; f += WIDTH) {
        const int64_t n = std::min(WIDTH, end - f);
        float u[WIDTH];
        bounds<HALF>(job, features, row, mine + f * (HALF ? 2 : 4), f, n, u);
        bool any = false;
        for (int64_t i = 0; i < n; i++) any |= u[i] >= row.tau;
        if (!any) continue;
        for (int64_t i = 0; i < n; i++) {
          row.u[row.count] = u[i];
          row.feature[row.count] = static_cast<int32_t>(f + i);
          row.count += u[i] >= row.tau;
        }
      }
    }
    look(job, features, lists, rows, end == job.features);
  }
}

}  // namespace
}  // namespace screen

// Encodes with the scores given, approximate products made elsewhere.
EXPORT void screen_scores(screen::Job* job) {
  using namespace screen;
  Features features;
  if (!make_base(*job, features, job->features)) {
    job->status = UNFIT;
    return;
  }
  features.a.resize(job->features);
  features.b.resize(job->features);
  for (int64_t f = 0; f < job->features; f++) {
    features.a[f] = job->feature_bounds[2 * f];
    features.b[f] = job->feature_bounds[2 * f + 1];
  }
  const int64_t block = std::max<int64_t>(1, (job->rows + job->threads - 1) / job->threads);
  run(*job, block, [&](Lists& lists, int64_t first, int64_t step, int64_t rows) {
    if (job->half) {
      collect_scores<true>(*job, features, lists, first, rows, step);
    } else {
      collect_scores<false>(*job, features, lists, first, rows, step);
    }
    return true;
  });
}

// Bounds for the product of rows x that were rounded to `half` (bfloat16; null: not rounded):
// out [rows, 2] is, for one side, the norm of what rounding took and the norm of what it left; for
// the other (`weights`) the norm and that of what rounding took. False if not finite.
EXPORT int screen_bounds(const float* x, const uint16_t* half, int64_t rows, int64_t d, int weights,
                         float* out, int threads) {
  using namespace screen;
  // of adding up d products in any order, there and here, in units of 2^-24, with room
  const float sums = static_cast<float>(2 * d + 64) / (1 << 24);
  std::atomic<bool> good{true};
  Tasks tasks(rows, 16);
  in_parallel(threads, [&](int64_t, int64_t) {
    std::vector<float> near(d), error(d);
    tasks.each([&](int64_t r) {
      const float* row = x + r * d;
      for (int64_t j = 0; j < d; j++) {
        near[j] = half ? from_half(half[r * d + j]) : row[j];
        error[j] = row[j] - near[j];
      }
      const float size = std::sqrt(dot(row, row, d)) * SUMMED;
      const float lost = std::sqrt(dot(error.data(), error.data(), d)) * SUMMED;
      if (!fit(size)) good = false;
      out[2 * r] = weights ? size : lost + sums * size;
      out[2 * r + 1] = weights ? lost : std::sqrt(dot(near.data(), near.data(), d)) * SUMMED;
    });
  });
  return good;
}
