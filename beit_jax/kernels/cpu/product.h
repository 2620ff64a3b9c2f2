// Products of float32 matrices: C = finish(A B). Every sum has the same order, whatever the threads and the other rows.
//
// Tiles read the columns of B as panels [k][COLUMNS]. A piece of work is a part of a block of rows of C. It copies its rows
// of A, which stay in the second cache, and then takes one panel after the other, with all tiles of rows. While they are
// summed, the next panel is on its way from memory.
#pragma once

#include <unistd.h>

#include "tiles.h"

namespace beit {

// Lays out the columns of `layers` matrices, k n numbers apart, as [layers][panels][k][COLUMNS], in pieces of work. They
// read the matrices in the order in which they lie in memory.
class Packing {
 public:
  Packing(Index layers, Index n, Index k, Matrix first, float* to)
      : n(n),
        k(k),
        panels(panels_of(n)),
        first(first),
        to(to),
        down(k, first.column == 1 ? 64 : k),
        across(panels, first.column == 1 ? panels : 256 / COLUMNS),
        pieces(layers * down.pieces * across.pieces) {}

  void operator()(Index piece) const {
    Index i = piece / across.pieces % down.pieces, j = piece % across.pieces;
    Index layer = piece / across.pieces / down.pieces, row = down.start(i), column = across.start(j) * COLUMNS;
    Index columns = std::min(n, across.start(j + 1) * COLUMNS) - column;
    Matrix matrix{first.data + layer * k * n, first.row, first.column};
    float* place = to + ((layer * panels + across.start(j)) * k + row) * COLUMNS;
    copy_panels<false>(matrix, row, down.start(i + 1) - row, column, columns, place, k * COLUMNS);
    settle();
  }

 private:
  Index n, k, panels;
  Matrix first;
  float* to;
  Division down, across;

 public:
  Index pieces;
};

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

// About so many rows of A in each: of 197 with room for 98, two, as a third would have all of B read once more.
inline Division blocks_of(Index m) {
  Index blocks = std::max<Index>((m + resident_rows() / 2) / resident_rows(), 1);
  return Division(m, std::max<Index>((m + blocks - 1) / blocks, 1));
}

// The right factor of a product: panels [panels][k][COLUMNS] or, where there are none, the matrix, of which a piece of
// work copies some panels at a time.
struct Right {
  const float* panels;
  Matrix matrix;
};

// Pieces of work on C: the rows of A are divided into blocks, and the panels of a block into parts, of which each copies
// its rows of A. The last block has the most parts, so that all threads end at about the same time.
struct Pieces {
  Division down;
  Index panels, most;

  Index parts(Index block) const {
    Index left = down.pieces - block;
    return std::min(panels, (most + left - 1) / left);
  }

  Index count() const {
    Index all = 0;
    for (Index block = 0; block < down.pieces; block++) all += parts(block);
    return all;
  }
};

// finish(column, value, count): what is stored of `count` neighbours in a row of the product, which has n numbers.
// The last sums of a tile stay in the first cache until then: rows of C often share their places there, and get lost.
template <typename Finish>
void multiply(const Pieces& pieces, Index piece, Index n, Index k, Matrix a, Right b, float* c, const Finish& finish) {
  constexpr Index SIDE = 128 / COLUMNS;  // panels that are copied at a time
  static thread_local Scratch memory;
  const Tile* table = tiles();
  Index block = 0;
  for (; piece >= pieces.parts(block); block++) piece -= pieces.parts(block);
  Index parts = pieces.parts(block), top = pieces.down.start(block);
  Index first = piece * pieces.panels / parts, last = (piece + 1) * pieces.panels / parts;
  Division rows(pieces.down.start(block + 1) - top, ROWS), stretches(k, LONGEST);
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
        const float* tile = left + t * ROWS * STRIDE;
        float* place = c + start * n + p * COLUMNS;
        if (!ends) {
          tile_of(table[count], depth, tile, panel, place, n, count, there, at > 0, ahead);
          continue;
        }
        alignas(64) float sums[ROWS * COLUMNS];
        ask_for_rows(place, n, count);
        table[count](depth, tile, panel, sums, COLUMNS, false, ahead);
        finish_tile(sums, place, n, count, p * COLUMNS, there, at > 0, finish);
      }
    }
  }
}

// C = finish(A B). A matrix whose panels more than one block of rows reads is laid out first, once for all of them.
template <typename Pool, typename Finish>
void product(Pool& pool, Index m, Index n, Index k, Matrix a, Right b, float* c, const Finish& finish) {
  Division down = blocks_of(m);
  bool one_block = !b.panels && down.pieces <= 1, packs = !b.panels && !one_block;
  Index threads = std::max<Index>(1, pool.num_threads());
  Pieces pieces{down, panels_of(n), threads * (one_block || threads == 1 ? 1 : 2)};
  Borrowed memory;
  float* panels = packs ? memory.of(panels_of(n) * COLUMNS * k) : nullptr;
  Packing packing(packs, n, k, b.matrix, panels);
  if (packs) b.panels = panels;
  std::atomic<Index> packed{0};
  share(pool, packing.pieces + pieces.count(), [&](Index i) {
    if (i < packing.pieces) {
      packing(i);
      packed.fetch_add(1, std::memory_order_release);
      return;
    }
    wait_until([&] { return packed.load(std::memory_order_acquire) == packing.pieces; });
    multiply(pieces, i - packing.pieces, n, k, a, b, c, finish);
  });
}

}  // namespace beit
