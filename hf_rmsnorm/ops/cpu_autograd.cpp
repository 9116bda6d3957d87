/* The kernels of rms_norm.c behind one Python function and one autograd node, so that a call costs
 * no more than one of F.layer_norm. Without this file everything works, through Python. What is
 * computed is defined in reference.py alone.
 *
 * Why it is worth private headers of PyTorch and a build in the background: through Python a call
 * takes 8 us more forward and 39 us more forward and backward (1 x 768: 9.7 us against 1.8, where
 * F.layer_norm takes 2.8; at 512 rows 1.4 times as long). Where calls are many and small a user sees
 * it: with it, a sentence encoder (6 layers of 384, 16 tokens) is 1.04 times as fast as without (1.06
 * with two threads), a GPT-2 (12 of 768) that decodes one token 1.02 (1.03); without it, both are
 * slower patched than unpatched. Held to: 2% in one of the two, or it goes.
 * python scripts/bench_node.py --threads 1: x86-64, one of 2 cores, torch 2.13.0, 2026-11-25, medians
 * (scripts/results/node-cpu.json). */

#include <torch/csrc/Dtype.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <ATen/record_function.h>

#include "cpu_tensors.h"

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

PyObject* python_backward;  // cpu_autograd._backward

/* Memory of a CPU that may be read as it is. */
bool is_plain(const Tensor& t) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet usual({DispatchKey::CPU, DispatchKey::AutogradCPU,
                                       DispatchKey::AutocastCPU, DispatchKey::ADInplaceOrView});
  return !t.defined() || (usual.isSupersetOf(t.key_set()) && t.has_storage());
}

/* As a weight or a bias. */
bool fits(const Tensor& t, const Tensor& x) {
  return !t.defined() ||
         (t.dim() == 1 && t.size(0) == x.size(-1) &&
          (t.scalar_type() != ScalarType::Double || x.scalar_type() == ScalarType::Double));
}

/* As a residual or the gradient of one. */
bool matches(const Tensor& t, const Tensor& x) {
  return !t.defined() || (t.sizes() == x.sizes() && t.scalar_type() == x.scalar_type());
}

/* For gradients that are differentiated themselves, and for tensors that are no plain memory. */
Gradients reference_backward(const Tensor& dy, const Tensor& dsummed, const Tensor& x,
                             const Tensor& weight, const Formula& f, bool weight_grad,
                             std::optional<ScalarType> bias_grad) {
  pybind11::gil_scoped_acquire gil;
  const auto dtype = bias_grad ? pybind11::cast(*bias_grad) : pybind11::none();
  const auto found = pybind11::handle(python_backward)(dy, dsummed, x, weight, f.k, f.eps, f.offset,
                                                       f.llama, weight_grad, dtype);
  using Maybe = std::optional<Tensor>;
  const auto [sum, w, b] = found.cast<std::tuple<Tensor, Maybe, Maybe>>();
  return {sum, w.value_or(Tensor()), b.value_or(Tensor())};
}

/* Of x, residual, weight and bias; `saved` is what was normalised, weight and rstd. */
variable_list gradients(const variable_list& grads, const std::array<Tensor, 3>& saved,
                        const Formula& f, bool weight_grad, std::optional<ScalarType> bias_grad) {
  const Tensor &dy = grads[0], dsummed = grads.size() > 1 ? grads[1] : Tensor();
  if (!dy.defined()) return {dsummed, dsummed, Tensor(), Tensor()};
  const auto& [x, weight, rstd] = saved;
  const bool plain = is_plain(dy) && is_plain(dsummed) && is_plain(x) && is_plain(weight);
  const bool known = plain && dy.sizes() == x.sizes() && matches(dsummed, x) && fits(weight, x) &&
                     kernels_for(x.scalar_type(), dy.scalar_type()).backward;
  const Gradients d =
      known && !at::GradMode::is_enabled()
          ? run_backward(dy, dsummed, x, weight, rstd, f, weight_grad, bias_grad)
          : reference_backward(dy, dsummed, x, weight, f, weight_grad, bias_grad);
  return {d.sum, grads.size() > 1 ? d.sum : Tensor(), d.weight, d.bias};
}

