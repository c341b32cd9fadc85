// Work split over torch's own threads: a second OpenMP runtime in the process would slow both down.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pyreg {

// A task of fewer elements is not worth a second thread: a task switch costs about 5 us.
constexpr int64_t kElementsPerTask = 32768;

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// Calls body on disjoint ranges that cover [0, count); ranges hold at least `grain` items where there are that many.
void parallel_for_raw(int64_t count, int64_t grain, ParallelBody body, void* context);

template <typename Function>
inline __attribute__((always_inline)) void parallel_for(int64_t count, int64_t grain, Function&& function) {
  parallel_for_raw(
      count, grain,
      [](int64_t begin, int64_t end, void* context) {
        (*static_cast<std::remove_reference_t<Function>*>(context))(begin, end);
      },
      &function);
}

}  // namespace pyreg
