/* The kernels of rms_norm.c on tensors. Included by cpu_autograd.cpp. */

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

namespace {

using at::ScalarType;
using at::Tensor;

using ForwardKernel = void(const void* x, const void* residual, const void* weight,
                           const void* bias, void* y, void* summed, void* rstd, ptrdiff_t rows,
                           ptrdiff_t hidden, ptrdiff_t k, ptrdiff_t x_stride,
                           ptrdiff_t residual_stride, double eps, double offset, int llama,
                           int threads);
using BackwardKernel = void(const void* dy, const void* dsummed, const void* x, const void* weight,
                            const void* rstd, void* dx, void* dweight, void* dbias,
                            void* dweight_partials, void* dbias_partials, ptrdiff_t rows,
                            ptrdiff_t hidden, ptrdiff_t k, ptrdiff_t dy_stride,
                            ptrdiff_t dsummed_stride, ptrdiff_t x_stride, double offset, int llama,
                            ptrdiff_t blocks, int threads);

using WidenKernel = void(const void* from, void* to, ptrdiff_t n);

struct Kernels {
  ForwardKernel* forward = nullptr;
  BackwardKernel* backward = nullptr;
  WidenKernel* widen = nullptr;  // from x's dtype to the one that is computed in
};

constexpr size_t kTypes = static_cast<size_t>(ScalarType::NumOptions);
std::array<std::array<Kernels, kTypes>, kTypes> kernels;  // [of x][of y]
int64_t parallel_elements, max_blocks, block_rows;        // as in cpu_build.py

Kernels& kernels_for(ScalarType x, ScalarType out) {
  return kernels[static_cast<size_t>(x)][static_cast<size_t>(out)];
}

struct Formula {
  int64_t k;
  double eps, offset;
  bool llama;
};

bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

ScalarType compute_type(ScalarType x) {
  return x == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

int threads_for(int64_t elements) {
  return elements >= parallel_elements ? at::get_num_threads() : 1;
}

/* Rows with unit stride along each; copies only if it must. */
Tensor rows_of(const Tensor& x) {
  if (!x.defined() || x.is_contiguous()) return x;
  const Tensor rows = x.reshape({-1, x.size(-1)});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

int64_t row_stride(const Tensor& x) {
  if (!x.defined()) return 0;
  return x.is_contiguous() ? x.size(-1) : x.stride(0);
}

const void* read(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* write(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

Tensor empty(at::IntArrayRef sizes, ScalarType type) {
  return Tensor(at::detail::empty_cpu(sizes, type));
}

/* A weight, a bias or the gradient of one, contiguous. */
Tensor vector(const Tensor& t, ScalarType type) {
  if (!t.defined() || (t.scalar_type() == type && t.is_contiguous())) return t;
  const auto widen = kernels_for(t.scalar_type(), type).widen;
  if (!widen || type != compute_type(t.scalar_type()) || !t.is_contiguous())
    return t.to(type).contiguous();
  const Tensor wide = empty(t.sizes(), type);
  widen(read(t), write(wide), t.numel());
  return wide;
}

struct Result {
  Tensor y, summed, rstd;
};

/* residual, weight and bias may be undefined. */
Result run_forward(const Tensor& x, const Tensor& residual, const Tensor& weight,
                   const Tensor& bias, const Formula& f, ScalarType out, bool save_rstd) {
  at::AutoDispatchBelowADInplaceOrView below;
  const ScalarType compute = compute_type(x.scalar_type());
  const int64_t hidden = x.size(-1), n_rows = x.numel() / hidden;
  const Tensor rows = rows_of(x), other = rows_of(residual);
  const Tensor w = vector(weight, compute), b = vector(bias, compute);
  Result result;
  result.y = empty(x.sizes(), out);
  if (residual.defined()) result.summed = empty(x.sizes(), x.scalar_type());
  if (save_rstd) result.rstd = empty({n_rows, 1}, compute);
  kernels_for(x.scalar_type(), out)
      .forward(read(rows), read(other), read(w), read(b), write(result.y), write(result.summed),
               write(result.rstd), n_rows, hidden, f.k, row_stride(rows), row_stride(other), f.eps,
               f.offset, f.llama, threads_for(x.numel()));
  return result;
}

struct Gradients {
  Tensor sum, weight, bias;
};

/* dsummed may be undefined; those of weight and bias only where wanted. */
Gradients run_backward(const Tensor& dy, const Tensor& dsummed, const Tensor& x,
                       const Tensor& weight, const Tensor& rstd, const Formula& f,
                       bool weight_grad, std::optional<ScalarType> bias_grad) {
  at::AutoDispatchBelowADInplaceOrView below;
  const ScalarType compute = rstd.scalar_type();
  const int64_t hidden = x.size(-1), n_rows = x.numel() / hidden;
  const Tensor x_rows = rows_of(x), dy_rows = rows_of(dy), ds_rows = rows_of(dsummed);
  const Tensor w = vector(weight, compute);
  const int64_t blocks = std::min(max_blocks, (n_rows + block_rows - 1) / block_rows);
  Gradients d{empty(x.sizes(), x.scalar_type()), {}, {}};
  Tensor weight_partials, bias_partials;
  const auto summed_over_blocks = [&](Tensor& gradient, Tensor& partials) {
    gradient = empty({hidden}, compute);
    partials = blocks == 1 ? gradient : empty({blocks, hidden}, compute);
  };
  if (weight_grad) summed_over_blocks(d.weight, weight_partials);
  if (bias_grad) summed_over_blocks(d.bias, bias_partials);
  kernels_for(x.scalar_type(), dy.scalar_type())
      .backward(read(dy_rows), read(ds_rows), read(x_rows), read(w), read(rstd), write(d.sum),
                write(d.weight), write(d.bias), write(weight_partials), write(bias_partials),
                n_rows, hidden, f.k, row_stride(dy_rows), row_stride(ds_rows), row_stride(x_rows),
                f.offset, f.llama, blocks, threads_for(x.numel()));
  if (weight_grad) d.weight = vector(d.weight, weight.scalar_type());
  if (bias_grad) d.bias = vector(d.bias, *bias_grad);
  return d;
}

}  // namespace
