// Attention of float32, whose scores stay in a core's caches: softmax(query key^T / sqrt(e) + bias) value.
//
// A piece of work is some rows of one head of one image. It copies the head's keys and values into panels, as products
// do, and then takes ROWS queries at a time: scores, softmax, averages. The bias is read from the head's table.
#pragma once

#include <cmath>
#include <limits>

#include "tiles.h"

namespace beit {

// The position bias of a class token and a grid of patches behind it, as a table of offsets from query to key:
// offsets: [2 rows - 1][2 columns - 1][heads]; classes: [3][heads], from the class token, to it, and its own. Null: none.
struct Positions {
  Index rows = 0, columns = 0, heads = 0;
  const float *offsets = nullptr, *classes = nullptr;

  float of_class(Index which, Index head) const { return classes[which * heads + head]; }
};

// The bias of one head, as rows that neighbours in memory share. All queries in one column of the patches read the same
// strip, from the keys' rows that lie the most above them to those the most below; a query one row of patches down reads
// from one row earlier on.
struct Strips {
  Scratch memory;
  Index head = -1, call = 0;
  const Positions* bias = nullptr;
  float *classes = nullptr, *first = nullptr;

  Index length() const { return (2 * bias->rows - 1) * bias->columns + 1 + WIDTH; }

  void make(const Positions& of, Index number, Index number_of_call) {
    bool made = head == number && call == number_of_call;
    bias = &of, head = number, call = number_of_call;
    if (made) return;
    Index rows = of.rows, columns = of.columns, tokens = 1 + rows * columns;
    Index down = 2 * rows - 1, across = 2 * columns - 1;
    classes = memory.of(tokens + WIDTH + columns * length() + down * across);
    first = classes + tokens + WIDTH;
    float* table = first + columns * length();  // of this head, from the last offset to the first one
    for (Index i = 0; i < down * across; i++) table[i] = of.offsets[(down * across - 1 - i) * of.heads + head];
    for (Index j = 0; j < tokens; j++) classes[j] = of.of_class(0, head);
    for (Index x = 0; x < columns; x++) {
      float* to = first + x * length();
      *to++ = 0;  // where a query in the last row of patches has the class token
      for (Index y = 0; y < down; y++, to += columns)
        std::memcpy(to, table + y * across + columns - 1 - x, columns * sizeof(float));
    }
  }

  // The bias of a token's scores; that of the first key is `of_first` instead.
  const float* row(Index token) const {
    if (token == 0) return classes;
    Index y = (token - 1) / bias->columns, x = (token - 1) % bias->columns;
    return first + x * length() + (bias->rows - 1 - y) * bias->columns;
  }
  float of_first(Index token) const { return bias->of_class(token ? 1 : 2, head); }
};

// qkv: [images][tokens][3][heads][width].
struct Attention {
  Index images, tokens, heads, width;
  const float* qkv;
  Positions bias;

