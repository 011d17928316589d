// The thread pool: a queue of calls, whose pieces the caller and the threads of the pool take in
// turn.
#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>

namespace srt::numpy {
namespace {

// One call, on the stack of its caller: [0, n) divided into pieces of about equal size.
struct Job {
  int64_t n, pieces;
  Parallel::Body body;
  void* context;
  int64_t taken = 0, done = 0;  // pieces
  std::condition_variable finished{};
};

// Everything except the bodies runs under the mutex. Bodies take 100 microseconds or more, so there
// is little contention.
class Pool {
 public:
  void run(int64_t n, int64_t pieces, Parallel::Body body, void* context) {
    Job job{n, pieces, body, context};
    std::unique_lock<std::mutex> lock(mutex_);
    jobs_.push_back(&job);
    start(pieces - 1);
    has_work_.notify_all();
    // The caller processes pieces of its own call until none is left. It then waits only for pieces
    // that are already running, so no call waits for another one.
    while (job.taken < job.pieces) work_on(job, lock);
    job.finished.wait(lock, [&] { return job.done == job.pieces; });
  }

 private:
  void work_on(Job& job, std::unique_lock<std::mutex>& lock) {
    const int64_t piece = job.taken++;
    if (job.taken == job.pieces) jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    lock.unlock();
    job.body(job.n * piece / job.pieces, job.n * (piece + 1) / job.pieces, job.context);
    lock.lock();
    // The caller needs the mutex to return, and `job` exists until then.
    if (++job.done == job.pieces) job.finished.notify_one();
  }

  void start(int64_t threads) {
    try {
      for (; started_ < threads; ++started_) std::thread([this] { serve(); }).detach();
    } catch (const std::exception&) {
      // No more threads can be started: the caller processes the pieces that no other thread takes.
    }
  }

  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      has_work_.wait(lock, [&] { return !jobs_.empty(); });
      work_on(*jobs_.front(), lock);
    }
  }

  std::mutex mutex_;
  std::condition_variable has_work_;
  std::deque<Job*> jobs_;  // those with pieces left
  int64_t started_ = 0;
};

std::atomic<int64_t> threads_of_a_call{1};

// Never deleted, because its threads wait on it until the process ends.
std::atomic<Pool*> pool{nullptr};

// A forked child has no pool threads, and the mutex may be locked by a thread that does not exist
// in the child. So the child abandons the pool of the parent, and its next call creates a new one.
[[maybe_unused]] const int at_fork =
    pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr, std::memory_order_relaxed); });

Pool& this_process_pool() {
  Pool* current = pool.load(std::memory_order_acquire);
  if (current) return *current;
  Pool* const made = new Pool;
  if (pool.compare_exchange_strong(current, made)) return *made;
  delete made;  // another thread was first; this one has no threads yet
  return *current;
}

}  // namespace

void set_threads(int64_t threads) { threads_of_a_call = threads; }
int64_t get_threads() { return threads_of_a_call; }

Parallel thread_pool() {
  return {get_threads(), [](int64_t n, Parallel::Body body, void* context) {
            const int64_t pieces = std::min(n, get_threads());
            if (pieces > 1) {
              this_process_pool().run(n, pieces, body, context);
            } else if (n > 0) {
              body(0, n, context);
            }
          }};
}

}  // namespace srt::numpy
