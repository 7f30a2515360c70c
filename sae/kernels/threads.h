// Work on several threads: those of OpenMP where it is compiled for, otherwise of a pool of our own.
//
// Compiled by GCC this uses the threads that torch has made (see cpp_library.py); other compilers
// may be without OpenMP, or have a runtime of their own, which would be a second one. No kernel's
// result depends on how many threads there are, or on which does what.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#ifdef _OPENMP
#include <omp.h>

// Calls body(thread, of), thread from 0 to of - 1, on `of` threads: `threads`, or fewer.
template <class Body>
void in_parallel(int64_t threads, const Body& body) {
#pragma omp parallel num_threads(static_cast<int>(threads)) if (threads > 1)
  body(static_cast<int64_t>(omp_get_thread_num()), static_cast<int64_t>(omp_get_num_threads()));
}

#else
#include <unistd.h>

#include <condition_variable>
#include <functional>
#include <mutex>
#include <system_error>
#include <thread>

// Threads that wait for work; made when they are first needed.
class Workers {
 public:
  using Body = std::function<void(int64_t, int64_t)>;

  // Those of this process: one that was forked has none of its parent's. They are never destroyed,
  // since threads may wait until the very end.
  static Workers& ours() {
    static std::atomic<Workers*> current{nullptr};
    Workers* found = current.load();
    if (found != nullptr && found->process_ == getpid()) return *found;
    auto* made = new Workers;
    if (current.compare_exchange_strong(found, made)) return *made;
    delete made;
    return *found;
  }

  // As `in_parallel`; a caller that finds them at work for another does it alone.
  void run(int64_t threads, const Body& body) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    const int64_t of = turn.owns_lock() ? std::min(threads, made(threads - 1) + 1) : 1;
    if (of == 1) return body(0, 1);
    {
      const std::lock_guard<std::mutex> lock(state_);
      body_ = &body;
      of_ = of;
      working_ = of - 1;
      round_++;
    }
    begun_.notify_all();
    body(0, of);
    std::unique_lock<std::mutex> lock(state_);
    ended_.wait(lock, [&] { return working_ == 0; });
  }

 private:
  // How many workers there are, after an attempt to have this many.
  int64_t made(int64_t wanted) {
    try {
      for (; workers_ < wanted; workers_++)
        std::thread(&Workers::work, this, workers_ + 1, round_).detach();
    } catch (const std::system_error&) {  // no more threads
    }
    return workers_;
  }

  void work(int64_t thread, int64_t done) {
    std::unique_lock<std::mutex> lock(state_);
    while (true) {
      begun_.wait(lock, [&] { return round_ != done; });
      done = round_;
      if (thread >= of_) continue;
      const Body& body = *body_;
      const int64_t of = of_;
      lock.unlock();
      body(thread, of);
      lock.lock();
      if (--working_ == 0) ended_.notify_one();
    }
  }

  const pid_t process_ = getpid();
  std::mutex turn_, state_;
  std::condition_variable begun_, ended_;
  const Body* body_ = nullptr;
  int64_t workers_ = 0, of_ = 0, working_ = 0, round_ = 0;
};

template <class Body>
void in_parallel(int64_t threads, const Body& body) {
  if (threads <= 1) return body(int64_t{0}, int64_t{1});
  Workers::ours().run(threads, body);
}
#endif

// Hands out the numbers from 0 to n - 1, some at a time, to whichever thread asks.
class Tasks {
 public:
  explicit Tasks(int64_t n, int64_t at_once = 1) : n_(n), at_once_(at_once) {}

  // Calls body(i) for what this thread gets, until there is no more.
  template <class Body>
  void each(const Body& body) {
    for (int64_t first; (first = next_.fetch_add(at_once_, std::memory_order_relaxed)) < n_;)
      for (int64_t i = first; i < std::min(first + at_once_, n_); i++) body(i);
  }

 private:
  const int64_t n_, at_once_;
  std::atomic<int64_t> next_{0};
};

// Calls body(i, thread) for each i from 0 to n - 1.
template <class Body>
void for_each(int64_t n, int64_t threads, int64_t at_once, const Body& body) {
  Tasks tasks(n, at_once);
  in_parallel(threads, [&](int64_t thread, int64_t) {
    tasks.each([&](int64_t i) { body(i, thread); });
  });
}
