// A band of tiles rounded to eight bits: the largest magnitude of each, its scale, its bytes.
#pragma once

#include "../common/fp8.h"
#include "../common/jobs.h"
#include "simd.h"

namespace megavid {
namespace MEGAVID_ISA {

template <typename T>
inline int32_t largest_of(const T* x, int64_t numbers) {
  int32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < numbers; ++i) {
    const int32_t each = magnitude_of(load(x[i]));
    largest = each > largest ? each : largest;
  }
  return largest;
}

// Numbers times `inverse(i)`. Bytes are made as whole words and written by a loop of their own: in one loop the compiler
// would narrow half of what leads to them too, in more than twice the time.
template <typename Format, typename T, typename Inverse>
inline void round_numbers(const T* x, const Inverse& inverse, uint8_t* data, int64_t numbers) {
  constexpr int64_t kWords = 32;
  int32_t word[kWords];
  int64_t first = 0;
  for (; first + kWords <= numbers; first += kWords) {
#pragma omp simd
    for (int64_t i = 0; i < kWords; ++i) word[i] = byte_of<Format>(load(x[first + i]) * inverse(first + i));
#pragma omp simd
    for (int64_t i = 0; i < kWords; ++i) data[first + i] = static_cast<uint8_t>(word[i]);
  }
  for (; first < numbers; ++first) {
    data[first] = static_cast<uint8_t>(byte_of<Format>(load(x[first]) * inverse(first)));
  }
}

template <typename T>
inline void find_largest_of_columns(const T* x, int64_t x_row, int64_t rows, int64_t columns, int32_t* largest) {
  for (int64_t i = 0; i < columns; ++i) largest[i] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = x + row * x_row;
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) {
      const int32_t each = magnitude_of(load(from[i]));
      largest[i] = each > largest[i] ? each : largest[i];
    }
  }
}

// The largest magnitude of each tile of a band, of at most kTileSide columns; tiles are `tile` wide. The lengths of the
// usual tiles are constants, for which the compiler leaves out what handles other lengths.
template <typename T>
inline void find_largest(const T* x, int64_t x_row, int64_t rows, int64_t columns, int64_t tile, int32_t* largest) {
  if (tile == 1) return find_largest_of_columns(x, x_row, rows, columns, largest);
  for (int64_t first = 0; first < columns; first += tile) {
    const int64_t numbers = columns - first < tile ? columns - first : tile;
    int32_t found = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const T* from = x + row * x_row + first;
      const int32_t each = numbers == 128  ? largest_of(from, 128)
                           : numbers == 32 ? largest_of(from, 32)
                                           : largest_of(from, numbers);
      found = each > found ? each : found;
    }
    largest[first / tile] = found;
  }
}

// One row of such a band, with the reciprocals of the tiles' scales.
template <typename Format, typename T>
inline void round_row(const T* x, int64_t columns, int64_t tile, const float* inverse, uint8_t* data) {
  if (tile == 1) return round_numbers<Format>(x, [=](int64_t i) { return inverse[i]; }, data, columns);
  for (int64_t first = 0; first < columns; first += tile) {
    const int64_t numbers = columns - first < tile ? columns - first : tile;
    const float by = inverse[first / tile];
    round_numbers<Format>(x + first, [=](int64_t) { return by; }, data + first, numbers);
  }
}

}  // namespace MEGAVID_ISA
}  // namespace megavid
