// Rows on the CPU: a tensor [outer, classes, inner] is outer * inner rows of `classes` elements each.
//
// With inner == 1 a row is contiguous and is handed on as it lies. Otherwise neighbouring rows are interleaved: a tile
// of them is copied into contiguous scratch in the accumulation type, processed there, and copied back, so that every
// cache line is read once and each operator has one row kernel only.
#pragma once

#include <cstdlib>

#include "core/dtype.h"
#include "core/parallel.h"

namespace pyreg {

struct RowLayout {
  int64_t outer;
  int64_t classes;
  int64_t inner;
  int64_t rows() const { return outer * inner; }
};

}  // namespace pyreg

#if defined(PYREG_ISA)
namespace pyreg::PYREG_ISA {

// Rows of a tile: 16 floats are a cache line.
constexpr int64_t kTileRows = 16;

// Memory that begins with a cache line: a vector of 64 bytes elsewhere would be read from two of them.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    constexpr size_t kLine = 64;
    const size_t bytes = sizeof(T) * static_cast<size_t>(count > 0 ? count : 1);
    data_ = static_cast<T*>(aligned_alloc(kLine, (bytes + kLine - 1) / kLine * kLine));
    if (data_ == nullptr) abort();
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() const { return data_; }
  void swap(Scratch& other) {
    T* const data = data_;
    data_ = other.data_;
    other.data_ = data;
  }

 private:
  T* data_;
};

template <typename Storage>
void gather_tile(const Storage* from, int64_t classes, int64_t inner, int64_t count, Accumulate<Storage>* to) {
  for (int64_t j = 0; j < classes; ++j) {
    for (int64_t k = 0; k < count; ++k) to[k * classes + j] = ::pyreg::widen(from[j * inner + k]);
  }
}

template <typename Storage>
void scatter_tile(const Accumulate<Storage>* from, int64_t classes, int64_t inner, int64_t count, Storage* to) {
  for (int64_t j = 0; j < classes; ++j) {
    for (int64_t k = 0; k < count; ++k) to[j * inner + k] = ::pyreg::narrow<Storage>(from[k * classes + j]);
  }
}

// Calls body(row, first_row, second_row, out_row) for every row, in parallel; `second` and `out` may be null.
// `first_stride` is the distance between rows of `first` where inner == 1.
template <typename First, typename Second, typename Out, typename Body>
void for_each_row(const RowLayout& layout, const First* first, int64_t first_stride, const Second* second, Out* out,
                  Body&& body) {
  using A = Accumulate<First>;
  const int64_t classes = layout.classes, inner = layout.inner;
  const int64_t elements_per_row = classes > 8 ? classes : 8;
  if (layout.rows() == 0) return;
  if (inner == 1) {
    parallel_for(layout.outer, (kElementsPerTask + elements_per_row - 1) / elements_per_row,
                 [&](int64_t begin, int64_t end) {
                   for (int64_t row = begin; row < end; ++row) {
                     body(row, first + row * first_stride, second ? second + row * classes : nullptr,
                          out ? out + row * classes : nullptr);
                   }
                 });
    return;
  }
  const int64_t tiles = (inner + kTileRows - 1) / kTileRows;
  const int64_t elements_per_tile = elements_per_row * (inner < kTileRows ? inner : kTileRows);
  parallel_for(layout.outer * tiles, (kElementsPerTask + elements_per_tile - 1) / elements_per_tile,
               [&](int64_t begin, int64_t end) {
                 Scratch<A> first_tile(kTileRows * classes);
                 Scratch<A> second_tile(second ? kTileRows * classes : 0);
                 Scratch<A> out_tile(out ? kTileRows * classes : 0);
                 for (int64_t tile = begin; tile < end; ++tile) {
                   const int64_t block = tile / tiles, column = tile % tiles * kTileRows;
                   const int64_t count = inner - column < kTileRows ? inner - column : kTileRows;
                   const int64_t offset = block * classes * inner + column;
                   gather_tile(first + offset, classes, inner, count, first_tile.get());
                   if (second) gather_tile(second + offset, classes, inner, count, second_tile.get());
                   for (int64_t k = 0; k < count; ++k) {
                     body(block * inner + column + k, static_cast<const A*>(first_tile.get()) + k * classes,
                          second ? static_cast<const A*>(second_tile.get()) + k * classes : nullptr,
                          out ? out_tile.get() + k * classes : nullptr);
                   }
                   if (out) scatter_tile(out_tile.get(), classes, inner, count, out + offset);
                 }
               });
}

}  // namespace pyreg::PYREG_ISA
#endif
