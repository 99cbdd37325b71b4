// Binds each entry point of api.h as a function of integers (pointers too) and floats. No other file of csrc/ includes
// Python.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>

#include "cpu/float_mode.h"
#include "illada/api.h"

namespace {

enum Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16 };
const char* const kIsaNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};

// Returns the best instruction set of this processor, or the one that ILLADA_CPU_ISA names if the processor has it.
Isa detect_isa() {
  Isa best = kScalar;
#if defined(__x86_64__) && !defined(ILLADA_SCALAR_ONLY)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = kAvx2;
  if (best == kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
#endif
  if (const char* wanted = std::getenv("ILLADA_CPU_ISA"))
    for (int i = 0; i < best; ++i)
      if (!std::strcmp(wanted, kIsaNames[i])) best = Isa(i);
  return best;
}

const Isa isa = detect_isa();

// In a child of fork, OpenMP waits for threads that only the parent has, and a first parallel region would never end
// (torch's own operations hang so). OpenMP keeps them by calling thread, so that there a call runs on a thread of its
// own, with new ones.
bool forked = false;

// An argument on its way from Python, and what it becomes: pointers come as integers.
union Value {
  long long whole;
  double real;
};
struct Kind {
  bool real;
  int bytes;
};
template <class T> constexpr Kind kind_of() {
  static_assert(std::is_floating_point_v<T> || std::is_pointer_v<T> || (std::is_integral_v<T> && std::is_signed_v<T>));
  return {std::is_floating_point_v<T>, sizeof(T)};
}
template <class T> T as(Value value) {
  if constexpr (std::is_floating_point_v<T>) return T(value.real);
  else if constexpr (std::is_pointer_v<T>) return reinterpret_cast<T>(value.whole);
  else return T(value.whole);
}

// Returns whether the arguments have these kinds; otherwise a Python error is set.
bool take(const char* name, PyObject* const* args, Py_ssize_t count, const Kind* kinds, Py_ssize_t wanted, Value* to) {
  if (count != wanted) {
    PyErr_Format(PyExc_TypeError, "%s: expected %zd arguments, got %zd", name, wanted, count);
    return false;
  }
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (kinds[i].real) {
      to[i].real = PyFloat_AsDouble(args[i]);
      if (!PyErr_Occurred()) continue;
    } else {
      to[i].whole = PyLong_AsLongLong(args[i]);
      if (!PyErr_Occurred() && (kinds[i].bytes == 8 || int(to[i].whole) == to[i].whole)) continue;
    }
    PyErr_Clear();
    const char* const what = kinds[i].real         ? "a float"
                             : kinds[i].bytes == 8 ? "an int of 64 bits"
                                                   : "an int of 32 bits";
    PyErr_Format(PyExc_TypeError, "%s: expected %s as argument %zd, got %R", name, what, i + 1, args[i]);
    return false;
  }
  return true;
}

// Returns what run(state) does, without Python's lock, as Python's int; C++'s exceptions become Python's.
PyObject* outside_python(bool on_cpu, int (*run)(const void*), const void* state) {
  PyThreadState* const thread = PyEval_SaveThread();
  int code = 0;
  bool memory = false;
  char failed[200] = "";
  try {
    const FloatMode mode;
    if (on_cpu && forked) std::thread([&] { code = run(state); }).join();
    else code = run(state);
  } catch (const std::bad_alloc&) { memory = true; } catch (const std::exception& error) {
    std::strncpy(failed, *error.what() ? error.what() : "an exception", sizeof failed - 1);
  }
  PyEval_RestoreThread(thread);
  if (memory) return PyErr_NoMemory();
  if (*failed) return PyErr_Format(PyExc_RuntimeError, "a compiled kernel failed: %s", failed);
  return PyLong_FromLong(code);
}

template <class... A, std::size_t... I>
int apply(int (*function)(A...), const Value* values, std::index_sequence<I...>) {
  return function(as<A>(values[I])...);
}

// `self` is a capsule of the entry point, by the function's name.
template <bool on_cpu, class... A> PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  static constexpr Kind kinds[] = {kind_of<A>()...};
  struct State {
    int (*function)(A...);
    Value values[sizeof...(A)];
  } state;
  const char* const name = PyCapsule_GetName(self);
  state.function = reinterpret_cast<int (*)(A...)>(PyCapsule_GetPointer(self, name));
  if (!take(name, args, count, kinds, sizeof...(A), state.values)) return nullptr;
  return outside_python(
      on_cpu,
      [](const void* given) {
        const State& s = *static_cast<const State*>(given);
        return apply(s.function, s.values, std::index_sequence_for<A...>());
      },
      &state);
}

// A module that is being made; `good` until something fails, which leaves a Python error.
struct Module {
  PyObject* object;
  bool good;

