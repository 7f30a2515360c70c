// The operations on one problem, without torch: `test_widths.py` compiles this with the kernels for
// several processors, and compares what they print.
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "screen.h"

extern "C" {
int64_t saescope_block();
int64_t saescope_tile();
void saescope_deal(const int64_t*, const int64_t*, const float*, int64_t, int64_t, int64_t, int32_t*,
                   void*, int32_t*, int64_t);
void saescope_segment_sum(const int32_t*, const void*, const float*, int64_t, int64_t, int64_t,
                          float*, float*, int64_t);
void saescope_decode(const int64_t*, const int64_t*, const float*, const float*, int64_t, int64_t,
                     float*, int64_t);
void saescope_decode_error(const int64_t*, const int64_t*, const float*, const float*, const float*,
                           const float*, int64_t, int64_t, float*, float*, float*, int64_t);
void saescope_top_of_rows(const float*, const float*, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t*, float*, uint64_t*, int64_t);
void saescope_count_above(const float*, const float*, const float*, int64_t, int64_t, int64_t*,
                          int64_t);
void saescope_fill_above(const float*, const float*, const float*, int64_t, int64_t, const int64_t*,
                         int64_t*, float*, int64_t);
double saescope_gradient_square(const float*, const float*, int64_t, int64_t, int);
void saescope_adam(float*, const float*, float*, float*, int64_t, int64_t, int, double, double,
                   double, double, double, double, int);
int screen_integers_bits();
void screen_integers(screen::Job*);
void screen_scores(screen::Job*);
int screen_bounds(const float*, const uint16_t*, int64_t, int64_t, int, float*, int);
}

namespace {

constexpr int64_t ROWS = 70, D = 83, FEATURES = 1100, K = 9;

struct Random {
  uint32_t state = 7;
  float operator()() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / (1 << 23) - 1;
  }
  std::vector<float> many(int64_t n) {
    std::vector<float> out(n);
    for (float& each : out) each = (*this)() + (*this)() * (*this)();
    return out;
  }
};

// name: each value, as it is written with every digit
void show(const char* name, const std::vector<float>& values) {
  std::printf("%s", name);
  for (const float value : values) std::printf(" %.9g", static_cast<double>(value));
  std::printf("\n");
}

void show(const char* name, const std::vector<int64_t>& values) {
  std::printf("%s", name);
  for (const int64_t value : values) std::printf(" %" PRId64, value);
  std::printf("\n");
}

}  // namespace

// Usage: program THREADS
int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  Random random;
  const auto x = random.many(ROWS * D), W = random.many(FEATURES * D), b = random.many(FEATURES);
  std::vector<float> pre(ROWS * FEATURES);
  for (int64_t r = 0; r < ROWS; r++)
    for (int64_t f = 0; f < FEATURES; f++) pre[r * FEATURES + f] = screen::dot(&x[r * D], &W[f * D], D);

  std::vector<int64_t> index(ROWS * K), row_ptr(ROWS + 1);
  std::vector<float> value(ROWS * K);
  std::vector<uint64_t> work(threads * (2 * FEATURES + 256));
  for (const int64_t with_sign : {0, 1}) {
    saescope_top_of_rows(pre.data(), b.data(), ROWS, FEATURES, K, with_sign, 256, index.data(),
                         value.data(), work.data(), threads);
    show(with_sign ? "signed" : "top", index);
    show(with_sign ? "signed_value" : "top_value", value);
  }
  for (int64_t r = 0; r <= ROWS; r++) row_ptr[r] = r * K;

  std::vector<int64_t> counts(ROWS), begins(ROWS + 1);
  const std::vector<float> threshold(FEATURES, 12.0f);
  saescope_count_above(pre.data(), b.data(), threshold.data(), ROWS, FEATURES, counts.data(), threads);
  for (int64_t r = 0; r < ROWS; r++) begins[r + 1] = begins[r] + counts[r];
  std::vector<int64_t> above(begins[ROWS]);
  std::vector<float> above_value(begins[ROWS]);
  saescope_fill_above(pre.data(), b.data(), threshold.data(), ROWS, FEATURES, begins.data(),
                      above.data(), above_value.data(), threads);
  show("above", above);
  show("above_value", above_value);

  std::vector<float> out(ROWS * D), error(ROWS * D), squared(ROWS), dots(ROWS * K);
  saescope_decode(row_ptr.data(), index.data(), value.data(), W.data(), ROWS, D, out.data(), threads);
  show("decode", out);
  saescope_decode_error(row_ptr.data(), index.data(), value.data(), W.data(), b.data(), x.data(), ROWS,
                        D, error.data(), squared.data(), dots.data(), threads);
  show("error", error);
  show("squared", squared);
  show("dots", dots);
  std::vector<int32_t> start(FEATURES + 1), mine(threads * FEATURES);
  std::vector<int64_t> entries(ROWS * K);
  std::vector<float> tiles(threads * saescope_tile()), gradient(FEATURES * D);
  saescope_deal(row_ptr.data(), index.data(), value.data(), ROWS, FEATURES, 0, start.data(),
                entries.data(), mine.data(), threads);
  saescope_segment_sum(start.data(), entries.data(), x.data(), FEATURES, ROWS, D, tiles.data(),
                       gradient.data(), threads);
  show("gradient", gradient);

  std::vector<float> p = W, m(p.size()), v(p.size());
  std::printf("square %.9g\n", saescope_gradient_square(gradient.data(), W.data(), FEATURES * D, D, threads));
  saescope_adam(p.data(), gradient.data(), m.data(), v.data(), FEATURES * D, D, 1, 0.9, 0.999, 1e-8,
                1e-3, 1.0, 1.0, threads);
  show("adam", p);

  // exact encoding through approximate products, which finds what the products above found
  screen::Job job{};
  job.x = x.data(), job.W = W.data(), job.b = b.data();
  job.index = index.data(), job.value = value.data();
  job.rows = ROWS, job.d = D, job.features = FEATURES, job.k = K;
  job.deviations = 2.5, job.threads = threads;
  for (const bool integers : {false, true}) {
    if (integers && screen_integers_bits() == 0) continue;
    std::vector<float> row_bounds(2 * ROWS), feature_bounds(2 * FEATURES);
    if (integers) {
      screen_integers(&job);
    } else {
      screen_bounds(x.data(), nullptr, ROWS, D, 0, row_bounds.data(), threads);
      screen_bounds(W.data(), nullptr, FEATURES, D, 1, feature_bounds.data(), threads);
      job.scores = pre.data();
      job.row_bounds = row_bounds.data(), job.feature_bounds = feature_bounds.data();
      screen_scores(&job);
    }
    std::printf("%s_status %d\n", integers ? "integers" : "scores", job.status);
    show(integers ? "integers" : "scores", index);
    show(integers ? "integers_value" : "scores_value", value);
  }
  return 0;
}
