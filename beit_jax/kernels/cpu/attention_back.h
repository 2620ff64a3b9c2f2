// The way back of attention: gradients of queries, keys, values and of the position bias.
//
// A piece of work is one head of some images. It takes a block of queries at a time, whose weights and gradients of
// scores stay in the second cache: they are computed as on the way there, by tiles of ROWS queries, and then turned over
// for the sums over queries, of which keys and values have their gradients. Every sum has the same order, whatever the
// threads.
#pragma once

#include "attention.h"
#include "memory.h"

namespace beit {

// Gradients: of_averages: [images][tokens][heads][width]; of_qkv: as qkv; of_bias: [heads][tokens][tokens], or null.
struct Gradients {
  const float* of_averages;
  float *of_qkv, *of_bias;
};

template <typename Pool>
void attend_back(Pool& pool, const Attention& x, const Gradients& gradients) {
  constexpr Index BLOCK = 15 * ROWS, TOGETHER = 16, MOST_GROUPS = 4;
  const Tile* table = tiles();
  Index n = x.tokens, e = x.width, apart = x.heads * e;  // numbers between two tokens' averages
  float scale = 1.0f / std::sqrt(static_cast<float>(e));
  Index keys = panels_of(n) * COLUMNS, values = panels_of(e) * COLUMNS;
  Index stretches = (n + LONGEST - 1) / LONGEST;
  Division groups(x.images, (x.images + MOST_GROUPS - 1) / MOST_GROUPS);  // whatever the threads
  static std::atomic<Index> calls{0};
  Index call = ++calls;
  Borrowed borrowed;  // the bias' gradients of the groups behind the first one
  float* others = gradients.of_bias ? borrowed.of((groups.pieces - 1) * x.heads * n * n) : nullptr;
  share(pool, x.heads * groups.pieces, [&](Index piece) {
    static thread_local Scratch memory;
    static thread_local Strips strips;
    Index head = piece / groups.pieces, group = piece % groups.pieces;
    if (x.bias.offsets) strips.make(x.bias, head, call);
    float* of_bias = nullptr;
    if (gradients.of_bias)
      of_bias = group ? others + ((group - 1) * x.heads + head) * n * n : gradients.of_bias + head * n * n;
    Division blocks(n, BLOCK);
    Index longest = stretches * BLOCK * STRIDE;
    float* left = memory.of(longest * 2 + TOGETHER * ROWS * STRIDE + 2 * e * keys + 3 * n * values + 2 * BLOCK * values +
                            ROWS * values);
    float* weights = left + TOGETHER * ROWS * STRIDE;  // [stretches][BLOCK][STRIDE]
    float* scores = weights + longest;                 // their gradients, likewise
    float* key = scores + longest;                     // panels of keys, turned over; `key_rows`: as they are
    float* value = key + e * keys;
    float* key_rows = value + e * keys;
    float* of_key = key_rows + n * values;
    float* of_value = of_key + n * values;
    float* query_rows = of_value + n * values;
    float* of_rows = query_rows + BLOCK * values;
    float* out = of_rows + BLOCK * values;
    for (Index image = groups.start(group); image < groups.start(group + 1); image++) {
      Matrix q = x.part(image, head, 0), k = x.part(image, head, 1), v = x.part(image, head, 2);
      Matrix of{gradients.of_averages + image * n * apart + head * e, apart, 1};
      float* to = gradients.of_qkv + (q.data - x.qkv);
      copy_panels({k.data, 1, k.row}, 0, e, 0, n, key);
      copy_panels({v.data, 1, v.row}, 0, e, 0, n, value);
      for (Index at = 0; at < n; at += LONGEST)
        copy_panels(k, at, std::min(LONGEST, n - at), 0, e, key_rows + at * values);
      bool adds = image > groups.start(group);
      for (Index b = 0; b < blocks.pieces; b++) {
        Index top = blocks.start(b), depth = blocks.start(b + 1) - top;
        Division tiled(depth, ROWS);
        for (Index t = 0; t < tiled.pieces; t++) {
          Index start = tiled.start(t);
          int count = static_cast<int>(tiled.start(t + 1) - start);
          auto row = [&](float* all, Index r, Index at) {
            return all + (at / LONGEST * BLOCK + start + r) * STRIDE + at % LONGEST;
          };
          float* of_tile = left + ROWS * STRIDE;
          copy_rows(q, top + start, count, 0, e, left);
          copy_rows(of, top + start, count, 0, e, of_tile);
          for (int r = 0; r < count; r++)
            for (Index i = 0; i < e; i += WIDTH) store(left + r * STRIDE + i, load(left + r * STRIDE + i) * scale);
          for (Index j = 0; j < keys; j += COLUMNS) {
            table[count](e, left, key + j * e, row(weights, 0, j), STRIDE, false, {});
            table[count](e, of_tile, value + j * e, row(scores, 0, j), STRIDE, false, {});
          }
          for (int r = 0; r < count; r++) {
            Index token = top + start + r;
            auto stretch = [&](Index at) { return row(weights, r, at); };
            float share = 1 / exponentials(n, x.bias.offsets ? &strips : nullptr, token, stretch);
            for (Index j = 0; j < n; j += WIDTH) store(stretch(j), load(stretch(j)) * share);
            Vector along{};  // the weights' gradient, along the weights
            for (Index j = 0; j < n; j += WIDTH) along += load(row(weights, r, j)) * load(row(scores, r, j));
            float mean = sum(along);
            for (Index j = 0; j < n; j += WIDTH) {
              float* place = row(scores, r, j);
              Vector changed = load(row(weights, r, j)) * (load(place) - mean);
              store(place, changed);
              if (!of_bias) continue;
              float* sums = of_bias + token * n + j;
              store(sums, adds ? load(sums, n - j) + changed : changed, n - j);
            }
          }
          for (Index at = 0; at < n; at += LONGEST) {
            Index along = std::min(LONGEST, n - at);
            for (Index j = 0; j < values; j += COLUMNS)
              table[count](along, row(scores, 0, at), key_rows + at * values + j * along, out + j, values, at > 0, {});
          }
          for (int r = 0; r < count; r++)
            for (Index i = 0; i < e; i += WIDTH)
              store(to + (top + start + r) * q.row + i, load(out + r * values + i) * scale, e - i);
        }
        copy_panels(q, top, depth, 0, e, query_rows);
        copy_panels(of, top, depth, 0, e, of_rows);
        // Sums over the block's queries, by tiles of keys.
        auto sums = [&](const float* factor, const float* rows, float* result) {
          for (Index s = 0; s < stretches; s++) {
            Matrix turned{factor + s * BLOCK * STRIDE, 1, STRIDE};
            Division parts(std::min(LONGEST, n - s * LONGEST), TOGETHER * ROWS);
            for (Index p = 0; p < parts.pieces; p++) {
              Division tiled(parts.start(p + 1) - parts.start(p), ROWS);
              copy_tiles(turned, parts.start(p), tiled, 0, depth, left);
              for (Index t = 0; t < tiled.pieces; t++) {
                int count = static_cast<int>(tiled.start(t + 1) - tiled.start(t));
                float* place = result + (s * LONGEST + parts.start(p) + tiled.start(t)) * values;
                for (Index j = 0; j < values; j += COLUMNS)
                  table[count](depth, left + t * ROWS * STRIDE, rows + j * depth, place + j, values, b > 0, {});
              }
            }
          }
        };
        sums(weights, of_rows, of_value);
        sums(scores, query_rows, of_key);
      }
      for (Index token = 0; token < n; token++)
        for (Index i = 0; i < e; i += WIDTH) {
          float* place = to + token * q.row + i;
          store(place + apart, load(of_key + token * values + i) * scale, e - i);
          store(place + 2 * apart, load(of_value + token * values + i), e - i);
        }
    }
  });
  if (gradients.of_bias && groups.pieces > 1)
    share(pool, x.heads, [&](Index head) {
      for (Index j = 0; j < n * n; j += WIDTH) {
        float* place = gradients.of_bias + head * n * n + j;
        Vector total = load(place, n * n - j);
        for (Index group = 1; group < groups.pieces; group++)
          total += load(others + ((group - 1) * x.heads + head) * n * n + j, n * n - j);
        store(place, total, n * n - j);
      }
    });
}

}  // namespace beit
