"""Entries that take arguments as cuLaunchKernel does, with their sizes: for the kernels that NVRTC compiles, too."""

from __future__ import annotations

from pathlib import Path

from illada_kernels.ops.masked_loss import nvrtc as masked_loss
from illada_kernels.ops.unmask import nvrtc as unmask

KERNELS: dict[str, list[str]] = {**masked_loss.KERNELS, **unmask.KERNELS}  # by the file's name

RAW = """
#include <type_traits>
#include <utility>
namespace {
template <class... P, size_t... I>
int raw(void (*kernel)(P...), void** values, const int64_t* sizes, int64_t count, dim3 grid, dim3 block, size_t smem,
        std::index_sequence<I...>) {
  if (count != int64_t(sizeof...(P)) || ((sizes[I] != int64_t(sizeof(P))) || ...)) return -1;
  return illada::launch({grid, block, smem, nullptr}, kernel, *static_cast<std::decay_t<P>*>(values[I])...);
}
template <class... P> std::index_sequence_for<P...> indices(void (*)(P...)) { return {}; }
}  // namespace
#define RAW(number, ...)                                                                                        \\
  extern "C" int raw_##number(void** values, const int64_t* sizes, int64_t count, const int64_t* shape) {       \\
    return raw(__VA_ARGS__, values, sizes, count, dim3(shape[0], shape[1], shape[2]), dim3(shape[3]), shape[4], \\
               indices(__VA_ARGS__));                                                                           \\
  }
"""


def with_raw_entries(path: Path) -> str | None:
    """Returns the file's text followed by raw_0, raw_1, ...: an entry for each of its kernels; None if NVRTC does not
    compile it."""
    if path.name not in KERNELS:
        return None
    return path.read_text() + RAW + "\n".join(f"RAW({i}, {name})" for i, name in enumerate(KERNELS[path.name])) + "\n"
