// An emulation of CUDA's execution model on one CPU thread, for tests only.
//
// A project .cu file is compiled by g++ with -DPYREG_CUDA_EMULATION and this folder's include/ in place of the CUDA
// toolkit's. Each CUDA thread is a fiber that runs until it reaches a barrier, a warp operation or its end; then the
// next one runs, in an order that the test chooses (`set_thread_order`). A missing barrier shows as a result that
// depends on the order.
//
// Blocks run one after another; those of a cooperative launch are alive together. Shared memory, static and dynamic, is
// filled with 0xff (a NaN, or -1) before a block starts, and dynamic shared memory has exactly the size asked for, so
// that AddressSanitizer sees a step beyond it. Launches from several host threads wait for each other.
//
// What breaks CUDA's rules ends the launch with a std::runtime_error that names the kernel, the block and the source
// line: a barrier or warp operation that not all named threads reach, or reach at different lines; lanes that disagree
// on mask or width; blocks that disagree on their group's size; a shuffle from a lane outside the mask; blocks, grids
// and shared memory beyond the limits.
//
// Stricter than hardware: a mask may name no lane that has exited or that the block does not have, so a full mask needs
// whole warps. Not seen: a missing __threadfence, a spin on another thread's write (it hangs), registers and
// __launch_bounds__. g++ puts no redzone around a static shared array of a template outside of anonymous namespaces:
// there UndefinedBehaviorSanitizer alone checks the index.
//
// Shared memory must be declared in functions with C++ linkage, and a .cu file must have no other
// zero-initialized function-local static (use `inline` variables): the linker script tells them apart by name alone.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
inline constexpr int warpSize = 32;

namespace pyreg_emulation {

enum class ThreadOrder : int { ascending, descending, random };

// The order in which the threads of a block, and the blocks of a grid, take their turns. `random` draws a new order
// for each turn from the seed.
void set_thread_order(ThreadOrder order, uint64_t seed);

inline constexpr size_t kDefaultSharedLimit = 48 * 1024;
inline constexpr size_t kMaxDynamicShared = 227 * 1024;
inline constexpr int kMultiprocessors = 3;

// Of two devices, alike but for this.
inline constexpr int kWithoutCooperativeLaunch = 1;
int current_device();

// Lets a kernel have up to `bytes` of dynamic shared memory.
void set_dynamic_shared_limit(const void* kernel, size_t bytes);
// Blocks of that shape alive on one multiprocessor at once.
int blocks_per_multiprocessor(int threads, size_t dynamic_shared_bytes);

// Called by the threads of a kernel, through the names that CUDA gives them.
struct Place {
  const char* file;
  int line;
};
enum class WarpOperation { sync, shuffle, ballot };

void* dynamic_shared_memory();
void block_barrier(Place place);
// The same; whether any thread's predicate is true.
bool block_any(bool predicate, Place place);
void grid_barrier(Place place);
// Waits for all threads of `blocks` blocks that come with the same key.
void group_barrier(const void* key, unsigned blocks, Place place);
unsigned active_lanes();
// Waits for the lanes of `mask`. A shuffle gives the value of lane `source_lane`, a ballot the mask of the lanes whose
// value is not 0.
uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int source_lane, int width,
                        Place place);

void run(const char* name, const void* kernel, bool cooperative, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
         const std::function<void()>& body);

template <typename... Parameters, typename... Arguments>
void launch(const char* name, bool cooperative, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t dynamic_shared_bytes, Arguments&&... arguments) {
  run(name, reinterpret_cast<const void*>(kernel), cooperative, grid, block, dynamic_shared_bytes,
      [&] { kernel(static_cast<Parameters>(arguments)...); });
}

}  // namespace pyreg_emulation
