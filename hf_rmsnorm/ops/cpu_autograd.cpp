/* The kernels of rms_norm.c behind PyTorch's dispatcher and autograd engine, so that a call costs
 * what F.layer_norm's does. Without this file everything works, through Python, and costs some tens
 * of microseconds more per call. What is computed is defined in reference.py alone. */

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace {

using at::ScalarType;
using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Optional = std::optional<Tensor>;

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

struct Kernels {
  ForwardKernel* forward = nullptr;
  BackwardKernel* backward = nullptr;
};

constexpr size_t kTypes = static_cast<size_t>(ScalarType::NumOptions);
std::array<std::array<Kernels, kTypes>, kTypes> kernels;  // [of x][of y]
int64_t parallel_elements, max_blocks, block_rows;        // as in cpu_build.py

/* Of a dtype by its name in rms_norm.c. */
size_t index_of(std::string_view name) {
  const ScalarType type = name == "f32"    ? ScalarType::Float
                          : name == "f64"  ? ScalarType::Double
                          : name == "bf16" ? ScalarType::BFloat16
                                           : ScalarType::Half;
  return static_cast<size_t>(type);
}

struct Formula {
  int64_t k;
  double eps, offset;
  bool llama;
};

ScalarType compute_type(ScalarType x) {
  return x == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Kernels kernels_for(ScalarType x, ScalarType out) {
  const Kernels found = kernels[static_cast<size_t>(x)][static_cast<size_t>(out)];
  TORCH_CHECK(found.forward, "hf_rmsnorm has no CPU kernel from ", x, " to ", out);
  return found;
}

int threads_for(int64_t elements) {
  return elements >= parallel_elements ? at::get_num_threads() : 1;
}

/* Rows with unit stride along each; copies only if it must. */
Tensor rows_of(const Tensor& x) {
  if (x.is_contiguous()) return x;
  const Tensor rows = x.reshape({-1, x.size(-1)});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

int64_t row_stride(const Tensor& x) {
  if (!x.defined()) return 0;
  return x.is_contiguous() ? x.size(-1) : x.stride(0);
}

const void* read(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* write(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

Tensor parameter(const Optional& t, ScalarType type) {
  return t.has_value() && t->defined() ? t->to(type).contiguous() : Tensor();
}

struct Result {
  Tensor y, summed, rstd;
};

Result run_forward(const Tensor& x, const Optional& residual, const Optional& weight,
                   const Optional& bias, const Formula& f, ScalarType out, bool save_rstd) {
  const ScalarType compute = compute_type(x.scalar_type());
  const Kernels found = kernels_for(x.scalar_type(), out);
  const int64_t hidden = x.size(-1), n_rows = x.numel() / hidden;
  const Tensor rows = rows_of(x), other = residual ? rows_of(*residual) : Tensor();
  const Tensor w = parameter(weight, compute), b = parameter(bias, compute);
  Result result;
  result.y = at::empty(x.sizes(), x.options().dtype(out));
  result.summed = residual ? at::empty(x.sizes(), x.options()) : Tensor();
  if (save_rstd) result.rstd = at::empty({n_rows, 1}, x.options().dtype(compute));
  found.forward(read(rows), read(other), read(w), read(b), write(result.y), write(result.summed),
                write(result.rstd), n_rows, hidden, f.k, row_stride(rows), row_stride(other), f.eps,
                f.offset, f.llama, threads_for(x.numel()));
  return result;
}

/* dx, dweight, dbias; the last two only where wanted. */
std::array<Tensor, 3> run_backward(const Tensor& dy, const Tensor& dsummed, const Tensor& x,
                                   const Tensor& weight, const Tensor& rstd, const Formula& f,
                                   bool weight_grad, std::optional<ScalarType> bias_grad) {
  const ScalarType compute = rstd.scalar_type();
  const Kernels found = kernels_for(x.scalar_type(), dy.scalar_type());
  const int64_t hidden = x.size(-1), n_rows = x.numel() / hidden;
  const Tensor x_rows = rows_of(x), dy_rows = rows_of(dy);
  const Tensor ds_rows = dsummed.defined() ? rows_of(dsummed) : Tensor();
  const Tensor w = parameter(weight, compute);
  const int64_t blocks = std::min(max_blocks, (n_rows + block_rows - 1) / block_rows);
  const auto options = x.options().dtype(compute);
  const Tensor dx = at::empty(x.sizes(), x.options());
  Tensor dweight, dbias, dweight_partials, dbias_partials;
  if (weight_grad) {
    dweight = at::empty({hidden}, options);
    dweight_partials = at::empty({blocks, hidden}, options);
  }
  if (bias_grad) {
    dbias = at::empty({hidden}, options);
    dbias_partials = at::empty({blocks, hidden}, options);
  }
  found.backward(read(dy_rows), read(ds_rows), read(x_rows), read(w), read(rstd), write(dx),
                 write(dweight), write(dbias), write(dweight_partials), write(dbias_partials),
                 n_rows, hidden, f.k, row_stride(dy_rows), row_stride(ds_rows), row_stride(x_rows),
                 f.offset, f.llama, blocks, threads_for(x.numel()));
  if (weight_grad) dweight = dweight.to(weight.scalar_type());
  if (bias_grad) dbias = dbias.to(*bias_grad);
  return {dx, dweight, dbias};
}

/* reference.backward, through the dispatcher: for gradients that are differentiated themselves, and
 * for tensors that are no plain memory. */
std::array<Tensor, 3> reference_backward(const Tensor& dy, const Tensor& dsummed, const Tensor& x,
                                         const Tensor& weight, const Formula& f, bool weight_grad,
                                         std::optional<ScalarType> bias_grad) {
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("hf_rmsnorm_cpu::reference_backward", "")
          .typed<std::vector<Tensor>(const Tensor&, const Optional&, const Tensor&, const Optional&,
                                     int64_t, double, double, bool, bool,
                                     std::optional<ScalarType>)>();
  const auto given = [](const Tensor& t) { return t.defined() ? Optional(t) : std::nullopt; };
  const auto found = op.call(dy, given(dsummed), x, given(weight), f.k, f.eps, f.offset, f.llama,
                             weight_grad, bias_grad);
  size_t next = 0;
  std::array<Tensor, 3> result;
  result[0] = found[next++];
  if (weight_grad) result[1] = found[next++];
  if (bias_grad) result[2] = found[next++];
  return result;
}

bool wants_grad(const Tensor& t) { return t.requires_grad(); }
bool wants_grad(const Optional& t) { return t && t->requires_grad(); }
template <typename... Args>
bool any_wants_grad(const Args&... args) {
  return at::GradMode::is_enabled() && (wants_grad(args) || ...);
}

bool is_plain(const Tensor& t) {
  return !t.defined() ||
         (t.device().is_cpu() && t.layout() == at::kStrided && t.has_storage() &&
          !t.key_set().has_any(c10::python_ks | c10::functorch_transforms_ks |
                               c10::DispatchKeySet(c10::DispatchKey::ZeroTensor)));
}

struct Norm : torch::autograd::Function<Norm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Optional& residual,
                               const Optional& weight, const Optional& bias, Formula f,
                               ScalarType out) {
    Result result = run_forward(x, residual, weight, bias, f, out, true);
    ctx->set_materialize_grads(false);
    ctx->save_for_backward(
        {residual ? result.summed : x, weight.value_or(Tensor()), result.rstd});
    auto& saved = ctx->saved_data;
    saved["k"] = f.k;
    saved["eps"] = f.eps;
    saved["offset"] = f.offset;
    saved["llama"] = f.llama;
    saved["weight_grad"] = weight && weight->requires_grad();
    if (bias && bias->requires_grad()) saved["bias_grad"] = bias->scalar_type();
    saved["residual"] = residual.has_value();
    if (residual) return {result.y, result.summed};
    return {result.y};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const auto& saved = ctx->saved_data;
    const bool has_residual = saved.at("residual").toBool();
    const Tensor& dy = grads[0];
    const Tensor dsummed = has_residual ? grads[1] : Tensor();
    std::array<Tensor, 3> d;
    if (dy.defined()) {
      const auto tensors = ctx->get_saved_variables();
      const Tensor &x = tensors[0], &weight = tensors[1], &rstd = tensors[2];
      const Formula f{saved.at("k").toInt(), saved.at("eps").toDouble(),
                      saved.at("offset").toDouble(), saved.at("llama").toBool()};
      const bool weight_grad = saved.at("weight_grad").toBool();
      const auto found = saved.find("bias_grad");
      const auto bias_grad = found == saved.end()
                                 ? std::nullopt
                                 : std::optional<ScalarType>(found->second.toScalarType());
      if (at::GradMode::is_enabled() || !is_plain(dy) || !is_plain(dsummed))
        d = reference_backward(dy, dsummed, x, weight, f, weight_grad, bias_grad);
      else
        d = run_backward(dy, dsummed, x, weight, rstd, f, weight_grad, bias_grad);
    } else {
      d[0] = dsummed;
    }
    return {d[0], has_residual ? d[0] : Tensor(), d[1], d[2], Tensor(), Tensor()};
  }
};

template <bool autograd>
Tensor rms_norm(const Tensor& x, const Optional& weight, const Optional& bias, int64_t k,
                double eps, double offset, bool llama, ScalarType out) {
  const Formula f{k, eps, offset, llama};
  if constexpr (autograd) {
    if (any_wants_grad(x, weight, bias))
      return Norm::apply(x, Optional(), weight, bias, f, out)[0];
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return run_forward(x, std::nullopt, weight, bias, f, out, false).y;
}

template <bool autograd>
std::tuple<Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual,
                                        const Optional& weight, const Optional& bias, int64_t k,
                                        double eps, double offset, bool llama, ScalarType out) {
  const Formula f{k, eps, offset, llama};
  if constexpr (autograd) {
    if (any_wants_grad(x, residual, weight, bias)) {
      const auto found = Norm::apply(x, Optional(residual), weight, bias, f, out);
      return {found[0], found[1]};
    }
  }
  at::AutoDispatchBelowADInplaceOrView below;
  const Result result = run_forward(x, residual, weight, bias, f, out, false);
  return {result.y, result.summed};
}

TORCH_LIBRARY(hf_rmsnorm_cpu, m) {
  m.def(
      "rms_norm(Tensor x, Tensor? weight, Tensor? bias, int k, float eps, float offset, "
      "bool llama, ScalarType out) -> Tensor");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, int k, float eps, "
      "float offset, bool llama, ScalarType out) -> (Tensor, Tensor)");
  m.def(
      "reference_backward(Tensor dy, Tensor? dsummed, Tensor x, Tensor? weight, int k, float eps, "
      "float offset, bool llama, bool weight_grad, ScalarType? bias_grad) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(hf_rmsnorm_cpu, CPU, m) {
  m.impl("rms_norm", rms_norm<false>);
  m.impl("add_rms_norm", add_rms_norm<false>);
}

TORCH_LIBRARY_IMPL(hf_rmsnorm_cpu, AutogradCPU, m) {
  m.impl("rms_norm", rms_norm<true>);
  m.impl("add_rms_norm", add_rms_norm<true>);
}

}  // namespace

extern "C" {
void hf_rmsnorm_settings(int64_t elements, int64_t blocks, int64_t rows) {
  parallel_elements = elements;
  max_blocks = blocks;
  block_rows = rows;
}
void hf_rmsnorm_kernels(const char* x, const char* out, void* forward, void* backward) {
  kernels[index_of(x)][index_of(out)] = {reinterpret_cast<ForwardKernel*>(forward),
                                         reinterpret_cast<BackwardKernel*>(backward)};
}
}
