// LayerNorm of float32, in one pass through memory: a row stays in the first cache while its moments are computed.
#pragma once

#include <algorithm>
#include <cmath>

#include "threads.h"

namespace beit {

// x, out: [rows][width]; the variance is the mean squared deviation.
template <typename Pool>
void normalize(Pool& pool, Index rows, Index width, const float* x, const float* scale, const float* bias,
               float epsilon, float* out) {
  constexpr Index BLOCK = 16;  // rows of a piece of work
  share(pool, (rows + BLOCK - 1) / BLOCK, [&](Index piece) {
    for (Index row = piece * BLOCK; row < std::min(rows, (piece + 1) * BLOCK); row++) {
      const float* from = x + row * width;
      Vector total{}, squares{};
      for (Index i = 0; i < width; i += WIDTH) total += load(from + i, width - i);
      float mean = sum(total) / width;
      for (Index i = 0; i < width; i += WIDTH) {
        Vector deviation = load(from + i, width - i) - mean;
        if (width - i < WIDTH) deviation = only(deviation, width - i, 0);
        squares += deviation * deviation;
      }
      float factor = 1 / std::sqrt(sum(squares) / width + epsilon);
      for (Index i = 0; i < width; i += WIDTH) {
        Index count = width - i;
        Vector value = load(from + i, count) - mean;
        store(out + row * width + i, value * (factor * load(scale + i, count)) + load(bias + i, count), count);
      }
    }
  });
}

}  // namespace beit
