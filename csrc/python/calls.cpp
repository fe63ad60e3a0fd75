// mistral_kernels._calls: kernels called from Python past torch's dispatcher, in CPython's limited API. From Python a
// call through the dispatcher takes longer than a kernel takes for one token. Tensors come and go by DLPack's C
// functions, which torch exports for this purpose.
#define Py_LIMITED_API 0x030a0000
#define PY_SSIZE_T_CLEAN
#include <ATen/dlpack.h>
#include <Python.h>

#include <cmath>
#include <exception>
#include <iterator>
#include <string>

#include "torch/direct.h"

namespace {

constexpr int most_arguments = 16, most_outputs = 4;
// Calls on fewer elements keep the interpreter's lock: to give it away and get it back takes about as long.
constexpr int64_t short_elements = 1 << 14;

// What is asked of Python, for the life of the process.
struct Python {
  const DLPackExchangeAPI* exchange;
  PyObject *tensor, *parameter;  // types; a tensor of another one may mean more than its numbers
  PyObject* from_pointers;       // a list of tensors from a list of capsules with their handles
  PyObject *grad_is_enabled, *autocast_is_on;
  PyObject* requires_grad;  // the descriptor, and how it is read, without a search by name each time
  descrgetfunc get;
  PyObject* listeners[4];                   // functions: where one answers with something true, a call would be seen
  PyObject *profiler, *forward_ad;          // what these modules hold, by name
  PyObject *is_neg, *is_profiling, *level;  // names
} python;

struct Kernel {
  mk::Direct run;
  std::string arguments;  // a letter each: T tensor, O tensor or None, f, d for a float or None, i, b
  int outputs, shown;     // the first outputs are shown above autograd, the rest is there for the backward
  bool casts;             // above autograd, autocast would see to the arguments
};

// torch's numbers for dtypes that kernels read, beside DLPack's codes.
struct Type {
  int32_t torch;
  DLDataType dlpack;
};
constexpr Type types[] = {{0, {kDLUInt, 8, 1}},   {1, {kDLInt, 8, 1}},     {3, {kDLInt, 32, 1}},
                          {4, {kDLInt, 64, 1}},   {5, {kDLFloat, 16, 1}},  {6, {kDLFloat, 32, 1}},
                          {7, {kDLFloat, 64, 1}}, {15, {kDLBfloat, 16, 1}}};

// Takes the reference. What cannot be asked counts as true.
bool is_true(PyObject* answer) {
  if (!answer) return PyErr_Clear(), true;
  const int truth = answer == Py_False || answer == Py_None ? 0 : PyObject_IsTrue(answer);
  Py_DECREF(answer);
  if (truth < 0) PyErr_Clear();
  return truth != 0;
}

// Whether a mode, a transform, a tracer, the profiler or forward-mode differentiation would see a call.
bool something_listens() {
  for (PyObject* listener : python.listeners)
    if (is_true(PyObject_CallNoArgs(listener))) return true;
  PyObject* level = PyDict_GetItem(python.forward_ad, python.level);
  return PyDict_GetItem(python.profiler, python.is_profiling) != Py_False || !level || PyLong_AsLong(level) >= 0;
}

// The arguments on their way to a kernel.
class Arguments {
 public:
  explicit Arguments(bool grad) : grad_(grad) {}

  // False for what a kernel cannot take as it is.
  bool add(char kind, PyObject* value) {
    mk::Argument& a = all_[size_];
    a = {};
    switch (kind) {
      case 'O':
        if (value == Py_None) break;
        [[fallthrough]];
      case 'T':
        if (!add_tensor(value)) return false;
        a.array = &arrays_[size_];
        break;
      case 'd':
        a.number = NAN;
        if (value == Py_None) break;
        [[fallthrough]];
      case 'f':
        if (!PyFloat_CheckExact(value)) return false;
        a.number = PyFloat_AsDouble(value);
        if (kind == 'd' && std::isnan(a.number)) return false;
        break;
      case 'b':
        if (!PyBool_Check(value)) return false;
        a.integer = value == Py_True;
        break;
      default:
        if (!PyLong_CheckExact(value)) return false;
        a.integer = PyLong_AsLongLong(value);
        if (a.integer == -1 && PyErr_Occurred()) return PyErr_Clear(), false;
    }
    size_++;
    return true;
  }

  const mk::Argument* all() const { return all_; }
  int64_t elements() const { return elements_; }

