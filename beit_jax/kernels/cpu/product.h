// Products of float32 matrices: C = finish(A B). Every sum has the same order, whatever the threads and the other rows.
//
// A piece of work is a block of C. For every stretch of DEPTH of the sums it copies a block of B into panels of COLUMNS
// columns, which stay in the second cache, and ROWS rows of A at a time, which stay in the first; a tile of C is summed
// in registers.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>

#include "threads.h"

namespace beit {

constexpr Index DEPTH = 384, LONGEST = 768;  // of B that is copied, of B that was laid out before
constexpr Index STRIDE = LONGEST + WIDTH;    // no power of two: rows take different places in a cache
constexpr Index BLOCK_COLUMNS = 256, BLOCK_ROWS = 1024, LINE = 16;  // numbers of a line of the caches

// Element (i, j) is data[i * row + j * column]; one of both steps is 1.
struct Matrix {
  const float* data;
  Index row, column;
  const float* at(Index i, Index j) const { return data + i * row + j * column; }
};

// Memory that a thread keeps for its copies.
struct Scratch {
  float* data = nullptr;
  std::size_t size = 0;
  float* of(std::size_t wanted) {
    if (wanted > size) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, (wanted * sizeof(float) + 63) / 64 * 64));
      if (!data) throw std::bad_alloc();
      size = wanted;
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};

// Panels that hold so many columns.
INLINE Index panels_of(Index n) { return (n + COLUMNS - 1) / COLUMNS; }

// Rows of A, whose columns are neighbours, as [ROWS][STRIDE].
INLINE void copy_rows(const Matrix& a, Index row, int rows, Index k, Index depth, float* to) {
  for (int r = 0; r < rows; r++) {
    const float* from = a.at(row + r, k);
    float* line = to + r * STRIDE;
    Index i = 0;
    for (; i + WIDTH <= depth; i += WIDTH) store(line + i, load(from + i));
    for (; i < depth; i++) line[i] = from[i];
  }
}

// Columns of B as panels [depth][COLUMNS], the last one filled up with zeros.
INLINE void copy_panels(const Matrix& b, Index k, Index depth, Index column, Index columns, float* to) {
  constexpr Index AHEAD = 8;  // rows that are asked for before they are read
  if (b.column == 1) {
    // Row by row: neighbours in memory are read together, and few pages at a time.
    for (Index i = 0; i < depth; i++) {
      const float* from = b.at(k + i, column);
      if (i + AHEAD < depth)
        for (Index j = 0; j < columns; j += LINE) __builtin_prefetch(b.at(k + i + AHEAD, column) + j);
      float* line = to + i * COLUMNS;
      for (Index j = 0; j < columns; j += COLUMNS, line += depth * COLUMNS)
        for (int v = 0; v < VECTORS; v++) store(line + v * WIDTH, load(from + j + v * WIDTH, columns - j - v * WIDTH));
    }
    return;
  }
  for (Index j = 0; j < columns; j += COLUMNS, to += depth * COLUMNS)
    for (Index v = 0; v < COLUMNS; v += WIDTH)
      for (Index i = 0; i < depth; i += WIDTH) {
        Vector square[WIDTH];
        for (int c = 0; c < WIDTH; c++)
          square[c] = j + v + c < columns ? load(b.at(k + i, column + j + v + c), depth - i) : Vector{};
        turn_over(square);
        for (Index s = 0; s < std::min<Index>(WIDTH, depth - i); s++) store(to + (i + s) * COLUMNS + v, square[s]);
      }
}

// Lines of the caches that a tile asks for while it is summed: `lines` from `at` on, two in every SLOT steps.
struct Ahead {
  const float* at = nullptr;
  Index lines = 0;
};
constexpr Index SLOT = 8, FEW = 128;  // steps; after few of them what was asked for is not there yet