/* The form in which compiled autograd knows custom functions; nothing else asks for it. */
struct Norm : torch::autograd::Function<Norm> {
  static variable_list forward(torch::autograd::AutogradContext*) { return {}; }
  static variable_list backward(torch::autograd::AutogradContext* ctx, variable_list grads) {
    const auto saved = ctx->get_saved_variables();
    const auto& fields = ctx->saved_data.at("formula").toTupleRef().elements();
    const Formula f{fields[0].toInt(), fields[1].toDouble(), fields[2].toDouble(),
                    fields[3].toBool()};
    const bool bias_grad = ctx->needs_input_grad(3);
    return gradients(grads, {saved[0], saved[1], saved[2]}, f, ctx->needs_input_grad(2),
                     bias_grad ? std::optional(fields[4].toScalarType()) : std::nullopt);
  }
};

/* What Norm::apply makes, in a fraction of the time. Its next edges are x, residual, weight and
 * bias, there or not. */
struct NormBackward : torch::autograd::CppNode<Norm> {
  Formula f;
  ScalarType bias_type;
  SavedVariable x, weight, rstd;  // x is what was normalised: an output where a residual was added

  std::string name() const override { return "RMSNormBackward"; }

  std::array<Tensor, 3> saved() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {x.unpack(getptr()), weight.unpack(), rstd.unpack()};
  }

  variable_list apply(variable_list&& grads) override {
    return gradients(grads, saved(), f, task_should_compute_output(2),
                     task_should_compute_output(3) ? std::optional(bias_type) : std::nullopt);
  }

  void release_variables() override {
    CppNode::release_variables();
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable* variable : {&x, &weight, &rstd}) variable->reset_data();
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const_cast<NormBackward*>(this)->fill_context();
    CppNode::compiled_args(args);
  }

  void fill_context() {
    if (!is_variable_input_.empty()) return;
    is_variable_input_.assign(num_outputs(), true);
    output_info_.resize(num_inputs());
    ctx_.set_materialize_grads(false);
    ctx_.saved_data["formula"] =
        c10::ivalue::Tuple::create({f.k, f.eps, f.offset, f.llama, bias_type});
    const auto tensors = saved();
    ctx_.save_for_backward({tensors.begin(), tensors.end()});
    set_ctx_grad_fn(getptr());
    save_variables_to_ctx();
  }
};

/* PyTorch keeps nodes in a shared_ptr up to some version, in an intrusive_ptr after. */
template <typename Pointer = decltype(torch::autograd::Edge::function)>
Pointer owned(NormBackward* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return Pointer(node, [](auto* any) { deleteNode(any); });
  else
    return Pointer::unsafe_steal_from_new(node);
}

/* y, and the sum where there is a residual. */
std::pair<Tensor, Tensor> differentiable(const Tensor& x, const Tensor& residual,
                                         const Tensor& weight, const Tensor& bias,
                                         const Formula& f, ScalarType out) {
  RECORD_FUNCTION("hf_rmsnorm::rms_norm", std::vector<c10::IValue>({x, residual, weight, bias}));
  const bool grad = torch::autograd::compute_requires_grad(x, residual, weight, bias);
  const Result result = run_forward(x, residual, weight, bias, f, out, grad);
  if (grad) {
    auto* node = new NormBackward;
    const auto owner = owned(node);
    node->set_next_edges(torch::autograd::collect_next_edges(x, residual, weight, bias));
    node->f = f;
    node->bias_type = bias.defined() ? bias.scalar_type() : x.scalar_type();
    torch::autograd::set_history(result.y, owner);
    if (residual.defined()) torch::autograd::set_history(result.summed, owner);
    node->x = SavedVariable(residual.defined() ? result.summed : x, residual.defined());
    node->weight = SavedVariable(weight, false);
    node->rstd = SavedVariable(result.rstd, false);
  }
  return {result.y, result.summed};
}