 private:
  bool add_tensor(PyObject* value) {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(value));
    if (type != python.tensor && type != python.parameter) return false;
    if (grad_ && is_true(python.get(python.requires_grad, value, type))) return false;
    DLTensor t;
    if (python.exchange->dltensor_from_py_object_no_sync(value, &t)) return PyErr_Clear(), false;
    if (t.device.device_type != kDLCPU || t.byte_offset) return false;
    if (may_be_negated(t) && is_true(PyObject_CallMethodObjArgs(value, python.is_neg, nullptr))) return false;
    for (const Type& known : types) {
      if (known.dlpack.code != t.dtype.code || known.dlpack.bits != t.dtype.bits || t.dtype.lanes != 1) continue;
      arrays_[size_] = {t.data, t.ndim, t.shape, t.strides, known.torch};
      int64_t elements = 1;
      for (int32_t d = 0; d < t.ndim; d++) elements *= t.shape[d];
      elements_ += elements;
      return true;
    }
    return false;
  }

  // torch holds the values of `z.conj().imag` negated, numbers with others between them.
  static bool may_be_negated(const DLTensor& t) {
    return t.dtype.code == kDLFloat && (t.ndim == 0 || t.strides[t.ndim - 1] != 1 || t.shape[t.ndim - 1] == 1);
  }

  bool grad_;
  int size_ = 0;
  int64_t elements_ = 0;
  mk::Argument all_[most_arguments];
  mk::Array arrays_[most_arguments];
};

// An output's memory on its way to torch.
struct Managed {
  DLManagedTensorVersioned torchs;
  mk::Output ours;
};

void release(DLManagedTensorVersioned* torchs) {
  auto* managed = static_cast<Managed*>(torchs->manager_ctx);
  managed->ours.release(managed->ours.owner);
  delete managed;
}

void discard(mk::Output& output) {
  if (output.release) output.release(output.owner);
  output = {};
}

PyObject* tensor_of_memory(mk::Output& output) {
  auto* managed = new Managed{{}, output};
  DLManagedTensorVersioned& t = managed->torchs;
  t.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
  t.manager_ctx = managed;
  t.deleter = release;
  const mk::Array& a = output.array;
  int64_t *sizes = const_cast<int64_t*>(a.sizes), *strides = const_cast<int64_t*>(a.strides);
  t.dl_tensor = {a.data, {kDLCPU, 0}, static_cast<int32_t>(a.dims), {}, sizes, strides, 0};
  for (const Type& known : types)
    if (known.torch == a.type) t.dl_tensor.dtype = known.dlpack;
  output = {};
  void* tensor;
  return python.exchange->managed_tensor_to_py_object_no_sync(&t, &tensor) ? nullptr : static_cast<PyObject*>(tensor);
}

// The function that takes several handles takes them over; the one for a single handle does not.
PyObject* tensor_of_torch(mk::Output& output) {
  PyObject* handles = Py_BuildValue("[N]", PyCapsule_New(output.torch, nullptr, nullptr));
  if (!handles) return nullptr;
  PyObject* tensors = PyObject_CallFunctionObjArgs(python.from_pointers, handles, nullptr);
  output = {};
  Py_DECREF(handles);
  if (!tensors) return nullptr;
  PyObject* tensor = PySequence_GetItem(tensors, 0);
  Py_DECREF(tensors);
  return tensor;
}

PyObject* tensor_of(mk::Output& output) { return output.torch ? tensor_of_torch(output) : tensor_of_memory(output); }

// A tensor, or a tuple of several or none.
PyObject* result_of(mk::Output* outputs, int count) {
  if (count == 1) return tensor_of(outputs[0]);
  PyObject* result = PyTuple_New(count);
  for (int i = 0; result && i < count; i++) {
    PyObject* tensor = tensor_of(outputs[i]);
    if (!tensor || PyTuple_SetItem(result, i, tensor)) {
      Py_DECREF(result);
      return nullptr;
    }
  }
  return result;
}

enum class Outcome { done, needs_torch, refused };

Outcome run(const Kernel& kernel, const Arguments& arguments, mk::Output* outputs, bool own_memory,
            std::string* error) {
  try {
    return kernel.run(arguments.all(), outputs, own_memory) ? Outcome::done : Outcome::needs_torch;
  } catch (const std::exception& caught) {
    *error = caught.what();
    return Outcome::refused;
  }
}

// What the kernel makes of the arguments; None where it cannot take them as they are.
PyObject* call(PyObject* capsule, PyObject* const* values, Py_ssize_t count, bool above_autograd) {
  const auto& kernel = *static_cast<const Kernel*>(PyCapsule_GetPointer(capsule, nullptr));
  if (count != static_cast<Py_ssize_t>(kernel.arguments.size())) {
    PyErr_Format(PyExc_TypeError, "the kernel takes %zd arguments, not %zd", kernel.arguments.size(), count);
    return nullptr;
  }
  if (something_listens()) Py_RETURN_NONE;
  if (above_autograd && kernel.casts && is_true(PyObject_CallNoArgs(python.autocast_is_on))) Py_RETURN_NONE;
  Arguments arguments(above_autograd && is_true(PyObject_CallNoArgs(python.grad_is_enabled)));
  for (Py_ssize_t i = 0; i < count; i++)
    if (!arguments.add(kernel.arguments[i], values[i])) Py_RETURN_NONE;
  mk::Output outputs[most_outputs] = {};
  Outcome outcome;
  std::string error;
  if (arguments.elements() < short_elements) {
    outcome = run(kernel, arguments, outputs, above_autograd, &error);
  } else {
    Py_BEGIN_ALLOW_THREADS;
    outcome = run(kernel, arguments, outputs, above_autograd, &error);
    Py_END_ALLOW_THREADS;
  }
  if (outcome == Outcome::refused && !above_autograd) {
    PyErr_SetString(PyExc_RuntimeError, error.c_str());
    return nullptr;
  }
  if (outcome != Outcome::done) Py_RETURN_NONE;
  PyObject* result = result_of(outputs, above_autograd ? kernel.shown : kernel.outputs);
  for (mk::Output& output : outputs) discard(output);
  return result;
}

