// LayerNorm of rows of float32: (x - mean) / sqrt(variance + epsilon) * scale + bias, with the mean squared deviation.
#pragma once

#include <cmath>

#include "attention.h"

namespace beit {

template <typename Pool>
void normalize(Pool& pool, Index rows, Index width, const float* x, const float* scale, const float* bias, float epsilon,
               float* out) {
  constexpr Index BLOCK = 64;
  share(pool, (rows + BLOCK - 1) / BLOCK, [&](Index piece) {
    for (Index i = piece * BLOCK; i < std::min(rows, (piece + 1) * BLOCK); i++) {
      const float* row = x + i * width;
      Vector total{}, squares{};
      for (Index j = 0; j < width; j += WIDTH) total += load(row + j, width - j);
      float mean = sum(total) / width;
      for (Index j = 0; j < width; j += WIDTH) {
        Vector deviation = only(load(row + j, width - j) - mean, width - j, 0.0f);
        squares += deviation * deviation;
      }
      float factor = 1.0f / std::sqrt(sum(squares) / width + epsilon);
      for (Index j = 0; j < width; j += WIDTH) {
        Index count = width - j;
        Vector value = (load(row + j, count) - mean) * (load(scale + j, count) * factor) + load(bias + j, count);
        store(out + i * width + j, value, count);
      }
    }
  });
}

}  // namespace beit
