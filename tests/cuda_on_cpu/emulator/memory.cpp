// Who may touch which byte. Kernel files are compiled with -fsanitize=thread, which calls a hook before every load and
// store; the hooks below take the place of libtsan, which is not linked. -fsanitize=alignment,bounds,... calls the
// handlers at the end, in place of libubsan's.
#include <algorithm>
#include <cmath>

#include "emulator.h"

namespace emulator {

// ---- global memory ---------------------------------------------------------------------------------------------
struct Range {
  uint64_t start, end;
  std::string name;
};
static std::vector<Range> ranges;
static bool check_globals = false;

static const Range* find_range(uint64_t at, uint64_t bytes) {
  static thread_local size_t last = 0;  // most accesses hit the range of the one before
  if (last < ranges.size() && at >= ranges[last].start && at + bytes <= ranges[last].end) return &ranges[last];
  for (size_t i = 0; i < ranges.size(); ++i)
    if (at >= ranges[i].start && at + bytes <= ranges[i].end) return last = i, &ranges[i];
  return nullptr;
}

static std::string nearest_range(uint64_t at) {
  const Range* best = nullptr;
  int64_t best_distance = 0;
  for (const Range& r : ranges) {
    const int64_t distance = at < r.start ? int64_t(at - r.start) : at >= r.end ? int64_t(at - r.end) : 0;
    if (!best || std::llabs(distance) < std::llabs(best_distance)) best = &r, best_distance = distance;
  }
  if (!best) return "";
  char text[200];
  snprintf(text, sizeof text, "; nearest: %s, %llu bytes, %lld bytes %s it", best->name.c_str(),
           (unsigned long long)(best->end - best->start), (long long)std::llabs(best_distance),
           at < best->start  ? "before"
           : at >= best->end ? "past the end of"
                             : "inside, running out of");
  return text;
}

void check_global(const void* p, size_t bytes, const char* what) {
  const uint64_t at = uint64_t(p);
  if (!check_globals || find_range(at, bytes)) return;
  fault("%s of %zu bytes at %p, outside every allocation%s", what, bytes, p, nearest_range(at).c_str());
}

control::ScopedRange::ScopedRange(const void* p, size_t bytes, const char* name) {
  ranges.push_back({uint64_t(p), uint64_t(p) + bytes, name});
}
control::ScopedRange::~ScopedRange() { ranges.pop_back(); }

std::mutex& add_lock() {
  static std::mutex lock;
  return lock;
}

// ---- shared memory ---------------------------------------------------------------------------------------------
uint8_t* shared_base() { return self->block->shared + kSharedStart; }

uint32_t shared_address(const void* p) {
  CALLED_FROM_KERNEL;
  const int64_t at = static_cast<const uint8_t*>(p) - self->block->shared;
  if (at < kSharedStart || at >= self->block->shared_end) fault("%p is not in this block's shared memory", p);
  return uint32_t(at);
}

void check_shared_range(const Block& block, uint32_t at, uint32_t bytes, const char* what) {
  if (at < kSharedStart || at + bytes > block.shared_end)
    fault("%s touches shared memory +%d to +%d; the block has %u bytes", what, int(at - kSharedStart),
          int(at + bytes - kSharedStart), block.shared_end - kSharedStart);
}

void mark(Block& block, uint32_t at, uint32_t bytes, Byte state) { memset(&block.bytes[at], state, bytes); }

static const char* name_of(uint8_t state) {
  switch (state) {
    case unwritten: return "never written";
    case in_flight: return "still being written by a bulk copy";
    case unfenced: return "written by an ordinary store without fence_proxy_async";
    case mbarrier: return "part of an mbarrier";
    default: return "valid";
  }
}

void check_async_read(const Block& block, uint32_t at, uint32_t bytes, const char* what) {
  check_shared_range(block, at, bytes, what);
  if (all_bytes(block, at, bytes, ~uint64_t(0), valid * kEach)) return;
  for (uint32_t i = at; i < at + bytes; ++i)
    if (block.bytes[i] != valid)
      fault("%s reads shared memory +%u, which is %s", what, i - kSharedStart, name_of(block.bytes[i]));
}

void fence_proxy_async() {
  CALLED_FROM_KERNEL;
  Block& b = *self->block;
  for (auto [at, bytes] : self->unfenced_bytes)
    for (uint32_t i = at; i < at + bytes; ++i) b.bytes[i] = b.bytes[i] == unfenced ? valid : b.bytes[i];
  self->unfenced_bytes.clear();
  fence_barriers();
}

static void remember_unfenced(uint32_t at, uint32_t bytes) {
  auto& list = self->unfenced_bytes;
  // A kernel that never fences writes the same places over and over: drop repetitions before the list would grow.
  if (list.size() >= 4096 && list.size() == list.capacity()) {
    std::sort(list.begin(), list.end());
    list.erase(std::unique(list.begin(), list.end()), list.end());
  }
  list.emplace_back(at, bytes);
}

static void check_state(const Block& b, uint32_t at, int bytes, bool write) {
  check_shared_range(b, at, bytes, write ? "a write" : "a read");
  for (uint32_t i = at; i < at + bytes; ++i)
    if (b.bytes[i] & in_flight || (b.bytes[i] == unwritten && !write))
      fault("%d-byte %s of shared memory +%u, which is %s", bytes, write ? "write" : "read", i - kSharedStart,
            name_of(b.bytes[i]));
}

#define INLINE inline __attribute__((always_inline))  // where `bytes` and `write` are constants

static INLINE void touch_shared(Block& b, uint32_t at, int bytes, bool write) {
  const uint64_t mask = write ? kHeld : kReadable, wanted = write ? 0 : kReadable;
  if (at < kSharedStart || at + bytes > b.shared_end || !all_bytes(b, at, bytes, mask, wanted))
    check_state(b, at, bytes, write);
  if (write) {
    mark(b, at, bytes, unfenced);
    remember_unfenced(at, bytes);
  }
  maybe_yield(cluster->chance_yield / 16);
}

static void touch_global(uint64_t at, int bytes, bool write) {
  maybe_yield(0);
  check_global(reinterpret_cast<const void*>(at), bytes, write ? "a write" : "a read");
}

static INLINE void touch(uint64_t at, int bytes, bool write, const void* pc) {
  Fiber* const fiber = self;
  if (!fiber) return;  // host code of the same file
  fiber->pc = pc;
  if (at - uint64_t(fiber->stack) < kStack) return;
  Block& b = *fiber->block;
  const uint64_t shared = at - uint64_t(b.shared);
  if (shared < kSharedSpan) return touch_shared(b, uint32_t(shared), bytes, write);
  touch_global(at, bytes, write);
}

void check_access(const void* p, int bytes, int alignment, bool write) {
  CALLED_FROM_KERNEL;
  if (uint64_t(p) % alignment) fault("%d-byte access at %p, which is not aligned", bytes, p);
  touch(uint64_t(p), bytes, write, self->pc);
}

void memory_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- atomics ---------------------------------------------------------------------------------------------------
template <class T> static uint64_t apply(Atomic op, void* p, uint64_t operand, uint64_t compare) {
  T old, value, expected, next;
  memcpy(&old, p, sizeof old);
  memcpy(&value, &operand, sizeof value);
  memcpy(&expected, &compare, sizeof expected);
  next = old;
  if (op == Atomic::add) next = old + value;
  if (op == Atomic::min) next = std::min(old, value);
  if (op == Atomic::max) next = std::max(old, value);
  if (op == Atomic::exchange || (op == Atomic::compare_and_swap && old == expected)) next = value;
  if constexpr (std::is_integral_v<T>) {
    if (op == Atomic::bit_and) next = old & value;
    if (op == Atomic::bit_or) next = old | value;
    if (op == Atomic::bit_xor) next = old ^ value;
  }
  memcpy(p, &next, sizeof next);
  uint64_t result = 0;
  memcpy(&result, &old, sizeof old);
  return result;
}

uint32_t combine(Atomic op, AtomicType type, uint32_t a, uint32_t b) {
  int sum;
  const bool is_signed = type == AtomicType::i32;
  if (is_signed && op == Atomic::add && __builtin_add_overflow(int(a), int(b), &sum))
    fault("signed integer overflow in an addition");
  is_signed ? apply<int32_t>(op, &a, b, 0) : apply<uint32_t>(op, &a, b, 0);
  return a;
}

uint64_t atomic(Atomic op, AtomicType type, void* p, uint64_t value, uint64_t compare) {
  CALLED_FROM_KERNEL;
  const int bytes = type == AtomicType::u64 || type == AtomicType::f64 ? 8 : 4;
  if (uint64_t(p) % bytes) fault("atomic at %p, which is not aligned", p);
  touch(uint64_t(p), bytes, false, self->pc);
  touch(uint64_t(p), bytes, true, self->pc);
  std::lock_guard<std::mutex> lock(add_lock());
  switch (type) {
    case AtomicType::i32: return apply<int32_t>(op, p, value, compare);
    case AtomicType::u32: return apply<uint32_t>(op, p, value, compare);
    case AtomicType::u64: return apply<uint64_t>(op, p, value, compare);
    case AtomicType::f32: return apply<float>(op, p, value, compare);
    default: return apply<double>(op, p, value, compare);
  }
}

}  // namespace emulator

