// A step of AdamW, in one pass through memory.
#pragma once

#include <algorithm>

#include "threads.h"

namespace beit {

// Rates of decay of the moments, what is added to the denominator, and decay of the parameters. Then numbers of the step:
// what gradients are multiplied by, and one over the corrections of both moments, that of the second one's root.
struct AdamW {
  double beta1, beta2;
  float epsilon, decay, share, first, second;
};

// Parameters and both moments.
struct Moved {
  float *parameter, *mean, *square;
};

// Arrays are [rows][width]; row i moves at the rate rates[i], where it lies.
template <typename Pool>
void adamw(Pool& pool, const AdamW& how, Index rows, Index width, const float* rates, const float* gradient,
           const Moved& moved) {
  constexpr Index PIECE = 1 << 14, AHEAD = 1 << 10;  // numbers of a piece of work, and from what is read to what is asked for
  const float old1 = how.beta1, new1 = 1 - how.beta1, old2 = how.beta2, new2 = 1 - how.beta2;
  Index parts = (width + PIECE - 1) / PIECE;
  share(pool, rows * parts, [&](Index piece) {
    Index row = piece / parts, start = row * width + piece % parts * PIECE;
    Index end = std::min(start + PIECE, (row + 1) * width);
    float rate = rates[row];
    for (Index i = start; i < end; i += WIDTH) {
      Index count = end - i;
      __builtin_prefetch(gradient + i + AHEAD);
      for (float* one : {moved.parameter, moved.mean, moved.square}) __builtin_prefetch(one + i + AHEAD);
      Vector change = load(gradient + i, count) * how.share, parameter = load(moved.parameter + i, count);
      Vector mean = load(moved.mean + i, count) * old1 + change * new1;
      Vector square = load(moved.square + i, count) * old2 + change * change * new2;
      Vector update = mean * how.first / (root(square) * how.second + how.epsilon) + how.decay * parameter;
      store(moved.parameter + i, parameter - rate * update, count);
      store(moved.mean + i, mean, count);
      store(moved.square + i, square, count);
    }
  });
}

}  // namespace beit
