// Steps of work that follow on each other in microseconds, each in parts that the threads share.
//
// A parallel loop for every step would cost more than the step. Here threads enter once, and take the parts of a step
// as they come to them, their own first, so that a part's data stay in one core's cache. Who ends the last part of a
// step makes what comes between two steps. Nobody waits for a part that no thread has taken: a thread that comes late,
// or never, or is stopped by the system, costs the others no more than the part it holds.
#pragma once

#include <atomic>
#include <memory>
#include <thread>

#include "core/parallel.h"
#include "core/simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace pyreg::PYREG_ISA {

// A thread that has waited for so many pauses, about a millisecond, lets others have the core: by then another thread
// has lost its own. To yield sooner hands the core to whatever runs on the machine, for some milliseconds each time.
constexpr int kPausesToYield = 1 << 14;

PYREG_HOST_DEVICE void pause() {
#if defined(__SSE2__)
  _mm_pause();
#endif
}

// Calls part(0), ..., part(parts - 1), all of them between two calls of go_on(), as long as that returns true. `part`
// is called by several threads at once, `go_on` by one, after all parts and before those of the next step.
template <typename Part, typename GoOn>
void repeat_in_parallel(int64_t parts, Part&& part, GoOn&& go_on) {
  if (parts == 1) {
    const FlushSubnormals flush;
    do part(0);
    while (go_on());
    return;
  }
  constexpr int64_t kEnd = 0;
  std::atomic<int64_t> step{1};
  std::atomic<int64_t> left{parts};  // of the step
  struct alignas(64) Taken {
    std::atomic<int64_t> step{0};  // the last one whose part has been taken
  };
  std::unique_ptr<Taken[]> taken(new Taken[static_cast<size_t>(parts)]);
  parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t now = step.load(std::memory_order_acquire); now != kEnd;) {
      for (int64_t i = 0; i < parts; ++i) {
        // Its own from the first to the last and, in the next step, back: what the cache holds yet comes first.
        const int64_t mine = (now % 2 != 0 ? begin + i : end - 1 - i + parts) % parts;
        int64_t before = now - 1;
        if (!taken[mine].step.compare_exchange_strong(before, now, std::memory_order_acq_rel)) continue;
        part(mine);
        if (left.fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
        const bool goes_on = go_on();
        left.store(parts, std::memory_order_relaxed);
        step.store(goes_on ? now + 1 : kEnd, std::memory_order_release);
      }
      int64_t next = step.load(std::memory_order_acquire);
      for (int pauses = 0; next == now; next = step.load(std::memory_order_acquire)) {
        pause();
        if (++pauses % kPausesToYield == 0) std::this_thread::yield();
      }
      now = next;
    }
  });
}

// function(0), ..., function(blocks - 1), shared by the threads.
template <typename Function>
void for_each_block(int64_t blocks, Function&& function) {
  parallel_for(blocks, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t block = begin; block < end; ++block) function(block);
  });
}

}  // namespace pyreg::PYREG_ISA
