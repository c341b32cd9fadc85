// The least traffic that an operator can cause, as bare loops: what `bench/floor.py` times beside the operators.
//
// And the least work where that is exponentials: 2^x by a polynomial of degree 6, as few roundings as float has.
//
// Threads are std::thread, started in each call and joined (20 us; the floors that are compared take milliseconds): a
// second OpenMP runtime beside torch's would leave spinning workers on the cores that the contenders are timed on.
// Sums and masks are of 64-bit words, whatever the dtype: integer sums vectorise without -ffast-math.

#include <sys/mman.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

struct Span {
  uint64_t* data;
  int64_t words;
};

// Cuts the spans, laid end to end, into `threads` equal parts; work(span, begin, end, offset) handles the words
// [begin, end) of one span, the first of which is word `offset` of the whole.
template <typename Work>
void in_parallel(const Span* spans, int64_t count, int threads, const Work& work) {
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += spans[i].words;
  auto part = [&](int thread) {
    const int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
    int64_t offset = 0;
    for (int64_t i = 0; i < count; offset += spans[i++].words) {
      const int64_t begin = first > offset ? first - offset : 0;
      const int64_t end = last - offset < spans[i].words ? last - offset : spans[i].words;
      if (begin < end) work(i, begin, end, offset + begin);
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(part, thread);
  part(0);
  for (std::thread& other : others) other.join();
}

constexpr uintptr_t kHugePage = 2 << 20;

}  // namespace

extern "C" {

// Reads every word. The sum is returned so that the reads are not optimised away.
uint64_t read_spans(const Span* spans, int64_t count, int threads) {
  std::atomic<uint64_t> sum{0};
  in_parallel(spans, count, threads, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
    const uint64_t* data = spans[i].data;
    uint64_t part = 0;
    for (int64_t k = begin; k < end; ++k) part += data[k];
    sum += part;
  });
  return sum;
}

// Reads every word and writes it to `destination`.
void copy_spans(const Span* spans, int64_t count, int threads, uint64_t* destination) {
  in_parallel(spans, count, threads, [&](int64_t i, int64_t begin, int64_t end, int64_t offset) {
    const uint64_t* data = spans[i].data;
    uint64_t* out = destination + offset - begin;
    for (int64_t k = begin; k < end; ++k) out[k] = data[k];
  });
}

// The same into memory that the kernel has to hand out in this call, in huge pages, and takes back at the end:
// what a large output tensor costs that is allocated and freed in every training step. Returns 0, or 1 without memory.
int copy_spans_to_fresh_memory(const Span* spans, int64_t count, int threads) {
  int64_t words = 0;
  for (int64_t i = 0; i < count; ++i) words += spans[i].words;
  const size_t size = static_cast<size_t>(words) * sizeof(uint64_t) + kHugePage;
  void* mapping = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) return 1;
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(mapping) + kHugePage - 1) & ~(kHugePage - 1);
#ifdef MADV_HUGEPAGE
  madvise(reinterpret_cast<void*>(aligned), size - kHugePage, MADV_HUGEPAGE);
#endif
  copy_spans(spans, count, threads, reinterpret_cast<uint64_t*>(aligned));
  munmap(mapping, size);
  return 0;
}

// Reads both lists (spans of equal sizes in pairs) and writes `updated` in place. `mask` is 0 in every call, which the
// compiler does not know: the values stay, the traffic is real.
void update_spans(const Span* inputs, const Span* updated, int64_t count, int threads, uint64_t mask) {
  in_parallel(updated, count, threads, [&](int64_t i, int64_t begin, int64_t end, int64_t) {
    const uint64_t* in = inputs[i].data;
    uint64_t* out = updated[i].data;
    for (int64_t k = begin; k < end; ++k) out[k] ^= in[k] & mask;
  });
}

// 2^x of `count` floats, which lie in the first-level cache, and their sum.
float exponentials(int64_t count, int threads) {
  constexpr int64_t kBlock = 4096;
  std::atomic<float> sum{0};
  auto part = [&](int64_t blocks) {
    alignas(64) float x[kBlock], totals[64] = {};
    for (int64_t k = 0; k < kBlock; ++k) x[k] = -static_cast<float>(k) / 128;
    for (int64_t block = 0; block < blocks; ++block) {
      for (int64_t k = 0; k < kBlock; k += 64) {
        for (int64_t lane = 0; lane < 64; ++lane) {
          const float shifted = x[k + lane] + 12582912.0f;  // its last bits are the nearest integer
          const float r = x[k + lane] - (shifted - 12582912.0f);
          int32_t bits;
          memcpy(&bits, &shifted, sizeof(bits));
          const int32_t exponent = (bits - 0x4b400000 + 127) << 23;
          float power;
          memcpy(&power, &exponent, sizeof(power));
          float p = 0.00015345811f;
          p = p * r + 0.0013399931f;
          p = p * r + 0.009618489f;
          p = p * r + 0.055503286f;
          p = p * r + 0.24022646f;
          p = p * r + 0.6931472f;
          totals[lane] += (p * r + 1.0f) * power;
        }
      }
    }
    float total = 0;
    for (const float lane : totals) total += lane;
    sum.fetch_add(total);
  };
  const int64_t blocks = count / kBlock;
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(part, blocks / threads);
  part(blocks - blocks / threads * (threads - 1));
  for (std::thread& other : others) other.join();
  return sum;
}

}  // extern "C"