// C[R][COLUMNS] = or += A[R][depth] B[depth][COLUMNS]
template <int R>
__attribute__((noinline)) void tile(Index depth, const float* __restrict a, const float* __restrict b,
                                    float* __restrict c, Index row, bool add, Ahead ahead) {
  if (depth > FEW)
    for (int r = 0; r < R; r++)
      for (int v = 0; v < COLUMNS; v += LINE) __builtin_prefetch(c + r * row + v, 1);
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

// Rows are divided as evenly as tiles allow: 15 rows are 8 and 7, not 14 and 1.
struct Division {
  Index pieces, size, larger;
  Division(Index total, Index most) : pieces((total + most - 1) / most) {
    size = pieces ? total / pieces : 0;
    larger = pieces ? total % pieces : 0;
  }
  Index start(Index i) const { return i * size + std::min(i, larger); }
};

// A tile of C, `count` rows of `there` numbers that lie `row` apart: fewer than COLUMNS at the edge.
INLINE void tile_of(Tile run, Index depth, const float* a, const float* b, float* c, Index row, int count, Index there,
                    bool add, Ahead ahead) {
  if (there == COLUMNS) return run(depth, a, b, c, row, add, ahead);
  alignas(64) float edge[ROWS * COLUMNS];
  if (add)
    for (int r = 0; r < count; r++) std::memcpy(edge + r * COLUMNS, c + r * row, there * sizeof(float));
  run(depth, a, b, edge, COLUMNS, add, ahead);
  for (int r = 0; r < count; r++) std::memcpy(c + r * row, edge + r * COLUMNS, there * sizeof(float));
}

template <typename Finish>
INLINE void finish_tile(float* c, Index row, int count, Index column, Index there, const Finish& finish) {
  for (int r = 0; r < count; r++)
    for (Index v = 0; v < there; v += WIDTH) {
      float* place = c + r * row + v;
      store(place, finish(column + v, load(place, there - v), there - v), there - v);
    }
}

// finish(column, value, count): what is stored of `count` neighbours in a row of the product, which has n numbers.
template <typename Pool, typename Finish>
void multiply(Pool& pool, Index m, Index n, Index k, Matrix a, Matrix b, float* c, const Finish& finish) {
  const Tile* table = tiles();
  Index threads = std::max<Index>(1, pool.num_threads());
  Index panels = panels_of(n);
  Division down(m, BLOCK_ROWS);
  Index most = BLOCK_COLUMNS / COLUMNS;
  // Few blocks are made smaller, so that every thread has as many.
  Index across = (panels + most - 1) / most;
  if (threads > 1 && down.pieces * across < 4 * threads)
    while (across < panels && (down.pieces * across) % threads) across++;
  Division columns(panels, (panels + across - 1) / across);
  share(pool, down.pieces * columns.pieces, [&](Index piece) {
    static thread_local Scratch memory;
    Index first = columns.start(piece / down.pieces) * COLUMNS;
    Index last = std::min(n, columns.start(piece / down.pieces + 1) * COLUMNS);
    Index top = down.start(piece % down.pieces), bottom = down.start(piece % down.pieces + 1);
    Index width = panels_of(last - first) * COLUMNS;
    float* left = memory.of(ROWS * STRIDE + DEPTH * width + 64);
    float* right = left + ROWS * STRIDE;
    Division rows(bottom - top, ROWS);
    for (Index at = 0; at < k; at += DEPTH) {
      Index depth = std::min(DEPTH, k - at);
      bool ends = at + depth == k;
      copy_panels(b, at, depth, first, last - first, right);
      for (Index t = 0; t < rows.pieces; t++) {
        Index start = top + rows.start(t);
        int count = static_cast<int>(top + rows.start(t + 1) - start);
        copy_rows(a, start, count, at, depth, left);
        for (Index j = first; j < last; j += COLUMNS) {
          const float* panel = right + (j - first) * depth;
          float* to = c + start * n + j;
          Index there = std::min<Index>(COLUMNS, last - j);
          tile_of(table[count], depth, left, panel, to, n, count, there, at > 0, {});
          if (ends) finish_tile(to, n, count, j, there, finish);
        }
      }
    }
  });
}

}  // namespace beit
