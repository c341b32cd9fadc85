#include "emulator.h"

#include <sys/mman.h>
#include <atomic>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__) || defined(PYREG_EMULATION_UCONTEXT)
#include <ucontext.h>
#define PYREG_UCONTEXT 1
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

// Bounds of the __shared__ variables, set by shared_memory.ld.
extern "C" uint64_t pyreg_shared_begin[] __attribute__((visibility("hidden")));
extern "C" uint64_t pyreg_shared_end[] __attribute__((visibility("hidden")));

namespace pyreg_emulation {
namespace {

size_t shared_variable_words() { return static_cast<size_t>(pyreg_shared_end - pyreg_shared_begin); }

// Fibers.
//
// swapcontext saves the signal mask with a system call at each switch, so x86-64 has its own: save the callee-saved
// registers on the stack, change stacks, restore them.

constexpr size_t kStackBytes = 128 * 1024;
constexpr size_t kGuardBytes = 4096;

#if defined(PYREG_UCONTEXT)
struct Context {
  ucontext_t registers;
};

void start_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = kStackBytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }
#else
struct Context {
  void* stack_pointer;
};

extern "C" void pyreg_switch_stack(void** save, void* load) __attribute__((visibility("hidden")));
asm(R"(
.text
.p2align 4
.hidden pyreg_switch_stack
.globl pyreg_switch_stack
.type pyreg_switch_stack, @function
pyreg_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pyreg_switch_stack, .-pyreg_switch_stack
)");

void start_context(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // where entry would return to; also leaves the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

void switch_context(Context& from, Context& to) { pyreg_switch_stack(&from.stack_pointer, to.stack_pointer); }
#endif

struct Block;

enum class State { runnable, waiting, exited };

struct Thread {
  Context context;
  char* stack;
  void* fake_stack;  // AddressSanitizer's
  Block* block;
  uint3 index;
  int rank;
  State state;
  const char* waits_at;
  const void* waits_for;  // the key of a group's barrier
  Place place;
};

struct WarpRequest {
  WarpOperation operation;
  unsigned mask;
  uint64_t value;
  int source_lane;
  int width;
  Place place;
};

struct Warp {
  unsigned lanes;   // lanes that the block has
  unsigned exited;  // of these, the ones that have returned from the kernel
  unsigned posted;  // lanes whose request waits
  WarpRequest request[32];
  uint64_t result[32];
};

struct Barrier {
  int arrived;
  Place place;
  int expected;  // of a group
};

struct Block {
  uint3 index;
  std::vector<Thread*> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  bool any, any_before;  // of the predicates that arrive, and of those of the last barrier
  std::unique_ptr<char, decltype(&std::free)> dynamic_shared{nullptr, &std::free};
  std::vector<uint64_t> shared_variables;  // while another block has them
};

struct Aborted {};  // unwinds the other threads of a failed launch

struct Emulator {
  std::mutex one_launch_at_a_time;
  ThreadOrder order = ThreadOrder::ascending;
  std::mt19937_64 random;
  std::map<const void*, size_t> dynamic_shared_limit;

  std::vector<std::unique_ptr<Thread>> pool;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_bytes = 0;

  const std::function<void()>* body = nullptr;
  std::vector<Block>* blocks = nullptr;
  Barrier grid_barrier;
  std::map<const void*, Barrier> group_barriers;
  bool cooperative = false;
  Thread* current = nullptr;
  Block* shared_owner = nullptr;  // the block whose values the __shared__ variables hold
  std::string error;
};

Emulator emulator;
std::atomic<int> device{0};

bool aborting() { return !emulator.error.empty(); }

// Called on a fiber, back in the scheduler until its next turn.
void yield() {
  Thread& thread = *emulator.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&thread.fake_stack, emulator.scheduler_stack, emulator.scheduler_stack_bytes);
#endif
  switch_context(thread.context, emulator.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread.fake_stack, &emulator.scheduler_stack, &emulator.scheduler_stack_bytes);
#endif
}

// Called on the scheduler's stack.
void resume(Thread& thread) {
  emulator.current = &thread;
  threadIdx = thread.index;
  blockIdx = thread.block->index;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, thread.stack, kStackBytes);
#endif
  switch_context(emulator.scheduler, thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  emulator.current = nullptr;
}

void run_kernel_in_fiber() {
  try {
    if (!aborting()) (*emulator.body)();
  } catch (const Aborted&) {
  } catch (const std::exception& exception) {
    if (!aborting()) emulator.error = exception.what();
  }
  Thread& thread = *emulator.current;
  thread.state = State::exited;
  thread.block->warps[thread.rank / 32].exited |= 1u << (thread.rank % 32);
}

// A fiber lives as long as the library: it runs the kernel once for each thread that it is lent to.
void fiber_entry() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &emulator.scheduler_stack, &emulator.scheduler_stack_bytes);
#endif
  while (true) {
    run_kernel_in_fiber();
    yield();
  }
}