// ---- what the Python side calls --------------------------------------------------------------------------------
extern "C" void cuda_on_cpu_allow(const void* p, size_t bytes, const char* name) {
  emulator::ranges.push_back({uint64_t(p), uint64_t(p) + bytes, name});
  emulator::check_globals = true;
}
extern "C" void cuda_on_cpu_forbid(const void* p) {
  auto& r = emulator::ranges;
  r.erase(std::remove_if(r.begin(), r.end(), [&](auto& x) { return x.start == uint64_t(p); }), r.end());
}

// ---- the compiler's hooks --------------------------------------------------------------------------------------
#define HOOKS(bytes)                                                         \
  extern "C" void __tsan_read##bytes(void* p) {                              \
    emulator::touch(uint64_t(p), bytes, false, __builtin_return_address(0)); \
  }                                                                          \
  extern "C" void __tsan_write##bytes(void* p) {                             \
    emulator::touch(uint64_t(p), bytes, true, __builtin_return_address(0));  \
  }                                                                          \
  extern "C" void __tsan_unaligned_read##bytes(void* p) {                    \
    emulator::touch(uint64_t(p), bytes, false, __builtin_return_address(0)); \
  }                                                                          \
  extern "C" void __tsan_unaligned_write##bytes(void* p) {                   \
    emulator::touch(uint64_t(p), bytes, true, __builtin_return_address(0));  \
  }
