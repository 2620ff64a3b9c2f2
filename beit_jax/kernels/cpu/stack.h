// Arrays laid behind each other, by all threads.
#pragma once

#include <algorithm>
#include <vector>

#include "threads.h"

namespace beit {

// Rows of `width` numbers each, past the caches where their places allow that.
template <typename Pool>
void stack(Pool& pool, const std::vector<const float*>& rows, Index width, float* to) {
  constexpr Index PIECE = 1 << 16;
  Index parts = (width + PIECE - 1) / PIECE;
  share(pool, static_cast<Index>(rows.size()) * parts, [&](Index piece) {
    Index row = piece / parts, start = piece % parts * PIECE, end = std::min(width, start + PIECE);
    const float* from = rows[row];
    float* place = to + row * width;
    if (width % WIDTH)
      std::memcpy(place + start, from + start, (end - start) * sizeof(float));
    else
      for (Index i = start; i < end; i += WIDTH) store_past_caches(place + i, load(from + i));
    settle();
  });
}

}  // namespace beit
