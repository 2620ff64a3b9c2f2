// Tiles of products of float32 matrices: sums of ROWS x COLUMNS numbers that stay in registers, and the copies they read.
#pragma once

#include <algorithm>

#include "memory.h"
#include "threads.h"

namespace beit {

constexpr Index LONGEST = 768;             // of a stretch of sums
constexpr Index STRIDE = LONGEST + WIDTH;  // no power of two: rows take different places in a cache
constexpr Index LINE = 16;                 // numbers of a line of the caches

// Element (i, j) is data[i * row + j * column]; one of both steps is 1.
struct Matrix {
  const float* data;
  Index row, column;
  const float* at(Index i, Index j) const { return data + i * row + j * column; }
};

// Rows are divided as evenly as tiles allow: 15 rows are 8 and 7, not 14 and 1.
struct Division {
  Index pieces, size, larger;
  Division(Index total, Index most) : pieces((total + most - 1) / most) {
    size = pieces ? total / pieces : 0;
    larger = pieces ? total % pieces : 0;
  }
  Index start(Index i) const { return i * size + std::min(i, larger); }
};

// Panels that hold so many columns.
INLINE Index panels_of(Index n) { return (n + COLUMNS - 1) / COLUMNS; }

// Rows of A, whose columns are neighbours, as [ROWS][STRIDE].
ONCE void copy_rows(const Matrix& a, Index row, int rows, Index k, Index depth, float* to) {
  for (int r = 0; r < rows; r++) {
    const float* from = a.at(row + r, k);
    float* line = to + r * STRIDE;
    Index i = 0;
    for (; i + WIDTH <= depth; i += WIDTH) store(line + i, load(from + i));
    for (; i < depth; i++) line[i] = from[i];
  }
}

// Rows of A from `top` on as tiles [ROWS][STRIDE], behind each other.
ONCE void copy_tiles(const Matrix& a, Index top, const Division& rows, Index k, Index depth, float* to) {
  if (a.column == 1) {
    for (Index t = 0; t < rows.pieces; t++)
      copy_rows(a, top + rows.start(t), static_cast<int>(rows.start(t + 1) - rows.start(t)), k, depth,
                to + t * ROWS * STRIDE);
    return;
  }
  // Neighbours in memory, which are in several tiles, are read together.
  Index all = rows.start(rows.pieces);
  for (Index i = 0; i < depth; i += WIDTH)
    for (Index t = 0; t < rows.pieces; t++) {
      Index first = rows.start(t), count = rows.start(t + 1) - first;
      for (Index r = 0; r < count; r += WIDTH) {
        Index there = std::min<Index>(WIDTH, all - first - r), lines = std::min<Index>(WIDTH, depth - i);
        Vector square[WIDTH];
        for (int s = 0; s < WIDTH; s++)
          if (i + WIDTH + s < depth) __builtin_prefetch(a.at(top + first + r, k + i + WIDTH + s), 0, 2);
        const float* from = a.at(top + first + r, k + i);
        for (int s = 0; s < WIDTH; s++) square[s] = s < lines ? load(from + s * a.column, there) : Vector{};
        turn_over(square);
        for (int c = 0; c < std::min<Index>(WIDTH, count - r); c++)
          store(to + (t * ROWS + r + c) * STRIDE + i, square[c]);
      }
    }
}

// Columns of B as panels [depth][COLUMNS] that lie `apart`, the last one filled up with zeros: in the caches if they are
// read AT_ONCE, or else past them.
template <bool AT_ONCE>
ONCE void copy_panels(const Matrix& b, Index k, Index depth, Index column, Index columns, float* to, Index apart) {
  constexpr Index AHEAD = 8;  // rows that are asked for before they are read
  auto put = [](float* place, Vector value, bool whole_lines) __attribute__((always_inline)) {
    AT_ONCE || !whole_lines ? store(place, value) : store_past_caches(place, value);
  };
  if (b.column == 1) {
    // Row by row: neighbours in memory are read together, and few pages at a time.
    for (Index i = 0; i < depth; i++) {
      const float* from = b.at(k + i, column);
      if (i + AHEAD < depth)
        for (Index j = 0; j < columns; j += LINE) __builtin_prefetch(b.at(k + i + AHEAD, column) + j);
      float* line = to + i * COLUMNS;
      for (Index j = 0; j < columns; j += COLUMNS, line += apart)
        for (int v = 0; v < VECTORS; v++) put(line + v * WIDTH, load(from + j + v * WIDTH, columns - j - v * WIDTH), true);
    }
    return;
  }
  for (Index j = 0; j < columns; j += COLUMNS, to += apart)
    for (Index v = 0; v < COLUMNS; v += WIDTH)
      for (Index i = 0; i < depth; i += WIDTH) {
        Vector square[WIDTH];
        for (int c = 0; c < WIDTH; c++)
          square[c] = j + v + c < columns ? load(b.at(k + i, column + j + v + c), depth - i) : Vector{};
        turn_over(square);
        for (Index s = 0; s < std::min<Index>(WIDTH, depth - i); s++)
          put(to + (i + s) * COLUMNS + v, square[s], WIDTH == LINE);
      }
}

// Behind each other, and read at once.
INLINE void copy_panels(const Matrix& b, Index k, Index depth, Index column, Index columns, float* to) {
  copy_panels<true>(b, k, depth, column, columns, to, depth * COLUMNS);
}

// Lines of the caches that a tile asks for while it is summed: `lines` from `at` on, two in every SLOT steps.
struct Ahead {
  const float* at = nullptr;
  Index lines = 0;
};
constexpr Index SLOT = 8, FEW = 128;  // steps; after few of them what was asked for is not there yet

// Rows of C, `row` apart, that are about to be written.
INLINE void ask_for_rows(const float* c, Index row, int count) {
  for (int r = 0; r < count; r++)
    for (int v = 0; v < COLUMNS; v += LINE) __builtin_prefetch(c + r * row + v, 1);
}

// C[R][COLUMNS] = or += A[R][depth] B[depth][COLUMNS]
template <int R>
__attribute__((noinline)) void tile(Index depth, const float* __restrict a, const float* __restrict b,
                                    float* __restrict c, Index row, bool add, Ahead ahead) {
  if (depth > FEW) ask_for_rows(c, row, R);
  Vector sums[R][VECTORS];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < VECTORS; v++) sums[r][v] = Vector{};
  auto step = [&](Index k) __attribute__((always_inline)) {
    Vector right[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) right[v] = load(b + k * COLUMNS + v * WIDTH);
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) {
      Vector left = all(a[r * STRIDE + k]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) sums[r][v] += left * right[v];
    }
  };
  Index k = 0;
  while (k + SLOT <= depth) {
    for (int i = 0; i < 2 && ahead.lines > 0; i++, ahead.lines--, ahead.at += LINE) __builtin_prefetch(ahead.at, 0, 2);
#pragma GCC unroll 8
    for (Index end = k + SLOT; k < end; k++) step(k);
  }
  for (; k < depth; k++) step(k);
