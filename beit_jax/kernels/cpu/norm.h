// LayerNorm of float32, in one pass through memory: a row stays in the first cache while its moments are computed.
#pragma once

#include <algorithm>
#include <cmath>

#include "memory.h"
#include "threads.h"

namespace beit {

// Of one row: its mean, and one over its standard deviation. The variance is the mean squared deviation.
struct Moments {
  float mean, factor;
  INLINE Moments(const float* row, Index width, float epsilon) {
    Vector total{}, squares{};
    for (Index i = 0; i < width; i += WIDTH) total += load(row + i, width - i);
    mean = sum(total) / width;
    for (Index i = 0; i < width; i += WIDTH) {
      Vector deviation = load(row + i, width - i) - mean;
      if (width - i < WIDTH) deviation = only(deviation, width - i, 0);
      squares += deviation * deviation;
    }
    factor = 1 / std::sqrt(sum(squares) / width + epsilon);
  }
};

// x, out: [rows][width].
template <typename Pool>
void normalize(Pool& pool, Index rows, Index width, const float* x, const float* scale, const float* bias,
               float epsilon, float* out) {
  constexpr Index BLOCK = 16;  // rows of a piece of work
  share(pool, (rows + BLOCK - 1) / BLOCK, [&](Index piece) {
    for (Index row = piece * BLOCK; row < std::min(rows, (piece + 1) * BLOCK); row++) {
      const float* from = x + row * width;
      Moments moments(from, width, epsilon);
      for (Index i = 0; i < width; i += WIDTH) {
        Index count = width - i;
        Vector value = load(from + i, count) - moments.mean;
        store(out + row * width + i, value * (moments.factor * load(scale + i, count)) + load(bias + i, count), count);
      }
    }
  });
}

// Gradients of x, scale and bias by that of the result, `of`. Sums over rows are made block by block, and then of blocks.
template <typename Pool>
void normalize_back(Pool& pool, Index rows, Index width, const float* x, const float* scale, const float* of,
                    float epsilon, float* of_x, float* of_scale, float* of_bias) {
  constexpr Index BLOCK = 64;
  Index blocks = (rows + BLOCK - 1) / BLOCK;
  Borrowed borrowed;
  float* sums = borrowed.of(blocks * 2 * width);  // of scale and bias, by every block
  share(pool, blocks, [&](Index piece) {
    float *scales = sums + piece * 2 * width, *biases = scales + width;
    std::memset(scales, 0, 2 * width * sizeof(float));
    for (Index row = piece * BLOCK; row < std::min(rows, (piece + 1) * BLOCK); row++) {
      const float *from = x + row * width, *change = of + row * width;
      Moments moments(from, width, epsilon);
      Vector total{}, along{};  // of the gradient of what is scaled, and along that
      for (Index i = 0; i < width; i += WIDTH) {
        Index count = width - i;
        Vector normal = (load(from + i, count) - moments.mean) * moments.factor, given = load(change + i, count);
        Vector scaled = given * load(scale + i, count);  // zeros behind the end
        total += scaled;
        along += scaled * normal;
        store(scales + i, load(scales + i, count) + given * normal, count);
        store(biases + i, load(biases + i, count) + given, count);
      }
      float mean = sum(total) / width, slope = sum(along) / width;
      for (Index i = 0; i < width; i += WIDTH) {
        Index count = width - i;
        Vector normal = (load(from + i, count) - moments.mean) * moments.factor;
        Vector scaled = load(change + i, count) * load(scale + i, count);
        store(of_x + row * width + i, (scaled - mean - normal * slope) * moments.factor, count);
      }
    }
  });
  for (Index i = 0; i < width; i += WIDTH) {
    Vector scales{}, biases{};
    for (Index block = 0; block < blocks; block++) {
      scales += load(sums + block * 2 * width + i, width - i);
      biases += load(sums + (block * 2 + 1) * width + i, width - i);
    }
    store(of_scale + i, scales, width - i);
    store(of_bias + i, biases, width - i);
  }
}

}  // namespace beit