  void add(const char* name, PyObject* value) {
    if (good) good = value && PyModule_AddObjectRef(object, name, value) == 0;
    Py_XDECREF(value);
  }
  void add_function(const char* name, void* entry, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
    // lives as long as the function: to the end
    auto* const definition = new PyMethodDef{name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL, nullptr};
    PyObject* const capsule = PyCapsule_New(entry, name, nullptr);
    PyObject* const module = good ? PyModule_GetNameObject(object) : nullptr;  // profilers ask a function for it
    add(name, capsule && module ? PyCFunction_NewEx(definition, capsule, module) : nullptr);
    Py_XDECREF(capsule);
    Py_XDECREF(module);
  }
};

template <class... A> void bind(Module& m, const char* name, int (*function)(A...)) {
  m.add_function(name, reinterpret_cast<void*>(function), call<false, A...>);
}
template <class... A>
void bind_cpu(Module& m, const char* name, int (*scalar)(A...), int (*avx2)(A...), int (*avx512)(A...),
              int (*avx512_bf16)(A...)) {
  int (*const by_isa[])(A...) = {scalar, avx2, avx512, avx512_bf16};
  m.add_function(name, reinterpret_cast<void*>(by_isa[isa]), call<true, A...>);
}
template <class... A> void bind_cpu(Module& m, const char* name, int (*function)(A...)) {
  bind_cpu(m, name, function, function, function, function);
}

#if defined(__x86_64__) && !defined(ILLADA_SCALAR_ONLY)
#define BIND_CPU_BY_ISA(name, bf16)                                                                                \
  bind_cpu(m, #name, illada_##name##_scalar, illada_##name##_avx2, illada_##name##_avx512, illada_##name##_##bf16)
#define BIND_CPU(name) BIND_CPU_BY_ISA(name, avx512)
#define BIND_CPU_BF16(name) BIND_CPU_BY_ISA(name, avx512_bf16)
#else
#define BIND_CPU(name) bind_cpu(m, #name, illada_##name##_scalar)
#define BIND_CPU_BF16(name) BIND_CPU(name)
#endif
#define BIND_CUDA(name) bind(m, #name, illada_##name)

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* const module = PyModule_Create(&definition);
  Module m = {module, module != nullptr};
  m.add("cpu_isa", PyUnicode_FromString(kIsaNames[isa]));
  pthread_atfork(nullptr, nullptr, [] { forked = true; });

  // attention
  BIND_CPU_BF16(attention_fwd_cpu);
  BIND_CPU_BF16(attention_bwd_cpu);

  BIND_CPU_BF16(head_cpu);

  // layer
  BIND_CPU(layer_rms_norm_cpu);
  BIND_CPU(layer_rope_cpu);
  BIND_CPU(layer_swiglu_cpu);

  // masked_loss
  BIND_CPU(masked_loss_stats_cpu);
  BIND_CPU(masked_loss_dlogits_cpu);

  // unmask
  m.add("unmask_row_bytes", PyLong_FromLong(ILLADA_UNMASK_ROW_BYTES));
  m.add("unmask_partial_bytes", PyLong_FromLong(ILLADA_UNMASK_PARTIAL_BYTES));
  m.add("unmask_segment", PyLong_FromLong(ILLADA_UNMASK_SEGMENT));
  BIND_CPU(unmask_plan_cpu);
  BIND_CPU(unmask_rows_cpu);
  BIND_CPU(unmask_truncate_cpu);
  BIND_CPU(unmask_select_cpu);
  BIND_CPU(unmask_noise_cpu);

#ifdef ILLADA_WITH_CUDA
  m.add("with_cuda", PyBool_FromLong(1));
  BIND_CUDA(attention_fwd_bf16_sm90a);
  BIND_CUDA(attention_fwd_fp16_sm90a);
  BIND_CUDA(attention_bwd_preprocess_sm90a);
  BIND_CUDA(attention_bwd_keys_sm90a);
  BIND_CUDA(attention_bwd_queries_sm90a);
  BIND_CUDA(attention_bwd_fused_sm90a);
  m.add("unmask_call_bytes", PyLong_FromLong(sizeof(illada_unmask_call)));
  BIND_CUDA(unmask_head_sm90a);
  BIND_CUDA(unmask_draw_sm90a);
  BIND_CUDA(unmask_bounds_cuda);
  BIND_CUDA(unmask_rows_cuda);
  BIND_CUDA(unmask_select_cuda);
  BIND_CUDA(masked_loss_compact_cuda);
  BIND_CUDA(masked_loss_gather_cuda);
  BIND_CUDA(masked_loss_scatter_cuda);
  BIND_CUDA(masked_loss_factors_cuda);
  BIND_CUDA(masked_loss_losses_cuda);
  BIND_CUDA(masked_loss_rows_stats_cuda);
  BIND_CUDA(masked_loss_rows_dlogits_cuda);
  BIND_CUDA(masked_loss_rows_gradients_cuda);
#else
  m.add("with_cuda", PyBool_FromLong(0));
#endif
  if (m.good) return module;
  Py_XDECREF(module);
  return nullptr;
}
