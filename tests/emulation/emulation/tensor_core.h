// Matrix products and loads of tensor cores. Which lane holds which elements is from the PTX ISA, sections
// "Matrix Fragments for mma.m16n8k16 with floating point type" and "ldmatrix"; lane = 4 * g + t:
//   A 16x16, element i of 8 (two in a register): row g, + 8 where i is 2, 3, 6 or 7;
//            column 2 t + i % 2, + 8 where i is 4 or more
//   B 16x8, element i of 4: row 2 t + i % 2, + 8 where i is 2 or more; column g
//   C 16x8, element i of 4: row g, + 8 where i is 2 or more; column 2 t + i % 2
#pragma once

#include <cstdint>
#include <string>

#include "async_copy.h"
#include "half.h"
#include "shared_memory.h"
#include "warp.h"

namespace emu {

// c += A B. Every lane converts its own elements, and computes its own of C: products and sums in float, in
// the order of k (devices do not say which order is theirs).
template <float (*kValue)(unsigned)>
void multiply_m16n8k16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, const Place& place) {
  struct Elements {
    float a[8], b[4];
  };
  static_assert(sizeof(Elements) <= LaneValues::kBytes);
  if (cfg.arch < 800) fail(to_string(place) + ": mma.m16n8k16 needs compute capability 8.0");
  Elements own;
  const unsigned words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  for (int i = 0; i < 6; ++i) {
    float* to = i < 4 ? own.a + 2 * i : own.b + 2 * (i - 4);
    to[0] = kValue(words[i] & 0xffff);
    to[1] = kValue(words[i] >> 16);
  }
  const LaneValues& values = meet(~0u, &own, sizeof own, WarpOperation::kProduct, place);
  Unwatched unwatched;
  const auto of_lane = [&](unsigned lane) -> const Elements& {
    return *reinterpret_cast<const Elements*>(values.of_lane[lane]);
  };
  const unsigned g = current().lane() / 4, t = current().lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned lower = i / 2, column = 2 * t + i % 2;  // C's row is g + 8 * lower
    float sum = c[i];
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned holder = k % 8 / 2, element = k % 2;
      sum += of_lane(4 * g + holder).a[element + 2 * lower + 4 * (k / 8)] *
             of_lane(4 * column + holder).b[element + 2 * (k / 8)];
    }
    c[i] = sum;
  }
}

// As multiply_m16n8k16, of half of A and B each: m16n8k8, which the PTX ISA calls alike.
template <float (*kValue)(unsigned)>
void multiply_m16n8k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b, const Place& place) {
  const float own[6] = {kValue(a0 & 0xffff), kValue(a0 >> 16),   kValue(a1 & 0xffff),
                        kValue(a1 >> 16),    kValue(b & 0xffff), kValue(b >> 16)};
  const LaneValues& values = meet(~0u, own, sizeof own, WarpOperation::kProduct, place);
  Unwatched unwatched;
  const auto of_lane = [&](unsigned lane) { return reinterpret_cast<const float*>(values.of_lane[lane]); };
  const unsigned g = current().lane() / 4, t = current().lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned k = 0; k < 8; ++k) {
      c[i] += of_lane(4 * g + k / 2)[i / 2 * 2 + k % 2] * of_lane(4 * (2 * t + i % 2) + k / 2)[4 + k % 2];
    }
  }
}

// ldmatrix .x4: lane l gives the address of row l % 8 of matrix l / 8. rows[i][j] becomes the address of row
// first + j of matrix i. The caller reads there, where sanitizers see it.
template <unsigned kRows>
void exchange_rows(const char* (&rows)[4][kRows], unsigned first, const void* row, const Place& place) {
  trace::matrix_row(row);
  Unwatched unwatched;
  if (!aligned16(row)) fail(to_string(place) + ": a matrix row's address is no multiple of 16 bytes");
  if (!shared_memory.contains(row)) fail(to_string(place) + ": a matrix row is not in shared memory");
  const LaneValues& values = meet(~0u, &row, sizeof row, WarpOperation::kMatrices, place);
  for (unsigned i = 0; i < 4; ++i) {
    for (unsigned j = 0; j < kRows; ++j) rows[i][j] = values.get<const char*>(8 * i + first + j);
  }
}

}  // namespace emu

#define GREEDYNAS_PLACE , emu::Place place = emu::Place::current()
#define GREEDYNAS_SAME_PLACE , place

namespace greedynas::cuda {

inline void multiply_f16_k8(float (&c)[4], unsigned a0, unsigned a1, unsigned b,
                            emu::Place place = emu::Place::current()) {
  emu::multiply_m16n8k8<emu::half_value>(c, a0, a1, b, place);
}
inline void multiply_bf16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                          emu::Place place = emu::Place::current()) {
  emu::multiply_m16n8k16<emu::bfloat16_value>(c, a, b0, b1, place);
}
inline void multiply_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                         emu::Place place = emu::Place::current()) {
  emu::multiply_m16n8k16<emu::half_value>(c, a, b0, b1, place);
}
// C = A B
inline void multiply_bf16_first(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                                emu::Place place = emu::Place::current()) {
  c[0] = c[1] = c[2] = c[3] = 0.f;
  multiply_bf16(c, a, b0, b1, place);
}
inline void multiply_f16_first(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1,
                               emu::Place place = emu::Place::current()) {
  c[0] = c[1] = c[2] = c[3] = 0.f;
  multiply_f16(c, a, b0, b1, place);
}

// Elements 2 t and 2 t + 1 of row g of each matrix.
inline void load_matrices(unsigned (&r)[4], const void* row, emu::Place place = emu::Place::current()) {
  const unsigned g = emu::current().lane() / 4, t = emu::current().lane() % 4;
  const char* rows[4][1];
  emu::exchange_rows(rows, g, row, place);
  const emu::trace::Paused paused;
  for (unsigned i = 0; i < 4; ++i) r[i] = reinterpret_cast<const unsigned*>(rows[i][0])[t];
}
// Elements 2 t and 2 t + 1 of column g.
inline void load_matrices_transposed(unsigned (&r)[4], const void* row,
                                     emu::Place place = emu::Place::current()) {
  const unsigned g = emu::current().lane() / 4, t = emu::current().lane() % 4;
  const char* rows[4][2];
  emu::exchange_rows(rows, 2 * t, row, place);
  const emu::trace::Paused paused;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned low = reinterpret_cast<const std::uint16_t*>(rows[i][0])[g];
    const unsigned high = reinterpret_cast<const std::uint16_t*>(rows[i][1])[g];
    r[i] = low | high << 16;
  }
}

}  // namespace greedynas::cuda
