// Numbers rounded to eight bits, with one scale given, or with a scale of every tile's own; and their largest magnitude.
//
// Memory traffic per number: read once, one byte written; largest magnitude: read once. A tile is read again for its
// bytes while it is in the first- or second-level cache. Transposed matrices are written through a buffer of 16 KiB that
// stays in the first-level cache, 8 x 8 bytes at a time.
#include "fp8_tiles.h"
#include "kernels.h"
#include "simd.h"

namespace megavid {
namespace MEGAVID_ISA {
namespace {

template <typename T>
void amax(const QuantizeFp8& job, int64_t begin, int64_t end) {
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t first = chunk * kAmaxNumbers, left = job.numbers - first;
    const T* x = static_cast<const T*>(job.x) + first;
    job.amax[chunk] = float_of(largest_of(x, left < kAmaxNumbers ? left : kAmaxNumbers));
  }
}

template <typename T>
void quantize(const QuantizeFp8& job, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(job.x) + begin;
  const float reciprocal = 1.0f / *job.scale;
  const auto inverse = [=](int64_t) { return reciprocal; };
  job.is_e5m2 ? round_numbers<E5M2>(x, inverse, job.data + begin, end - begin)
              : round_numbers<E4M3>(x, inverse, job.data + begin, end - begin);
}

// The numbers of a under the mask, `width` bits further up, and those of b under it change places.
inline void exchange(uint64_t* a, uint64_t* b, int width, uint64_t mask) {
  const uint64_t changed = ((*a >> width) ^ *b) & mask;
  *b ^= changed;
  *a ^= changed << width;
}

// 8 x 8 bytes transposed; byte 0 of a word is its lowest, as on every processor this is compiled for.
inline void transpose_eight(const uint8_t* from, int64_t from_row, uint8_t* to, int64_t to_row) {
  uint64_t word[8];
  for (int i = 0; i < 8; ++i) std::memcpy(word + i, from + i * from_row, 8);
  for (int i = 0; i < 4; ++i) exchange(word + i, word + i + 4, 32, 0x00000000ffffffffu);
  for (int i = 0; i < 8; i += i % 4 == 1 ? 3 : 1) exchange(word + i, word + i + 2, 16, 0x0000ffff0000ffffu);
  for (int i = 0; i < 8; i += 2) exchange(word + i, word + i + 1, 8, 0x00ff00ff00ff00ffu);
  for (int i = 0; i < 8; ++i) std::memcpy(to + i * to_row, word + i, 8);
}

void transpose(const uint8_t* from, int64_t rows, int64_t columns, uint8_t* to, int64_t to_row) {
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t column = 0; column < whole_columns; column += 8) {
    for (int64_t row = 0; row < whole_rows; row += 8) {
      transpose_eight(from + row * kTileSide + column, kTileSide, to + column * to_row + row, to_row);
    }
  }
  for (int64_t column = 0; column < columns; ++column) {
    for (int64_t row = column < whole_columns ? whole_rows : 0; row < rows; ++row) {
      to[column * to_row + row] = from[row * kTileSide + column];
    }
  }
}

// Up to kTileSide columns of one band of tiles: of matrix `matrix`, tile row `band`, from column `first`.
template <typename Format, typename T>
void round_strip(const QuantizeFp8Tiles& job, int64_t matrix, int64_t band, int64_t first, uint8_t* buffer) {
  const int64_t top = band * job.tile_rows, tile = job.tile_columns;
  const int64_t rows = job.rows - top < job.tile_rows ? job.rows - top : job.tile_rows;
  const int64_t columns = job.width - first < kTileSide ? job.width - first : kTileSide;
  const T* x = static_cast<const T*>(job.x) + matrix * job.x_matrix + top * job.x_row + first;
  int32_t exponent[kTileSide];
  float inverse[kTileSide];
  find_largest(x, job.x_row, rows, columns, tile, exponent);
  const int64_t tiles = (columns + tile - 1) / tile;
#pragma omp simd
  for (int64_t i = 0; i < tiles; ++i) {
    exponent[i] = exponent_of<Format>(exponent[i]);
    inverse[i] = inverse_of(exponent[i]);
  }
  const int64_t down = (job.rows + job.tile_rows - 1) / job.tile_rows, across = (job.width + tile - 1) / tile;
  const int64_t step = job.is_transposed ? down : 1;
  const int64_t column = first / tile;
  const int64_t place = matrix * down * across + (job.is_transposed ? column * down + band : band * across + column);
  for (int64_t i = 0; i < tiles; ++i) {
    if (job.scale != nullptr) {
      job.scale[place + i * step] = scale_of(exponent[i]);
    } else {
      job.scale_byte[place + i * step] = static_cast<uint8_t>(exponent[i]);
    }
  }
  uint8_t* data = job.data + matrix * job.rows * job.width;
  for (int64_t row = 0; row < rows; ++row) {
    uint8_t* to = job.is_transposed ? buffer + row * kTileSide : data + (top + row) * job.width + first;
    round_row<Format>(x + row * job.x_row, columns, tile, inverse, to);
  }
  if (job.is_transposed) transpose(buffer, rows, columns, data + first * job.rows + top, job.rows);
}

// Strips of all matrices: one band after the other, of each its strips from left to right.
template <typename Format, typename T>
void round_strips(const QuantizeFp8Tiles& job, int64_t begin, int64_t end) {
  uint8_t buffer[kTileSide * kTileSide];
  const int64_t bands = (job.rows + job.tile_rows - 1) / job.tile_rows;
  const int64_t strips = (job.width + kTileSide - 1) / kTileSide;
  int64_t strip = begin % strips, band = begin / strips % bands, matrix = begin / strips / bands;
  for (int64_t i = begin; i < end; ++i) {
    round_strip<Format, T>(job, matrix, band, strip * kTileSide, buffer);
    if (++strip < strips) continue;
    strip = 0;
    if (++band < bands) continue;
    band = 0;
    ++matrix;
  }
}

template <typename T>
void tiles(const QuantizeFp8Tiles& job, int64_t begin, int64_t end) {
  job.is_e5m2 ? round_strips<E5M2, T>(job, begin, end) : round_strips<E4M3, T>(job, begin, end);
}

}  // namespace
}  // namespace MEGAVID_ISA
}  // namespace megavid

MEGAVID_ENTRY(fp8_amax, QuantizeFp8, amax)
MEGAVID_ENTRY(quantize_fp8, QuantizeFp8, quantize)
MEGAVID_ENTRY(quantize_fp8_tiles, QuantizeFp8Tiles, tiles)
