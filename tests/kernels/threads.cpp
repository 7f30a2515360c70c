// Threads of our own, without OpenMP: `test_threads.py` compiles and runs this. Prints "ok".
#include "threads.h"

#include <sys/wait.h>

#include <cstdio>
#include <cstdlib>
#include <set>
#include <vector>

namespace {

void require(bool good, const char* what) {
  if (good) return;
  std::printf("not so: %s\n", what);
  std::_Exit(1);
}

// Every number is given out once, whatever the number of threads.
bool covers(int64_t n, int64_t threads, int64_t at_once) {
  std::vector<std::atomic<int>> given(n);
  std::atomic<bool> numbered{true};
  for_each(n, threads, at_once, [&](int64_t i, int64_t thread) {
    given[i]++;
    if (thread < 0 || thread >= threads) numbered = false;
  });
  for (const auto& each : given)
    if (each != 1) return false;
  return numbered;
}

}  // namespace

int main() {
  for (const int64_t threads : {4, 1, 2, 7})
    for (const int64_t n : {0, 1, 5, 1000})
      for (const int64_t at_once : {1, 8}) require(covers(n, threads, at_once), "all is given out");

  std::mutex mutex;
  std::set<std::thread::id> seen;
  std::atomic<int> arrived{0};
  in_parallel(3, [&](int64_t, int64_t of) {
    require(of == 3, "as many threads as are asked for");
    arrived++;
    while (arrived < 3) std::this_thread::yield();  // all are here at once
    const std::lock_guard<std::mutex> lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  require(seen.size() == 3, "they are different ones");

  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; caller++)
    callers.emplace_back([] {
      for (int i = 0; i < 200; i++) require(covers(50, 3, 1), "several callers at once");
    });
  for (std::thread& caller : callers) caller.join();

  const pid_t child = fork();
  if (child == 0) std::_Exit(covers(1000, 3, 1) ? 0 : 1);
  int status = 1;
  waitpid(child, &status, 0);
  require(status == 0, "a forked process has threads again");
  std::printf("ok\n");
  return 0;
}
