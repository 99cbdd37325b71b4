// Binds each entry point of api.h as a function of integers (pointers as uintptr_t) and floats. No other file of csrc/
// includes Python.
#include <pybind11/pybind11.h>

#include <pthread.h>

#include <cstdlib>
#include <cstring>
#include <thread>

#include "cpu/float_mode.h"
#include "illada/api.h"

namespace py = pybind11;

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

// Converts an argument: pointers come as integers, numbers as they are.
template <class T> struct Arg {
  using type = T;
  static T get(T v) { return v; }
};
template <class T> struct Arg<T*> {
  using type = std::uintptr_t;
  static T* get(std::uintptr_t v) { return reinterpret_cast<T*>(v); }
};

// In a child of fork, OpenMP waits for threads that only the parent has, and a first parallel region would never end (torch's own
// operations hang so). OpenMP keeps them by calling thread, so that there a call runs on a thread of its own, with new ones.
bool forked = false;

template <class Call> int on_cpu(const Call& call) {
  const FloatMode mode;
  if (!forked) return call();
  int code = 0;
  std::thread([&] { code = call(); }).join();
  return code;
}

template <class... A> void bind(py::module_& m, const char* name, int (*function)(A...)) {
  m.def(
      name, [function](typename Arg<A>::type... args) { return function(Arg<A>::get(args)...); },
      py::call_guard<py::gil_scoped_release>());
}
template <class... A>
void bind_cpu(py::module_& m, const char* name, int (*scalar)(A...), int (*avx2)(A...), int (*avx512)(A...),
              int (*avx512_bf16)(A...)) {
  int (*const by_isa[])(A...) = {scalar, avx2, avx512, avx512_bf16};
  int (*const function)(A...) = by_isa[isa];
  m.def(
      name,
      [function](typename Arg<A>::type... args) { return on_cpu([&] { return function(Arg<A>::get(args)...); }); },
      py::call_guard<py::gil_scoped_release>());
}
template <class... A> void bind_cpu(py::module_& m, const char* name, int (*function)(A...)) {
  bind_cpu(m, name, function, function, function, function);
}

}  // namespace

#if defined(__x86_64__) && !defined(ILLADA_SCALAR_ONLY)
#define BIND_CPU(name) \
  bind_cpu(m, #name, illada_##name##_scalar, illada_##name##_avx2, illada_##name##_avx512, illada_##name##_avx512_bf16)
#else
#define BIND_CPU(name) bind_cpu(m, #name, illada_##name##_scalar)
#endif
#define BIND_CUDA(name) bind(m, #name, illada_##name)

PYBIND11_MODULE(_C, m) {
  m.attr("cpu_isa") = kIsaNames[isa];
  pthread_atfork(nullptr, nullptr, [] { forked = true; });

  // attention
  BIND_CPU(attention_fwd_cpu);
  BIND_CPU(attention_bwd_cpu);

  BIND_CPU(head_cpu);

  // layer
  BIND_CPU(layer_rms_norm_cpu);
  BIND_CPU(layer_rope_cpu);
  BIND_CPU(layer_swiglu_cpu);

  // masked_loss
  BIND_CPU(masked_loss_stats_cpu);
  BIND_CPU(masked_loss_dlogits_cpu);

  // unmask
  m.attr("unmask_row_bytes") = ILLADA_UNMASK_ROW_BYTES;
  m.attr("unmask_partial_bytes") = ILLADA_UNMASK_PARTIAL_BYTES;
  m.attr("unmask_segment") = ILLADA_UNMASK_SEGMENT;
  BIND_CPU(unmask_plan_cpu);
  BIND_CPU(unmask_rows_cpu);
  BIND_CPU(unmask_truncate_cpu);
  BIND_CPU(unmask_select_cpu);
  BIND_CPU(unmask_noise_cpu);

#ifdef ILLADA_WITH_CUDA
  m.attr("with_cuda") = true;
  BIND_CUDA(attention_fwd_bf16_sm90a);
  BIND_CUDA(attention_fwd_fp16_sm90a);
  BIND_CUDA(attention_bwd_preprocess_sm90a);
  BIND_CUDA(attention_bwd_keys_sm90a);
  BIND_CUDA(attention_bwd_queries_sm90a);
  BIND_CUDA(attention_bwd_fused_sm90a);
  m.attr("unmask_call_bytes") = sizeof(illada_unmask_call);
  BIND_CUDA(unmask_head_sm90a);
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
  m.attr("with_cuda") = false;
#endif
}
