// GELU and its gradient, in one pass through memory each.
#pragma once

#include <algorithm>

#include "threads.h"

namespace beit {

// The derivative of GELU: cdf(x) + x density(x), of the standard normal distribution.
INLINE Vector gelu_slope(Vector x) {
  Vector density = exponential(-0.5f * (x * x)) * 0.39894228040143268f;
  return 0.5f + 0.5f * error_function(x * 0.70710678118654752f) + x * density;
}

// task(from, count) of every vector of `size` numbers; `count` is less than WIDTH at the end.
template <typename Pool, typename Task>
void of_vectors(Pool& pool, Index size, const Task& task) {
  constexpr Index PIECE = 1 << 14;
  share(pool, (size + PIECE - 1) / PIECE, [&](Index piece) {
    Index end = std::min(size, (piece + 1) * PIECE);
    for (Index i = piece * PIECE; i < end; i += WIDTH) task(i, end - i);
  });
}

}  // namespace beit