HOOKS(1)
HOOKS(2)
HOOKS(4)
HOOKS(8)
HOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t n) {
  emulator::touch(uint64_t(p), int(n), false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t n) {
  emulator::touch(uint64_t(p), int(n), true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void*, void*) {}
extern "C" uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return *p; }  // guards of static variables

// The handlers' first argument begins with the place in the source; ours comes from the return address instead.
static void undefined(const char* what, const void* pc) {
  if (!emulator::self) return;
  emulator::self->pc = pc;
  emulator::fault("%s", what);
}
extern "C" void __ubsan_handle_type_mismatch_v1(const void*, uint64_t at) {
  char text[80];
  snprintf(text, sizeof text, "access to %p, which is not aligned for its type", reinterpret_cast<void*>(at));
  undefined(text, __builtin_return_address(0));
}
#define UNDEFINED(handler, what)                                              \
  extern "C" void __ubsan_handle_##handler(const void*, uint64_t, uint64_t) { \
    undefined(what, __builtin_return_address(0));                             \
  }
UNDEFINED(out_of_bounds, "index outside an array of registers or of a struct")
UNDEFINED(shift_out_of_bounds, "shift by a negative or too large count")
UNDEFINED(add_overflow, "signed integer overflow in an addition")
UNDEFINED(sub_overflow, "signed integer overflow in a subtraction")
UNDEFINED(mul_overflow, "signed integer overflow in a multiplication")
UNDEFINED(negate_overflow, "signed integer overflow in a negation")
UNDEFINED(divrem_overflow, "division by zero, or its overflow")
