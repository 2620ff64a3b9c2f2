// Work shared out over XLA's threads.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "vectors.h"

namespace beit {

// For what another thread is about to do: other work runs only if that takes long.
template <typename Condition>
void wait_until(const Condition& holds) {
  for (int tries = 0; !holds(); tries++)
    if (tries > 1000) std::this_thread::yield();
}

// Calls task(i) for every i below `count`, which begin in this order, on the calling thread and on the pool's. The calling
// thread takes pieces like the others, and waits for no thread that has not begun: so it ends even where the pool is busy
// with callers like it.
template <typename Pool, typename Task>
void share(Pool& pool, Index count, const Task& task) {
  struct State {
    std::atomic<Index> next{0}, done{0};
    Index count;
    const Task* task;
    // Compiled once: compilers round otherwise where they make another copy of the task.
    __attribute__((noinline)) void work() {
      for (;;) {
        Index i = next.fetch_add(1);
        if (i >= count) return;
        (*task)(i);
        done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  Index helpers = pool.num_threads() - 1;
  if (helpers > count - 1) helpers = count - 1;
  auto state = std::make_shared<State>();  // helpers that come late find it, and nothing left to do
  state->count = count;
  state->task = &task;
  for (Index i = 0; i < helpers; i++) pool.Schedule([state] { state->work(); });
  state->work();
  wait_until([&] { return state->done.load(std::memory_order_acquire) == count; });
}

}  // namespace beit