Thread* pooled_thread(size_t i) {
  while (emulator.pool.size() <= i) {
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      throw std::runtime_error("CUDA emulation: no memory for the stack of thread " + std::to_string(i));
    }
    auto thread = std::make_unique<Thread>();
    thread->stack = static_cast<char*>(memory) + kGuardBytes;
    start_context(thread->context, thread->stack, fiber_entry);
    emulator.pool.push_back(std::move(thread));
  }
  return emulator.pool[i].get();
}

// Errors.

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(Place place) { return std::string(place.file) + ":" + std::to_string(place.line); }

std::string where_it_stands(const Thread& thread) {
  if (thread.state == State::exited) return "exited";
  if (thread.state == State::runnable) return "ran on";
  return std::string("wait at ") + thread.waits_at + " (" + text(thread.place) + ")";
}

// "threads 0-15 wait at __syncthreads (a.cu:12); threads 16-31 exited"
std::string describe(const Block& block) {
  std::ostringstream out;
  for (size_t i = 0; i < block.threads.size();) {
    const std::string state = where_it_stands(*block.threads[i]);
    size_t end = i + 1;
    while (end < block.threads.size() && where_it_stands(*block.threads[end]) == state) ++end;
    out << (i == 0 ? "threads " : "; threads ") << i << "-" << end - 1 << " " << state;
    i = end;
  }
  return out.str();
}

[[noreturn]] void fail(const std::string& message) {
  const Thread& thread = *emulator.current;
  throw std::runtime_error("block " + text(thread.block->index) + ", thread " + std::to_string(thread.rank) + ": " +
                           message);
}

Thread& current_thread(const char* what) {
  if (emulator.current == nullptr) throw std::runtime_error(std::string(what) + " called outside of a kernel");
  return *emulator.current;
}

// Waiting.

bool same_place(Place a, Place b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

void wait(const char* what, Place place) {
  Thread& thread = *emulator.current;
  thread.state = State::waiting;
  thread.waits_at = what;
  thread.place = place;
  yield();
  if (aborting()) throw Aborted{};
}

// The last to arrive sets all free, and takes its next turn in order like the others.
void arrive(Barrier& barrier, int expected, const char* what, Place place, const std::function<void()>& release) {
  if (barrier.arrived > 0 && !same_place(barrier.place, place)) {
    fail(std::string(what) + " at " + text(place) + " while other threads wait at " + text(barrier.place));
  }
  barrier.place = place;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    release();
    yield();
    if (aborting()) throw Aborted{};
  } else {
    wait(what, place);
  }
}

void release_block(Block& block) {
  for (Thread* thread : block.threads) thread->state = State::runnable;
}

const char* name_of(WarpOperation operation) {
  switch (operation) {
    case WarpOperation::sync:
      return "__syncwarp";
    case WarpOperation::shuffle:
      return "warp shuffle";
    default:
      return "warp vote";
  }
}

