// What XLA calls: shapes come from the arrays, the rest from attributes.
#include "attention.h"
#include "norm.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using namespace beit;

using Array = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

// a: [m, k], or [k, m] if `turn_a`; b: [k, n], or [n, k] if `turn_b`. More arrays: the number of the matrix, if b is
// several [layers, k, n]; then by `end`: "plain" none; "bias" the bias [n]; "gelu" the bias; "residual" the bias, the
// scale [n] and what is added [m, n].
static ffi::Error product(ffi::ThreadPool pool, Array a, Array b, ffi::RemainingArgs more, Result c, bool turn_a,
                          bool turn_b, std::string_view end) {
  auto of_a = a.dimensions(), of_b = b.dimensions();
  const float* matrix = b.typed_data();
  size_t first = of_b.size() == 3;
  if (first) {
    auto number = more.get<ffi::Buffer<ffi::S32>>(0);
    if (!number) return number.error();
    matrix += *number->typed_data() * of_b[1] * of_b[2];
  }
  Index m = of_a[turn_a], k = of_a[!turn_a], n = of_b[first + !turn_b];
  Matrix left = turn_a ? Matrix{a.typed_data(), 1, of_a[1]} : Matrix{a.typed_data(), of_a[1], 1};
  Matrix right = turn_b ? Matrix{matrix, 1, of_b[first + 1]} : Matrix{matrix, of_b[first + 1], 1};
  const float* extra[3] = {};
  for (size_t i = first; i < more.size() && i < first + 3; i++) {
    auto found = more.get<Array>(i);
    if (!found) return found.error();
    extra[i - first] = found->typed_data();
  }
  auto [bias, scale, residual] = extra;
  float* out = c->typed_data();
  if (end == "plain")
    multiply(pool, m, n, k, left, right, out, n, [](Index, Index, Vector value, Index) { return value; });
  else if (end == "bias")
    multiply(pool, m, n, k, left, right, out, n,
             [bias = bias](Index, Index j, Vector value, Index count) { return value + load(bias + j, count); });
  else if (end == "gelu")
    multiply(pool, m, n, k, left, right, out, n,
             [bias = bias](Index, Index j, Vector value, Index count) { return gelu(value + load(bias + j, count)); });
  else if (end == "residual")
    multiply(pool, m, n, k, left, right, out, n,
             [bias = bias, scale = scale, residual = residual, n](Index i, Index j, Vector value, Index count) {
               return load(residual + i * n + j, count) +
                      load(scale + j, count) * (value + load(bias + j, count));
             });
  else
    return ffi::Error::InvalidArgument("beit_jax: unknown end of a product");
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(beit_product, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .RemainingArgs()
                                  .Ret<Array>()
                                  .Attr<bool>("turn_a")
                                  .Attr<bool>("turn_b")
                                  .Attr<std::string_view>("end"));

// qkv: [b, n, 3, heads, e]; then the bias [heads, n, n], if there is one.
static ffi::Error attention(ffi::ThreadPool pool, Array qkv, ffi::RemainingArgs more, Result averages) {
  auto size = qkv.dimensions();
  const float* bias = nullptr;
  if (more.size()) {
    auto found = more.get<Array>(0);
    if (!found) return found.error();
    bias = found->typed_data();
  }
  attend(pool, Attention{size[0], size[1], size[3], size[4], qkv.typed_data(), bias, averages->typed_data(), nullptr});
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    beit_attention, attention,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Array>().RemainingArgs().Ret<Array>());

// x: [..., d], scale and bias: [d].
static ffi::Error norm(ffi::ThreadPool pool, Array x, Array scale, Array bias, Result out, float epsilon) {
  Index width = scale.element_count();
  normalize(pool, x.element_count() / width, width, x.typed_data(), scale.typed_data(), bias.typed_data(), epsilon,
            out->typed_data());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(beit_norm, norm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Arg<Array>()
                                  .Ret<Array>()
                                  .Attr<float>("epsilon"));