#pragma GCC unroll 16
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) {
      float* to = c + r * row + v * WIDTH;
      store(to, add ? load(to) + sums[r][v] : sums[r][v]);
    }
}

using Tile = void (*)(Index, const float*, const float*, float*, Index, bool, Ahead);

template <int R>
struct Tiles {
  static void fill(Tile* table) {
    table[R] = tile<R>;
    Tiles<R - 1>::fill(table);
  }
};
template <>
struct Tiles<0> {
  static void fill(Tile*) {}
};

inline const Tile* tiles() {
  static const struct Table {
    Tile table[ROWS + 1];
    Table() { Tiles<ROWS>::fill(table); }
  } made;
  return made.table;
}

// Sums that are not at their end, C = or += A B: `count` rows of `there` numbers, which are fewer than COLUMNS at the edge.
ONCE void tile_of(Tile run, Index depth, const float* a, const float* b, float* c, Index row, int count, Index there,
                  bool add, Ahead ahead) {
  if (there == COLUMNS) return run(depth, a, b, c, row, add, ahead);
  alignas(64) float edge[ROWS * COLUMNS];
  if (add)
    for (int r = 0; r < count; r++) std::memcpy(edge + r * COLUMNS, c + r * row, there * sizeof(float));
  run(depth, a, b, edge, COLUMNS, add, ahead);
  for (int r = 0; r < count; r++) std::memcpy(c + r * row, edge + r * COLUMNS, there * sizeof(float));
}

// C = finish(sums), of [count][COLUMNS] sums, or of what they add to C.
template <typename Finish>
INLINE void finish_tile(const float* sums, float* c, Index row, int count, Index column, Index there, bool add,
                        const Finish& finish) {
  for (int r = 0; r < count; r++)
    for (Index v = 0; v < there; v += WIDTH) {
      float* place = c + r * row + v;
      Vector value = load(sums + r * COLUMNS + v);
      if (add) value = load(place, there - v) + value;
      store(place, finish(column + v, value, there - v), there - v);
    }
}

}  // namespace beit