// How another lane's request breaks with one's own, or nothing.
std::string difference(const WarpRequest& other, const WarpRequest& own) {
  std::ostringstream out;
  if (other.operation != own.operation || !same_place(other.place, own.place)) {
    out << "is at the " << name_of(other.operation) << " of " << text(other.place);
  } else if (other.mask != own.mask) {
    out << "names the mask 0x" << std::hex << other.mask << " instead of 0x" << own.mask;
  } else if (other.width != own.width) {
    out << "has width " << other.width << " instead of " << own.width;
  } else if (own.operation == WarpOperation::shuffle && (own.mask >> other.source_lane & 1) == 0) {
    out << "reads lane " << other.source_lane << ", which is outside the mask";
  }
  return out.str();
}

// All lanes of the mask have posted: check that they agree, then compute what each gets.
void complete(Warp& warp, const WarpRequest& own) {
  const bool shuffles = own.operation == WarpOperation::shuffle;
  uint64_t ballot = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((own.mask >> lane & 1) == 0) continue;
    const WarpRequest& other = warp.request[lane];
    const bool agrees = other.operation == own.operation && other.mask == own.mask && other.width == own.width &&
                        same_place(other.place, own.place) && (!shuffles || (own.mask >> other.source_lane & 1) != 0);
    if (!agrees) {
      fail(std::string(name_of(own.operation)) + " at " + text(own.place) + ": lane " + std::to_string(lane) + " " +
           difference(other, own));
    }
    if (other.value != 0) ballot |= uint64_t{1} << lane;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if ((own.mask >> lane & 1) == 0) continue;
    warp.result[lane] = shuffles ? warp.request[warp.request[lane].source_lane].value : ballot;
  }
}

// Scheduling.

std::vector<unsigned> turns(size_t n) {
  std::vector<unsigned> result(n);
  for (size_t i = 0; i < n; ++i) {
    result[i] = static_cast<unsigned>(emulator.order == ThreadOrder::descending ? n - 1 - i : i);
  }
  if (emulator.order == ThreadOrder::random) std::shuffle(result.begin(), result.end(), emulator.random);
  return result;
}

// The redzones between the variables are poisoned, so the copy must not be checked, nor become a call of memcpy.
__attribute__((no_sanitize("address"), optimize("no-tree-loop-distribute-patterns"))) void copy_unchecked(
    uint64_t* to, const uint64_t* from) {
  for (size_t i = 0; i < shared_variable_words(); ++i) to[i] = from[i];
}

void own_shared_variables(Block& block) {
  if (emulator.shared_owner == &block) return;
  if (emulator.shared_owner != nullptr)
    copy_unchecked(emulator.shared_owner->shared_variables.data(), pyreg_shared_begin);
  copy_unchecked(pyreg_shared_begin, block.shared_variables.data());
  emulator.shared_owner = &block;
}

void prepare(Block& block, uint3 index, dim3 shape, size_t first_thread, size_t dynamic_shared_bytes) {
  const unsigned threads = shape.x * shape.y * shape.z;
  block.index = index;
  block.barrier = {};
  block.any = block.any_before = false;
  block.threads.resize(threads);
  block.warps.assign((threads + 31) / 32, Warp{});
  for (unsigned i = 0; i < threads; ++i) {
    Thread* thread = pooled_thread(first_thread + i);
    thread->block = &block;
    thread->index = {i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y)};
    thread->rank = static_cast<int>(i);
    thread->state = State::runnable;
    thread->waits_for = nullptr;
    block.threads[i] = thread;
    block.warps[i / 32].lanes |= 1u << (i % 32);
  }
  block.dynamic_shared.reset(static_cast<char*>(std::malloc(dynamic_shared_bytes)));
  std::fill_n(block.dynamic_shared.get(), dynamic_shared_bytes, '\xff');
  block.shared_variables.assign(shared_variable_words(), ~uint64_t{0});
}

