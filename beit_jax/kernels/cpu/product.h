// Products of float32 matrices: C = finish(A B). Every sum has the same order, whatever the threads and the other rows.
//
// Tiles read the columns of B as panels [k][COLUMNS]. A piece of work is a block of C. It copies its rows of A, which
// stay in the second cache, and then takes one panel after the other, with all tiles of rows. While they are summed, the
// next panel is on its way from memory.
#pragma once

#include <unistd.h>

#include "tiles.h"

namespace beit {

// Lays out the columns of `layers` matrices, k n numbers apart, as [layers][panels][k][COLUMNS]. It reads them in the
// order in which they lie in memory.
template <typename Pool>
void pack(Pool& pool, Index layers, Index n, Index k, Matrix first, float* to) {
  Index panels = panels_of(n);
  bool by_rows = first.column == 1;
  Division down(k, by_rows ? 64 : k), across(panels, by_rows ? panels : 256 / COLUMNS);
  share(pool, layers * down.pieces * across.pieces, [&](Index piece) {
    Index i = piece / across.pieces % down.pieces, j = piece % across.pieces;
    Index layer = piece / across.pieces / down.pieces, row = down.start(i), column = across.start(j) * COLUMNS;
    Index columns = std::min(n, across.start(j + 1) * COLUMNS) - column;
    copy_panels({first.data + layer * k * n, first.row, first.column}, row, down.start(i + 1) - row, column, columns,
                to + layer * panels * k * COLUMNS + across.start(j) * k * COLUMNS + row * COLUMNS, k * COLUMNS);
  });
}

// Rows of A that leave most of the second cache to a panel, to the one that is on its way, and to others.
inline Index resident_rows() {
  static const Index rows = [] {
    Index cache = 0;
#ifdef _SC_LEVEL2_CACHE_SIZE
    cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    if (cache <= 0) cache = 1 << 20;  // the system does not say
    return std::max<Index>(cache * 3 / 10 / (LONGEST * sizeof(float)) / ROWS, 2) * ROWS;
  }();
  return rows;
}

// The right factor of a product: panels [panels][k][COLUMNS] or, where there are none, the matrix, of which a piece of
// work copies some panels at a time.
struct Right {
  const float* panels;
  Matrix matrix;
};

// finish(column, value, count): what is stored of `count` neighbours in a row of the product, which has n numbers.
template <typename Pool, typename Finish>
void multiply(Pool& pool, Index m, Index n, Index k, Matrix a, Right b, float* c, const Finish& finish) {
  constexpr Index SIDE = 128 / COLUMNS;  // panels that are copied at a time
  const Tile* table = tiles();
  Index threads = std::max<Index>(1, pool.num_threads()), panels = panels_of(n);
  Division down(m, b.panels ? resident_rows() : m), stretches(k, LONGEST);
  Index across = 1, least = (b.panels ? 4 : 1) * threads;
  // Several pieces for every thread: one whose core is slower takes fewer. But each of them copies its rows of A, which
  // takes long where they are few.
  if (threads > 1)
    while (across < panels && (down.pieces * across < least || down.pieces * across % threads)) across++;
  Division columns(panels, (panels + across - 1) / across);
  share(pool, down.pieces * columns.pieces, [&](Index piece) {
    static thread_local Scratch memory;
    Index first = columns.start(piece / down.pieces), last = columns.start(piece / down.pieces + 1);
    Index top = down.start(piece % down.pieces);
    Division rows(down.start(piece % down.pieces + 1) - top, ROWS);
    float* left = memory.of(rows.pieces * ROWS * STRIDE + (b.panels ? 0 : SIDE * COLUMNS * LONGEST));
    float* copied = left + rows.pieces * ROWS * STRIDE;
    for (Index s = 0; s < stretches.pieces; s++) {
      Index at = stretches.start(s), depth = stretches.start(s + 1) - at;
      bool ends = at + depth == k;
      copy_tiles(a, top, rows, at, depth, left);
      for (Index p = first; p < last; p++) {
        Index number = (p - first) % SIDE, there = std::min<Index>(COLUMNS, n - p * COLUMNS);
        const float *panel = copied + number * depth * COLUMNS, *next = nullptr;
        Index lines = 0;  // of the next panel
        if (b.panels) {
          panel = b.panels + (p * k + at) * COLUMNS;
          next = p + 1 < last ? panel + k * COLUMNS : b.panels + (first * k + at + depth) * COLUMNS;
          lines = (p + 1 < last ? depth : ends ? 0 : stretches.start(s + 2) - at - depth) * COLUMNS / LINE;
        } else if (number == 0) {
          Index column = p * COLUMNS;
          copy_panels(b.matrix, at, depth, column, std::min(std::min(SIDE, last - p) * COLUMNS, n - column), copied);
        }
        Division shares(lines, std::max<Index>(1, (lines - 1) / rows.pieces + 1));
        for (Index t = 0; t < rows.pieces; t++) {
          Index start = top + rows.start(t);
          int count = static_cast<int>(top + rows.start(t + 1) - start);
          Ahead ahead;
          if (t < shares.pieces) ahead = {next + shares.start(t) * LINE, shares.start(t + 1) - shares.start(t)};
          tile_of(table[count], depth, left + t * ROWS * STRIDE, panel, c + start * n + p * COLUMNS, n, count, there,
                  at > 0, ahead);
          if (ends) finish_tile(c + start * n + p * COLUMNS, n, count, p * COLUMNS, there, finish);
        }
      }
    }
  });
}

// As `multiply`. Where rows of A are in several pieces of work, a matrix is laid out first, once for all of them.
template <typename Pool, typename Finish>
void product(Pool& pool, Index m, Index n, Index k, Matrix a, Right b, float* c, const Finish& finish) {
  if (b.panels || m <= resident_rows() * 5 / 4) return multiply(pool, m, n, k, a, b, c, finish);
  Borrowed memory;
  float* panels = memory.of(panels_of(n) * COLUMNS * k);
  pack(pool, 1, n, k, b.matrix, panels);
  multiply(pool, m, n, k, a, Right{panels, {}}, c, finish);
}

}  // namespace beit
