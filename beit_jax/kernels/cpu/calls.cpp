// What XLA calls: shapes come from the arrays, the rest from attributes.
#include "adamw.h"
#include "attention_back.h"
#include "elements.h"
#include "norm.h"
#include "product.h"
#include "stack.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using namespace beit;

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

// The numbers in front of one of several arrays, of so many each; which one is the first of the other arguments.
static ffi::ErrorOr<Index> numbers_before(const ffi::RemainingArgs& more, Index size) {
  auto number = more.get<ffi::Buffer<ffi::S32>>(0);
  if (!number) return ffi::Unexpected(number.error());
  return *number->typed_data() * size;
}

// a: [m, k]; b: [k, n], several [layers, k, n], or several packed ones [layers, panels, k, COLUMNS]. Then the number of
// the matrix, if b is several, and the bias [n].
static ffi::Error affine(ffi::ThreadPool pool, Array a, Array b, ffi::RemainingArgs more, Result c,
                         std::string_view end) {
  auto of_a = a.dimensions(), of_b = b.dimensions();
  const float* matrix = b.typed_data();
  bool several = of_b.size() > 2, packed = of_b.size() == 4;
  Index m = of_a[0], k = of_a[1], n = c->dimensions()[1];
  if (packed && (of_b[1] != panels_of(n) || of_b[2] != k || of_b[3] != COLUMNS))
    return ffi::Error::InvalidArgument("beit_jax: a kernel that was packed for another processor");
  if (several) {
    auto before = numbers_before(more, (packed ? of_b[1] * COLUMNS : n) * k);
    if (!before) return before.error();
    matrix += *before;
  }
  auto found = more.get<Array>(several);
  if (!found) return found.error();
  const float* bias = found->typed_data();
  Matrix left{a.typed_data(), k, 1};
  float* out = c->typed_data();
  auto ending = [&](const auto& finish) {
    product(pool, m, n, k, left, Right{packed ? matrix : nullptr, {matrix, n, 1}}, out, finish);
    return ffi::Error::Success();
  };
  if (end == "bias") return ending([bias](Index j, Vector value, Index count) { return value + load(bias + j, count); });
  if (end == "gelu")
    return ending([bias](Index j, Vector value, Index count) { return gelu(value + load(bias + j, count)); });
  return ffi::Error::InvalidArgument("beit_jax: unknown end of a product");
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(beit_affine, affine,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .RemainingArgs()
                                  .Ret<Array>()
                                  .Attr<std::string_view>("end"));

// a: [m, k], or [k, m] if it is turned; b: [k, n], or [n, k] if it is turned, or several of these, and the number of one
// of them; c: [m, n].
static ffi::Error product_of_both(ffi::ThreadPool pool, Array a, Array b, ffi::RemainingArgs more, Result c, bool turn_a,
                                  bool turn_b) {
  Index m = c->dimensions()[0], n = c->dimensions()[1], k = a.dimensions()[turn_a ? 0 : 1];
  const float* matrix = b.typed_data();
  if (more.size()) {
    auto before = numbers_before(more, n * k);
    if (!before) return before.error();
    matrix += *before;
  }
  Matrix left{a.typed_data(), turn_a ? 1 : k, turn_a ? m : 1}, right{matrix, turn_b ? 1 : n, turn_b ? k : 1};
  product(pool, m, n, k, left, Right{nullptr, right}, c->typed_data(), [](Index, Vector value, Index) { return value; });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(beit_product, product_of_both,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .RemainingArgs()
                                  .Ret<Array>()
                                  .Attr<bool>("turn_a")
                                  .Attr<bool>("turn_b"));

// x: [rows, width]; scale, bias: [width].
static ffi::Error normalized(ffi::ThreadPool pool, Array x, Array scale, Array bias, Result out, double epsilon) {
  auto size = x.dimensions();
  normalize(pool, size[0], size[1], x.typed_data(), scale.typed_data(), bias.typed_data(), static_cast<float>(epsilon),
            out->typed_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    beit_normalized, normalized,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Arg<Array>().Ret<Array>().Attr<double>("epsilon"));

// x, of: [rows, width]; scale: [width].
static ffi::Error normalized_back(ffi::ThreadPool pool, Array x, Array scale, Array of, Result of_x, Result of_scale,
                                  Result of_bias, double epsilon) {
  auto size = x.dimensions();
  normalize_back(pool, size[0], size[1], x.typed_data(), scale.typed_data(), of.typed_data(),
                 static_cast<float>(epsilon), of_x->typed_data(), of_scale->typed_data(), of_bias->typed_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(beit_normalized_back, normalized_back,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<double>("epsilon"));

static ffi::Error gelu_of(ffi::ThreadPool pool, Array x, Result out) {
  const float* from = x.typed_data();
  float* to = out->typed_data();
  of_vectors(pool, x.element_count(), [&](Index i, Index count) { store(to + i, gelu(load(from + i, count)), count); });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(beit_gelu, gelu_of, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Ret<Array>());

static ffi::Error gelu_back(ffi::ThreadPool pool, Array x, Array of, Result of_x) {
  const float *from = x.typed_data(), *change = of.typed_data();
  float* to = of_x->typed_data();
  of_vectors(pool, x.element_count(), [&](Index i, Index count) {
    store(to + i, load(change + i, count) * gelu_slope(load(from + i, count)), count);
  });
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    beit_gelu_back, gelu_back,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Arg<Array>().Ret<Array>());

// qkv: [b, n, 3, heads, e]; in the other arguments the tables of the position bias, see Positions, if `biased`.
static ffi::ErrorOr<Attention> attention_of(Array qkv, const ffi::RemainingArgs& more, bool biased) {
  auto size = qkv.dimensions();
  if (size[4] > LONGEST) return ffi::Unexpected(ffi::Error::InvalidArgument("beit_jax: heads that are too wide"));
  Positions bias;
  if (biased) {
    auto offsets = more.get<Array>(0), classes = more.get<Array>(1);
    if (!offsets) return ffi::Unexpected(offsets.error());
    if (!classes) return ffi::Unexpected(classes.error());
    auto sides = offsets->dimensions();
    bias = {(sides[0] + 1) / 2, (sides[1] + 1) / 2, sides[2], offsets->typed_data(), classes->typed_data()};
    if (size[1] != 1 + bias.rows * bias.columns || size[3] != bias.heads)
      return ffi::Unexpected(ffi::Error::InvalidArgument("beit_jax: a position bias of another size"));
  }
  return Attention{size[0], size[1], size[3], size[4], qkv.typed_data(), bias};
}

static ffi::Error attention(ffi::ThreadPool pool, Array qkv, ffi::RemainingArgs more, Result averages) {
  auto found = attention_of(qkv, more, more.size() > 0);
  if (!found) return found.error();
  attend(pool, *found, averages->typed_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    beit_attention, attention,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().RemainingArgs().Ret<Array>());

// The last of the other arguments: the gradient of the averages. Results: those of qkv and, if there is a bias, of it.
static ffi::Error attention_back(ffi::ThreadPool pool, Array qkv, ffi::RemainingArgs more, Result of_qkv,
                                 ffi::RemainingRets of_bias) {
  auto found = attention_of(qkv, more, more.size() > 1);
  if (!found) return found.error();
  auto of_averages = more.get<Array>(more.size() - 1);
  if (!of_averages) return of_averages.error();
  Gradients gradients{of_averages->typed_data(), of_qkv->typed_data(), nullptr};
  if (of_bias.size()) {
    auto result = of_bias.get<Array>(0);
    if (!result) return result.error();
    gradients.of_bias = (*result)->typed_data();
  }
  attend_back(pool, *found, gradients);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    beit_attention_back, attention_back,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().RemainingArgs().Ret<Array>().RemainingRets());

// matrices: [layers, k, n]; panels: [layers, panels, k, COLUMNS].
static ffi::Error packing(ffi::ThreadPool pool, Array matrices, Result panels, std::int64_t columns) {
  auto size = matrices.dimensions();
  if (columns != COLUMNS) return ffi::Error::InvalidArgument("beit_jax: panels of another processor");
  Packing packing(size[0], size[2], size[1], {matrices.typed_data(), size[2], 1}, panels->typed_data());
  share(pool, packing.pieces, packing);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(beit_packing, packing,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().Ret<Array>().Attr<std::int64_t>("columns"));

// rows: arrays of the same shape.
static ffi::Error stacked(ffi::ThreadPool pool, ffi::RemainingArgs rows, Result all) {
  std::vector<const float*> from;
  for (std::size_t i = 0; i < rows.size(); i++) {
    auto row = rows.get<Array>(i);
    if (!row) return row.error();
    from.push_back(row->typed_data());
  }
  stack(pool, from, all->element_count() / static_cast<Index>(from.size()), all->typed_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(beit_stacked, stacked,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().Ret<Array>());

// Arrays are [rows, ...]; rates: [rows], or one for all. numbers: what gradients are multiplied by, the corrections of both
// moments, that of the second one's root, and whether anything moves. Results must lie where the arguments do.
static ffi::Error adamw_of(ffi::ThreadPool pool, Array parameter, Array mean, Array square, Array gradient, Array rates,
                           Array numbers, Result to_parameter, Result to_mean, Result to_square, double beta1,
                           double beta2, double epsilon, double decay) {
  Moved moved{to_parameter->typed_data(), to_mean->typed_data(), to_square->typed_data()};
  if (parameter.typed_data() != moved.parameter || mean.typed_data() != moved.mean || square.typed_data() != moved.square)
    return ffi::Error::InvalidArgument("beit_jax: results of AdamW that do not lie where the arguments do");
  const float* of_step = numbers.typed_data();
  if (of_step[3] == 0) return ffi::Error::Success();
  Index rows = rates.element_count();
  adamw(pool, {beta1, beta2, static_cast<float>(epsilon), static_cast<float>(decay), of_step[0], 1 / of_step[1], 1 / of_step[2]},
        rows, parameter.element_count() / rows, rates.typed_data(), gradient.typed_data(), moved);
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(beit_adamw, adamw_of,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Ret<Array>()
                                  .Attr<double>("beta1")
                                  .Attr<double>("beta2")
                                  .Attr<double>("epsilon")
                                  .Attr<double>("decay"));

extern "C" int beit_columns() { return COLUMNS; }

// [layers, k, n] becomes [layers, panels, k, COLUMNS] where it lies; n is a multiple of COLUMNS. A thread copies a matrix at
// a time.
extern "C" void beit_pack_in_place(float* first, Index layers, Index k, Index n, Index threads) {
  std::atomic<Index> next{0};
  auto work = [&] {
    std::vector<float> copy(k * n);
    for (Index layer; (layer = next++) < layers;) {
      float* place = first + layer * k * n;
      std::memcpy(copy.data(), place, k * n * sizeof(float));
      Packing packing(1, n, k, {copy.data(), n, 1}, place);
      for (Index piece = 0; piece < packing.pieces; piece++) packing(piece);
    }
  };
  std::vector<std::thread> others;
  for (Index i = 1; i < std::min(threads, layers); i++) others.emplace_back(work);
  work();
  for (auto& thread : others) thread.join();
}