// Runs the threads of the blocks to their end, in turns.
void run_to_end(std::vector<Block>& blocks) {
  emulator.blocks = &blocks;
  emulator.grid_barrier = {};
  emulator.group_barriers.clear();
  emulator.shared_owner = nullptr;
  bool progress = true;
  while (progress) {
    progress = false;
    for (const unsigned b : turns(blocks.size())) {
      Block& block = blocks[b];
      own_shared_variables(block);
      for (const unsigned t : turns(block.threads.size())) {
        Thread& thread = *block.threads[t];
        if (thread.state == State::exited || (thread.state == State::waiting && !aborting())) continue;
        resume(thread);
        progress = true;
      }
    }
    if (progress || aborting()) continue;
    for (const Block& block : blocks) {
      const bool waits = std::any_of(block.threads.begin(), block.threads.end(),
                                     [](const Thread* thread) { return thread->state == State::waiting; });
      if (!waits) continue;
      emulator.error = "block " + text(block.index) + ": deadlock: " + describe(block);
      progress = true;  // once more, to unwind the threads that wait
      break;
    }
  }
}

std::string launch_error(const void* kernel, bool cooperative, dim3 grid, dim3 block, size_t dynamic_shared_bytes) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  const size_t blocks = size_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > 1024 || block.z > 64) {
    return "a block of " + text({block.x, block.y, block.z}) + " threads; 1 to 1024 are allowed";
  }
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return "a grid of " + text({grid.x, grid.y, grid.z}) +
           " blocks; none may be 0, nor x over 2^31 - 1, y or z over 65535";
  }
  const auto limit = emulator.dynamic_shared_limit.find(kernel);
  const size_t allowed = limit == emulator.dynamic_shared_limit.end() ? kDefaultSharedLimit : limit->second;
  if (dynamic_shared_bytes > allowed) {
    return std::to_string(dynamic_shared_bytes) + " bytes of dynamic shared memory; the kernel is allowed " +
           std::to_string(allowed);
  }
  const size_t resident = static_cast<size_t>(kMultiprocessors) *
                          blocks_per_multiprocessor(static_cast<int>(threads), dynamic_shared_bytes);
  if (cooperative && blocks > resident) {
    return "a cooperative grid of " + std::to_string(blocks) + " blocks; " + std::to_string(resident) + " fit at once";
  }
  return "";
}

}  // namespace

int current_device() { return device; }

void set_thread_order(ThreadOrder order, uint64_t seed) {
  const std::lock_guard<std::mutex> lock(emulator.one_launch_at_a_time);
  emulator.order = order;
  emulator.random.seed(seed);
}

void set_dynamic_shared_limit(const void* kernel, size_t bytes) {
  const std::lock_guard<std::mutex> lock(emulator.one_launch_at_a_time);
  emulator.dynamic_shared_limit[kernel] = bytes;
}

int blocks_per_multiprocessor(int threads, size_t dynamic_shared_bytes) {
  if (threads < 1 || threads > 1024 || dynamic_shared_bytes > kMaxDynamicShared) return 0;
  const size_t by_shared_memory = 228 * 1024 / (dynamic_shared_bytes + 1024);
  return static_cast<int>(std::min<size_t>(2, by_shared_memory));  // 2 keep cooperative grids small
}

void* dynamic_shared_memory() { return current_thread("dynamic_shared").block->dynamic_shared.get(); }

void block_barrier(Place place) {
  Block& block = *current_thread("__syncthreads").block;
  arrive(block.barrier, static_cast<int>(block.threads.size()), "__syncthreads", place, [&] { release_block(block); });
}

bool block_any(bool predicate, Place place) {
  Block& block = *current_thread("__syncthreads_or").block;
  block.any = block.any || predicate;
  arrive(block.barrier, static_cast<int>(block.threads.size()), "__syncthreads_or", place, [&] {
    block.any_before = block.any;
    block.any = false;
    release_block(block);
  });
  return block.any_before;
}

void grid_barrier(Place place) {
  current_thread("grid barrier");
  if (!emulator.cooperative) fail("grid barrier at " + text(place) + " in a launch that is not cooperative");
  std::vector<Block>& blocks = *emulator.blocks;
  const size_t threads = blocks.size() * blocks[0].threads.size();
  arrive(emulator.grid_barrier, static_cast<int>(threads), "grid barrier", place, [&] {
    for (Block& block : blocks) release_block(block);
  });
}