/* Nothing traces, transforms or intercepts what is called. */
bool is_plain_mode() {
  constexpr auto usual = c10::default_included_set | c10::autocast_dispatch_keyset;
  const auto now = c10::impl::tls_local_dispatch_key_set();
  return usual.isSupersetOf(now.included_) &&
         (c10::InferenceMode::is_enabled() || !now.excluded_.has(c10::DispatchKey::AutogradCPU));
}

/* Whether this file knows such tensors; None is none. */
bool take(PyObject* given, Tensor& t) {
  if (given == Py_None) return true;
  if (!THPVariable_CheckExact(given)) return false;
  t = THPVariable_Unpack(given);
  return is_plain(t) && is_float(t.scalar_type()) && !t._fw_grad(0).defined();
}

/* normalise(x, residual, weight, bias, make_formula, *settings): y, or (y, summed) with a residual;
 * None if this is nothing for this file: Python goes on, and words what is wrong. The rest of
 * make_formula's arguments, after the hidden size, are the settings. */
PyObject* normalise(PyObject*, PyObject* const* args, Py_ssize_t n_args) {
  HANDLE_TH_ERRORS
  constexpr size_t kSettings = 5;
  TORCH_CHECK_TYPE(n_args == 5 + kSettings, "normalise takes 5 arguments and the settings");
  Tensor x, residual, weight, bias;
  if (!is_plain_mode() || !take(args[0], x) || !x.defined() || !x.dim() || !x.numel() ||
      !take(args[1], residual) || !take(args[2], weight) || !take(args[3], bias) ||
      !fits(weight, x) || !fits(bias, x) || !matches(residual, x))
    Py_RETURN_NONE;

  const pybind11::int_ hidden(x.size(-1));
  std::array<PyObject*, 1 + kSettings> given{hidden.ptr()};
  std::copy_n(args + 5, kSettings, given.begin() + 1);
  const auto formula = pybind11::reinterpret_steal<pybind11::tuple>(
      PyObject_Vectorcall(args[4], given.data(), given.size(), nullptr));
  if (!formula) throw python_error();
  const auto field = [&](int i) { return PyTuple_GET_ITEM(formula.ptr(), i); };
  const Formula f{PyLong_AsLongLong(field(0)), PyFloat_AsDouble(field(1)),
                  PyFloat_AsDouble(field(2)), PyObject_IsTrue(field(3)) == 1};
  if (PyErr_Occurred()) throw python_error();
  ScalarType out = x.scalar_type();
  if (THPDtype_Check(field(4)))
    out = reinterpret_cast<THPDtype*>(field(4))->scalar_type;
  else if (f.llama && weight.defined())
    out = c10::promoteTypes(out, weight.scalar_type());
  if (!kernels_for(x.scalar_type(), out).forward) Py_RETURN_NONE;

  std::pair<Tensor, Tensor> result;
  {
    pybind11::gil_scoped_release no_gil;
    result = differentiable(x, residual, weight, bias, f, out);
  }
  if (!residual.defined()) return THPVariable_Wrap(std::move(result.first));
  return pybind11::make_tuple(std::move(result.first), std::move(result.second)).release().ptr();
  END_HANDLE_TH_ERRORS
}

PyMethodDef normalise_method = {
    "normalise", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(normalise)), METH_FASTCALL,
    nullptr};

}  // namespace

PYBIND11_MODULE(cpu_autograd, m) {
  m.def("set_up", [](int64_t elements, int64_t blocks, int64_t rows, pybind11::object backward) {
    parallel_elements = elements;
    max_blocks = blocks;
    block_rows = rows;
    python_backward = backward.release().ptr();
  });
  m.def("add_kernels", [](ScalarType x, ScalarType out, uintptr_t forward, uintptr_t backward,
                          uintptr_t widen) {
    kernels_for(x, out) = {reinterpret_cast<ForwardKernel*>(forward),
                           reinterpret_cast<BackwardKernel*>(backward),
                           reinterpret_cast<WidenKernel*>(widen)};
  });
  m.attr("normalise") =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&normalise_method, nullptr));
}