PyObject* at_once(PyObject* kernel, PyObject* const* values, Py_ssize_t count) {
  return call(kernel, values, count, true);
}

PyObject* below_autograd(PyObject* kernel, PyObject* const* values, Py_ssize_t count) {
  return call(kernel, values, count, false);
}

template <class F>
PyCFunction as_function(F* f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(f));
}

PyMethodDef of_kernel[] = {{"at_once", as_function(at_once), METH_FASTCALL, nullptr},
                           {"below_autograd", as_function(below_autograd), METH_FASTCALL, nullptr}};

// kernel(address, arguments, outputs, shown, casts) -> (at_once, below_autograd); kernels live as long as the process.
PyObject* kernel(PyObject*, PyObject* arguments) {
  unsigned long long address;
  const char* letters;
  int outputs, shown, casts;
  if (!PyArg_ParseTuple(arguments, "Ksiip", &address, &letters, &outputs, &shown, &casts)) return nullptr;
  const std::string kinds = letters;
  if (kinds.size() > most_arguments || outputs > most_outputs || shown > outputs) {
    PyErr_Format(PyExc_ValueError, "a kernel of %zd arguments and %d outputs, %d shown; at most %d and %d are possible",
                 kinds.size(), outputs, shown, most_arguments, most_outputs);
    return nullptr;
  }
  auto* made = new Kernel{reinterpret_cast<mk::Direct>(address), kinds, outputs, shown, casts != 0};
  PyObject* capsule = PyCapsule_New(made, nullptr, nullptr);
  if (!capsule) return nullptr;
  PyObject* both = Py_BuildValue("(NN)", PyCFunction_NewEx(&of_kernel[0], capsule, nullptr),
                                 PyCFunction_NewEx(&of_kernel[1], capsule, nullptr));
  Py_DECREF(capsule);
  return both;
}

// ask(exchange, Tensor, Parameter, from_pointers, grad_is_enabled, requires_grad, autocast_is_on, listeners, profiler,
// forward_ad); see Python.
PyObject* ask(PyObject*, PyObject* arguments) {
  PyObject *exchange, *listeners;
  Python& p = python;
  if (!PyArg_ParseTuple(arguments, "OOOOOOOO!O!O!", &exchange, &p.tensor, &p.parameter, &p.from_pointers,
                        &p.grad_is_enabled, &p.requires_grad, &p.autocast_is_on, &PyTuple_Type, &listeners,
                        &PyDict_Type, &p.profiler, &PyDict_Type, &p.forward_ad))
    return nullptr;
  p.get = reinterpret_cast<descrgetfunc>(PyType_GetSlot(Py_TYPE(p.requires_grad), Py_tp_descr_get));
  p.exchange = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(exchange, "dlpack_exchange_api"));
  if (!p.exchange) return nullptr;
  if (!p.get) {
    PyErr_SetString(PyExc_ImportError, "requires_grad is no descriptor");
    return nullptr;
  }
  constexpr Py_ssize_t count = std::size(Python{}.listeners);
  if (p.exchange->header.version.major != DLPACK_MAJOR_VERSION || PyTuple_Size(listeners) != count) {
    PyErr_Format(PyExc_ImportError, "torch speaks DLPack %u, this module %d, and has %zd listeners, not %zd",
                 p.exchange->header.version.major, DLPACK_MAJOR_VERSION, PyTuple_Size(listeners), count);
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < count; i++) p.listeners[i] = PyTuple_GetItem(listeners, i);
  p.is_neg = PyUnicode_InternFromString("is_neg");
  p.is_profiling = PyUnicode_InternFromString("_is_profiler_enabled");
  p.level = PyUnicode_InternFromString("_current_level");
  if (!p.is_neg || !p.is_profiling || !p.level) return nullptr;
  Py_INCREF(arguments);  // and with it all of the above
  Py_RETURN_NONE;
}

PyMethodDef functions[] = {
    {"kernel", kernel, METH_VARARGS, nullptr}, {"ask", ask, METH_VARARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_calls", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__calls() { return PyModule_Create(&module); }