void group_barrier(const void* key, unsigned blocks, Place place) {
  Thread& own = current_thread("group barrier");
  if (!emulator.cooperative) fail("group barrier at " + text(place) + " in a launch that is not cooperative");
  Barrier& barrier = emulator.group_barriers[key];
  const int expected = static_cast<int>(blocks * own.block->threads.size());
  if (barrier.arrived > 0 && barrier.expected != expected) {
    fail("group barrier at " + text(place) + " of " + std::to_string(blocks) + " blocks, others expect another number");
  }
  barrier.expected = expected;
  own.waits_for = key;
  arrive(barrier, expected, "group barrier", place, [&] {
    for (Block& block : *emulator.blocks) {
      for (Thread* thread : block.threads) {
        if (thread->waits_for == key) thread->state = State::runnable;
      }
    }
  });
  own.waits_for = nullptr;
}

unsigned active_lanes() {
  const Thread& thread = current_thread("__activemask");
  const Warp& warp = thread.block->warps[thread.rank / 32];
  return warp.lanes & ~warp.exited;
}

uint64_t warp_operation(WarpOperation operation, unsigned mask, uint64_t value, int source_lane, int width,
                        Place place) {
  Thread& thread = current_thread(name_of(operation));
  Warp& warp = thread.block->warps[thread.rank / 32];
  const int lane = thread.rank % 32;
  const auto refuse = [&](const std::string& why) {
    fail(std::string(name_of(operation)) + " at " + text(place) + ": " + why);
  };
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    refuse("width " + std::to_string(width) + " is not a power of two up to 32");
  }
  if ((mask >> lane & 1) == 0) refuse("the mask does not name the calling lane");
  if ((mask & ~warp.lanes) != 0) refuse("the mask names lanes that the block does not have");
  if ((mask & warp.exited) != 0) refuse("the mask names lanes that have exited");
  const WarpRequest request{operation, mask, value, source_lane, width, place};
  warp.request[lane] = request;
  warp.posted |= 1u << lane;
  if ((warp.posted & mask) != mask) {
    wait(name_of(operation), place);
    return warp.result[lane];
  }
  complete(warp, request);
  warp.posted &= ~mask;
  for (int other = 0; other < 32; ++other) {
    if (mask >> other & 1) thread.block->threads[thread.rank - lane + other]->state = State::runnable;
  }
  yield();
  if (aborting()) throw Aborted{};
  return warp.result[lane];
}

void run(const char* name, const void* kernel, bool cooperative, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
         const std::function<void()>& body) {
  const std::lock_guard<std::mutex> lock(emulator.one_launch_at_a_time);
  emulator.error = launch_error(kernel, cooperative, grid, block, dynamic_shared_bytes);
  if (!aborting()) {
    gridDim = grid;
    blockDim = block;
    emulator.body = &body;
    emulator.cooperative = cooperative;
    const size_t threads = size_t{block.x} * block.y * block.z;
    const auto index = [&](unsigned i) { return uint3{i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)}; };
    const std::vector<unsigned> order = turns(size_t{grid.x} * grid.y * grid.z);
    std::vector<Block> blocks(cooperative ? order.size() : 1);
    for (size_t i = 0; i < order.size() && !aborting(); ++i) {
      Block& own = blocks[cooperative ? i : 0];
      prepare(own, index(order[i]), block, cooperative ? i * threads : 0, dynamic_shared_bytes);
      if (!cooperative || i + 1 == order.size()) run_to_end(blocks);
    }
  }
  if (aborting()) throw std::runtime_error(std::string(name) + ": " + emulator.error);
}

}  // namespace pyreg_emulation

// For the tests: called through ctypes. Order 0 is ascending, 1 descending, 2 random.
extern "C" __attribute__((visibility("default"))) void pyreg_emulation_set_device(int index) {
  pyreg_emulation::device = index;
}

extern "C" __attribute__((visibility("default"))) void pyreg_emulation_set_thread_order(int order, uint64_t seed) {
  pyreg_emulation::set_thread_order(static_cast<pyreg_emulation::ThreadOrder>(order), seed);
}
