// Products whose right factor was laid out as they read it, once and for all: as panels [k][COLUMNS].
//
// A piece of work is a block of C. It copies its rows of A, which stay in the second cache, and then takes one panel
// after the other, with all tiles of rows. While they are summed, the next panel is on its way from memory.
#pragma once

#include <unistd.h>

#include "product.h"

namespace beit {

// Lays out matrices [k][n], `layers` of them behind each other, as [layers][panels][k][COLUMNS].
template <typename Pool>
void pack(Pool& pool, Index layers, Index n, Index k, const float* matrices, float* to) {
  constexpr Index SIDE = BLOCK_COLUMNS / COLUMNS;
  Index panels = panels_of(n), blocks = (panels + SIDE - 1) / SIDE;
  share(pool, layers * blocks, [&](Index piece) {
    Index layer = piece / blocks, panel = piece % blocks * SIDE, column = panel * COLUMNS;
    copy_panels({matrices + layer * k * n, n, 1}, 0, k, column, std::min(BLOCK_COLUMNS, n - column),
                to + (layer * panels + panel) * k * COLUMNS);
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

// As `multiply`; b: [panels][k][COLUMNS].
template <typename Pool, typename Finish>
void multiply_packed(Pool& pool, Index m, Index n, Index k, Matrix a, const float* b, float* c, const Finish& finish) {
  const Tile* table = tiles();
  Index threads = std::max<Index>(1, pool.num_threads()), panels = panels_of(n);
  Division down(m, resident_rows());
  Index across = 1;
  // Several pieces for every thread: one whose core is slower takes fewer.
  if (threads > 1)
    while (across < panels && (down.pieces * across < 4 * threads || down.pieces * across % threads)) across++;
  Division columns(panels, (panels + across - 1) / across);
  share(pool, down.pieces * columns.pieces, [&](Index piece) {
    static thread_local Scratch memory;
    Index first = columns.start(piece / down.pieces), last = columns.start(piece / down.pieces + 1);
    Index top = down.start(piece % down.pieces);
    Division rows(down.start(piece % down.pieces + 1) - top, ROWS);
    float* left = memory.of(rows.pieces * ROWS * STRIDE);
    for (Index at = 0; at < k; at += LONGEST) {
      Index depth = std::min(LONGEST, k - at);
      bool ends = at + depth == k;
      for (Index t = 0; t < rows.pieces; t++)
        copy_rows(a, top + rows.start(t), static_cast<int>(rows.start(t + 1) - rows.start(t)), at, depth,
                  left + t * ROWS * STRIDE);
      for (Index p = first; p < last; p++) {
        const float* panel = b + (p * k + at) * COLUMNS;
        const float* next = p + 1 < last ? panel + k * COLUMNS : b + (first * k + at + depth) * COLUMNS;
        Index wanted = p + 1 < last ? depth : std::min(LONGEST, k - at - depth);
        Division shares(wanted * COLUMNS / LINE, std::max<Index>(1, (wanted * COLUMNS / LINE - 1) / rows.pieces + 1));
        Index there = std::min<Index>(COLUMNS, n - p * COLUMNS);
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

}  // namespace beit
