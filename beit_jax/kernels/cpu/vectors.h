// Vectors of float32, as wide as the machine's registers, by the extension that GCC and Clang share.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace beit {

using Index = std::int64_t;

// Registers decide the tile of a product: ROWS x VECTORS sums, VECTORS of the right factor and a broadcast stay in them.
#if defined(__AVX512F__)
constexpr int WIDTH = 16, ROWS = 14, VECTORS = 2;
#elif defined(__AVX__)
constexpr int WIDTH = 8, ROWS = 6, VECTORS = 2;
#elif defined(__aarch64__)
constexpr int WIDTH = 4, ROWS = 8, VECTORS = 3;
#else
constexpr int WIDTH = 4, ROWS = 6, VECTORS = 2;
#endif
constexpr int COLUMNS = WIDTH * VECTORS;

typedef float Vector __attribute__((vector_size(WIDTH * 4)));
typedef float Unaligned __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef std::int32_t Integers __attribute__((vector_size(WIDTH * 4)));

#define INLINE inline __attribute__((always_inline))
#define ONCE inline __attribute__((noinline))  // of long functions, compilers would make many copies

// Zero, one, two, ...
INLINE Integers places() {
  Integers all{};
  for (int i = 0; i < WIDTH; i++) all[i] = i;
  return all;
}

INLINE Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
INLINE void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
INLINE Vector all(float value) { return value - Vector{}; }  // x - 0 is x, which compilers know; of 0 + x not for -0

// The first `count` numbers, and zeros; nothing behind them is read.
INLINE Vector load(const float* from, Index count) {
  if (count >= WIDTH) return load(from);
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_loadu_ps(static_cast<__mmask16>(count > 0 ? (1u << count) - 1 : 0), from);
#elif defined(__AVX__)
  return (Vector)_mm256_maskload_ps(from, (__m256i)(places() < static_cast<std::int32_t>(count)));
#else
  Vector value{};
  if (count > 0) std::memcpy(&value, from, count * sizeof(float));
  return value;
#endif
}

INLINE void store(float* to, Vector value, Index count) {
  if (count >= WIDTH) return store(to, value);
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(count > 0 ? (1u << count) - 1 : 0), (__m512)value);
#elif defined(__AVX__)
  _mm256_maskstore_ps(to, (__m256i)(places() < static_cast<std::int32_t>(count)), (__m256)value);
#else
  if (count > 0) std::memcpy(to, &value, count * sizeof(float));
#endif
}

// At an aligned place, and past the caches: what lies there is not read first. Other threads see it after `settle`.
INLINE void store_past_caches(float* to, Vector value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX__)
  _mm256_stream_ps(to, (__m256)value);
#else
  store(to, value);
#endif
}

INLINE void settle() {
#if defined(__AVX__)
  _mm_sfence();
#endif
}

INLINE Vector larger(Vector a, Vector b) { return a > b ? a : b; }

INLINE Vector root(Vector value) {
#if defined(__AVX512F__)
  return (Vector)_mm512_sqrt_ps((__m512)value);
#elif defined(__AVX__)
  return (Vector)_mm256_sqrt_ps((__m256)value);
#else
  for (int i = 0; i < WIDTH; i++) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}

// Numbers from `count` on become `filling`.
INLINE Vector only(Vector value, Index count, float filling) {
  return places() < static_cast<std::int32_t>(count) ? value : all(filling);
}

// Sums of halves: the order of additions is the same for every row.
INLINE float sum(Vector value) {
  float parts[WIDTH];
  std::memcpy(parts, &value, sizeof(value));
  for (int half = WIDTH / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

INLINE float largest(Vector value) {
  float parts[WIDTH];
  std::memcpy(parts, &value, sizeof(value));
  for (int half = WIDTH / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
  return parts[0];
}

// Row i becomes column i: in every round, blocks that lie across the diagonal from each other change places.
INLINE void turn_over(Vector (&square)[WIDTH]) {
#if defined(__clang__)  // whose shuffles take constants alone
  float rows[WIDTH][WIDTH], columns[WIDTH][WIDTH];
  std::memcpy(rows, square, sizeof(rows));
  for (int i = 0; i < WIDTH; i++)
    for (int j = 0; j < WIDTH; j++) columns[j][i] = rows[i][j];
  std::memcpy(square, columns, sizeof(columns));
#else
#pragma GCC unroll 4
  for (int half = WIDTH / 2; half > 0; half /= 2) {
    Integers low{}, high{};  // places in two rows behind each other
    for (int i = 0; i < WIDTH; i++) {
      low[i] = i & half ? i - half + WIDTH : i;
      high[i] = i & half ? i + WIDTH : i + half;
    }
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++)
      if (!(i & half)) {
        Vector upper = square[i], lower = square[i + half];
        square[i] = __builtin_shuffle(upper, lower, low);
        square[i + half] = __builtin_shuffle(upper, lower, high);
      }
  }
#endif
}

// e to the power of x, which is 0 or less, within 1 unit of the last place or so; 1.2e-38 below -87. NaN stays NaN.
// 2^n * e^r with |r| <= log(2) / 2, and e^r by its series of Taylor, economized (coefficients: Cephes, expf).
INLINE Vector exponential(Vector x) {
  x = all(-87.3f) > x ? all(-87.3f) : x;
  const Vector magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vector shifted = x * 1.44269504088896341f + magic;
  Vector n = shifted - magic;
  Vector r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vector p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Integers bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4b400000 + 127) << 23;
  Vector scale;
  std::memcpy(&scale, &bits, sizeof(scale));
  return p * scale;
}

// The error function, within 4 units of the last place: x P(x^2) / Q(x^2) between the ends, behind which it is 1.
// Coefficients: Eigen and XLA.
INLINE Vector error_function(Vector x) {
  const Vector end = all(3.832506856900711f);
  Vector y = x * x;
  Vector p = all(-2.72614225801306e-10f);
  p = p * y + 2.77068142495902e-08f;
  p = p * y - 2.10102402082508e-06f;
  p = p * y - 5.69250639462346e-05f;
  p = p * y - 7.34990630326855e-04f;
  p = p * y - 2.95459980854025e-03f;
  p = p * y - 1.60960333262415e-02f;
  Vector q = all(-1.45660718464996e-05f);
  q = q * y - 2.13374055278905e-04f;
  q = q * y - 1.68282697438203e-03f;
  q = q * y - 7.37332916720468e-03f;
  q = q * y - 1.42647390514189e-02f;
  Vector value = x * p / q;
  return x >= end ? all(1) : x <= -end ? all(-1) : value;
}

INLINE Vector gelu(Vector x) { return x * (0.5f + 0.5f * error_function(x * 0.70710678118654752f)); }

}  // namespace beit
