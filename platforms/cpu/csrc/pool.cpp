// A job is a range cut into one span per thread; a thread takes chunks of its own span first, then of the others', so a
// core that something else occupies does not hold up the rest. Workers wait for a new job by spinning for kSpinNs, then
// yielding the core for kYieldNs (torch's threads may want it), then sleeping.
//
// Who may touch a job: the caller publishes it by `epoch` (odd while open); a worker first counts itself into `active`
// and then checks that the epoch is still the one it saw. The caller closes the epoch when no chunk is left and waits
// for active == 0. Both orders are sequentially consistent, so either the worker sees the close or the caller sees it.
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int kMaxThreads = 512;
constexpr int kChunksPerThread = 8;
constexpr int64_t kSpinNs = 30'000, kYieldNs = 200'000;
using Fn = void (*)(void*, int64_t, int64_t);

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return int64_t{t.tv_sec} * 1'000'000'000 + t.tv_nsec;
}

void bind_to(int cpu) {
#if defined(__linux__)
  if (cpu < 0) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(cpu, &set);
  pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // refused: the worker floats, slower and right
#else
  (void)cpu;
#endif
}

struct alignas(128) Span {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};

struct Pool {
  std::atomic<uint64_t> epoch{0};  // odd: a job is open
  std::atomic<int> active{0};      // workers inside a job
  std::atomic<int> sleepers{0};
  std::atomic<bool> busy{false};  // a caller owns the pool
  bool stop = false;
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;
  int num_threads = 1;
  std::vector<int> cpus;
  Span spans[kMaxThreads];
  int64_t chunk = 1;
  Fn fn = nullptr;
  void* ctx = nullptr;

  void run_chunks(int self) {
    for (int i = 0; i < num_threads; i++) {
      Span& span = spans[(self + i) % num_threads];
      for (;;) {
        if (span.next.load(std::memory_order_relaxed) >= span.end) break;
        int64_t begin = span.next.fetch_add(chunk, std::memory_order_relaxed);
        if (begin >= span.end) break;
        fn(ctx, begin, begin + chunk < span.end ? begin + chunk : span.end);
      }
    }
  }

  // Returns the epoch of the next open job after `seen`, or 0 to stop.
  uint64_t wait_for_job(uint64_t seen) {
    auto fresh = [&] {
      uint64_t e = epoch.load();
      return (e & 1) && e != seen ? e : 0;
    };
    int64_t start = now_ns(), waited = 0;
    while (waited < kYieldNs) {
      for (int i = 0; i < 32; i++) {
        if (uint64_t e = fresh()) return e;
        pause();
      }
      waited = now_ns() - start;
      if (waited > kSpinNs) sched_yield();
    }
    std::unique_lock<std::mutex> lock(mutex);
    sleepers.fetch_add(1);
    uint64_t e = 0;
    wake.wait(lock, [&] { return stop || (e = fresh()); });
    sleepers.fetch_sub(1);
    return stop ? 0 : e;
  }

  void work(int self) {
    bind_to(self < static_cast<int>(cpus.size()) ? cpus[self] : -1);
    uint64_t seen = 0;
    while ((seen = wait_for_job(seen))) {
      active.fetch_add(1);
      if (epoch.load() == seen) run_chunks(self);
      active.fetch_sub(1);
    }
  }

  void start_workers() {
    stop = false;
    try {
      while (static_cast<int>(workers.size()) < num_threads - 1)
        workers.emplace_back(&Pool::work, this, static_cast<int>(workers.size()) + 1);
    } catch (const std::system_error&) {
      num_threads = static_cast<int>(workers.size()) + 1;  // the system gives no more; fl_pool_num_threads tells
    }
  }

  void stop_workers() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      stop = true;
    }
    wake.notify_all();
    for (std::thread& worker : workers) worker.join();
    workers.clear();
  }

  void run(int64_t n, Fn f, void* c) {
    if (num_threads == 1) return f(c, 0, n);
    fn = f;
    ctx = c;
    chunk = (n + int64_t{num_threads} * kChunksPerThread - 1) / (int64_t{num_threads} * kChunksPerThread);
    for (int i = 0; i < num_threads; i++) {
      spans[i].next.store(n * i / num_threads, std::memory_order_relaxed);
      spans[i].end = n * (i + 1) / num_threads;
    }
    epoch.fetch_add(1);
    if (sleepers.load() > 0) {
      { std::lock_guard<std::mutex> lock(mutex); }  // a worker between its last look and its sleep has gone to sleep
      wake.notify_all();
    }
    run_chunks(0);
    epoch.fetch_add(1);
    while (active.load() != 0) pause();
  }
};

// Never destroyed: workers may outlive the static objects of a process that exits.
std::atomic<Pool*> the_pool{nullptr};

// The child of a fork has no workers, and locks that others held stay locked: it gets a new pool of the same shape,
// whose workers start with its first job. The parent's object is left as it is.
void in_child() {
  Pool* old = the_pool.load();
  Pool* fresh = new Pool;
  fresh->num_threads = old->num_threads;
  fresh->cpus = old->cpus;
  the_pool.store(fresh);
}

Pool& pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    the_pool.store(new Pool);
    pthread_atfork(nullptr, nullptr, in_child);
  });
  return *the_pool.load();
}

void own(Pool& p) {
  while (p.busy.exchange(true)) sched_yield();
}

}  // namespace

void fl_parallel_for(int64_t n, void (*fn)(void*, int64_t, int64_t), void* ctx) {
  if (n <= 0) return;
  Pool& p = pool();
  if (n == 1 || p.busy.exchange(true)) {
    fn(ctx, 0, n);
    return;
  }
  if (p.workers.empty()) p.start_workers();
  p.run(n, fn, ctx);
  p.busy.store(false);
}

void fl_pool_init(int32_t num_threads, const int32_t* cpus) {
  Pool& p = pool();
  own(p);
  if (!p.workers.empty()) p.stop_workers();
  p.num_threads = num_threads < 1 ? 1 : num_threads > kMaxThreads ? kMaxThreads : num_threads;
  p.cpus.clear();
  if (cpus) p.cpus.assign(cpus, cpus + p.num_threads);
  p.busy.store(false);
}

int32_t fl_pool_num_threads() { return pool().num_threads; }

void fl_pool_shutdown() { fl_pool_init(1, nullptr); }