  Matrix part(Index image, Index head, Index which) const {
    return {qkv + (image * tokens * 3 + which) * heads * width + head * width, 3 * heads * width, 1};
  }
};

// Adds the bias, that of the first key apart, to `count` scores; what fills up the last vector has no weight. Returns
// the largest score.
INLINE float add_bias(float* scores, const float* bias, const float* of_first, Index count) {
  Vector highest = all(-std::numeric_limits<float>::infinity());
  for (Index j = 0; j < count; j += WIDTH) {
    Vector value = load(scores + j);
    if (bias) {
      Vector added = load(bias + j);
      if (j == 0 && of_first) added[0] = *of_first;
      value += added;
    }
    if (count - j < WIDTH) value = only(value, count - j, -std::numeric_limits<float>::infinity());
    store(scores + j, value);
    highest = larger(highest, value);
  }
  return largest(highest);
}

// Scores become e to the power of what they are more than the highest one; returns their sum.
INLINE float powers(float* scores, float highest, Index count) {
  Vector total{};
  for (Index j = 0; j < count; j += WIDTH) {
    Vector value = exponential(load(scores + j) - highest);
    store(scores + j, value);
    total += value;
  }
  return sum(total);
}

// With the bias, if there is one, the scores of a token become e to the power of what they are more than the highest one;
// returns their sum. `stretch(at)`: where those from key `at` on lie.
template <typename Stretch>
INLINE float exponentials(Index tokens, const Strips* strips, Index token, const Stretch& stretch) {
  const float* bias = strips ? strips->row(token) : nullptr;
  float of_first = strips ? strips->of_first(token) : 0;
  float highest = -std::numeric_limits<float>::infinity(), total = 0;
  for (Index at = 0; at < tokens; at += LONGEST)
    highest = std::max(highest, add_bias(stretch(at), bias ? bias + at : nullptr, at ? nullptr : &of_first,
                                         std::min(LONGEST, tokens - at)));
  for (Index at = 0; at < tokens; at += LONGEST)
    total += powers(stretch(at), highest, std::min(LONGEST, tokens - at));
  return total;
}

// averages: [images][tokens][heads][width].
template <typename Pool>
void attend(Pool& pool, const Attention& x, float* averages) {
  const Tile* table = tiles();
  Index threads = std::max<Index>(1, pool.num_threads());
  Index heads = x.images * x.heads;
  // A head whose rows are divided is copied more than once.
  Index parts = threads == 1 || heads >= 4 * threads || heads % threads == 0 ? 1 : 2 * threads;
  Division rows(x.tokens, (x.tokens + parts - 1) / parts);
  float scale = 1.0f / std::sqrt(static_cast<float>(x.width));
  static std::atomic<Index> calls{0};
  Index call = ++calls;
  Index keys = panels_of(x.tokens) * COLUMNS, values = panels_of(x.width) * COLUMNS;
  Index stretches = (x.tokens + LONGEST - 1) / LONGEST;
  share(pool, heads * rows.pieces, [&](Index piece) {
    static thread_local Scratch memory;
    static thread_local Strips strips;
    Index head = piece / rows.pieces / x.images, image = piece / rows.pieces % x.images;
    if (x.bias.offsets) strips.make(x.bias, head, call);
    Index top = rows.start(piece % rows.pieces), bottom = rows.start(piece % rows.pieces + 1);
    float* query = memory.of((1 + stretches) * ROWS * STRIDE + x.width * keys + x.tokens * values + ROWS * values);
    float* scores = query + ROWS * STRIDE;
    float* key = scores + stretches * ROWS * STRIDE;
    float* value = key + x.width * keys;
    float* out = value + x.tokens * values;
    Matrix k = x.part(image, head, 1);
    copy_panels({k.data, 1, k.row}, 0, x.width, 0, x.tokens, key);
    for (Index at = 0; at < x.tokens; at += LONGEST)
      copy_panels(x.part(image, head, 2), at, std::min(LONGEST, x.tokens - at), 0, x.width, value + at * values);
    Division tiled(bottom - top, ROWS);
    for (Index t = 0; t < tiled.pieces; t++) {
      Index start = top + tiled.start(t);
      int count = static_cast<int>(top + tiled.start(t + 1) - start);
      copy_rows(x.part(image, head, 0), start, count, 0, x.width, query);
      for (int r = 0; r < count; r++)
        for (Index i = 0; i < x.width; i += WIDTH) store(query + r * STRIDE + i, load(query + r * STRIDE + i) * scale);
      for (Index j = 0; j < keys; j += COLUMNS)
        table[count](x.width, query, key + j * x.width, scores + j / LONGEST * ROWS * STRIDE + j % LONGEST, STRIDE,
                     false, {});
      float totals[ROWS];
      for (int r = 0; r < count; r++) {
        auto stretch = [&](Index at) { return scores + (at / LONGEST * ROWS + r) * STRIDE; };
        totals[r] = exponentials(x.tokens, x.bias.offsets ? &strips : nullptr, start + r, stretch);
      }
      for (Index at = 0; at < x.tokens; at += LONGEST) {
        Index depth = std::min(LONGEST, x.tokens - at);
        for (Index j = 0; j < values; j += COLUMNS)
          table[count](depth, scores + at / LONGEST * ROWS * STRIDE, value + at * values + j * depth, out + j, values,
                       at > 0, {});
      }
      for (int r = 0; r < count; r++) {
        float* to = averages + ((image * x.tokens + start + r) * x.heads + head) * x.width;
        for (Index i = 0; i < x.width; i += WIDTH) store(to + i, load(out + r * values + i) / totals[r], x.width - i);
      }
    }
  });
}

}  // namespace beit
