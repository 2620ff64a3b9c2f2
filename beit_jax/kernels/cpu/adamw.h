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
template <typename Number>
struct Moved {
  Number *parameter, *mean, *square;
};

// Arrays are [rows][width]; row i moves at the rate rates[i]. Results may lie where the arguments do.
template <typename Pool>
void adamw(Pool& pool, const AdamW& how, Index rows, Index width, const float* rates, const float* gradient,
           const Moved<const float>& from, const Moved<float>& to) {
  constexpr Index PIECE = 1 << 14, AHEAD = 1 << 10;  // numbers of a piece of work, and from what is read to what is asked for
  const float old1 = how.beta1, new1 = 1 - how.beta1, old2 = how.beta2, new2 = 1 - how.beta2;
  Index parts = (width + PIECE - 1) / PIECE;
  share(pool, rows * parts, [&](Index piece) {
    Index row = piece / parts, start = row * width + piece % parts * PIECE;
    Index end = std::min(start + PIECE, (row + 1) * width);
    float rate = rates[row];
    for (Index i = start; i < end; i += WIDTH) {
      Index count = end - i;
      for (const float* one : {gradient, from.parameter, from.mean, from.square}) __builtin_prefetch(one + i + AHEAD);
      Vector change = load(gradient + i, count) * how.share, parameter = load(from.parameter + i, count);
      Vector mean = load(from.mean + i, count) * old1 + change * new1;
      Vector square = load(from.square + i, count) * old2 + change * change * new2;
      Vector update = mean * how.first / (root(square) * how.second + how.epsilon) + how.decay * parameter;
      store(to.parameter + i, parameter - rate * update, count);
      store(to.mean + i, mean, count);
      store(to.square + i, square, count);
    }
  });
}

}  // namespace beit
