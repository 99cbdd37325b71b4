// Fibers and their scheduler; faults and deadlocks.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "emulator.h"

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

// Saves the running stack's registers and pointer, continues on another stack.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(.text
.globl emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
)");

namespace emulator {

__thread Cluster* cluster;
__thread Fiber* self;
thread_local Issuer carried_out;
static __thread void* scheduler_stack;  // null while it is the one in use
thread_local Body running_body;
thread_local void* running_arguments;

// ---- faults ----------------------------------------------------------------------------------------------------
static std::mutex fault_lock;
std::string fault_text;
std::atomic<bool> failed{false};
struct ClusterStopped {};

std::string place(const void* pc) {
  Dl_info in;
  if (!dladdr(pc, &in)) return "{unknown}";
  char text[600];
  snprintf(text, sizeof text, "{pc %s %zx}", in.dli_fname,
           size_t(static_cast<const char*>(pc) - static_cast<const char*>(in.dli_fbase)));
  return text;
}

void fault(const char* format, ...) {
  char text[2048];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  const Issuer who = self ? Issuer{self, self->pc} : carried_out;
  std::string report = text;
  if (who.fiber) {
    const uint3 b = who.fiber->block->index, t = who.fiber->index;
    char head[120];
    snprintf(head, sizeof head, "block (%u, %u, %u) thread (%u, %u, %u): ", b.x, b.y, b.z, t.x, t.y, t.z);
    report = head + report + "\n  at " + place(who.pc);
  }
  {
    std::lock_guard<std::mutex> lock(fault_lock);
    if (fault_text.empty()) fault_text = report;
  }
  failed = true;
  if (!scheduler_stack) throw ClusterStopped{};
  void* dropped;
  for (;;) emulator_switch(&dropped, scheduler_stack);  // the scheduler sees `failed` and drops the cluster
}

// ---- fibers ----------------------------------------------------------------------------------------------------
void sleep_on(Waits what, uint64_t key, int detail) {
  self->waits = what;
  self->key = key;
  self->detail = detail;
  yield();
}

void wake(Waits what, uint64_t key, size_t first, size_t count) {
  cluster->idle_polls = 0;
  const size_t end = first + std::min(count, cluster->fibers.size() - first);
  for (size_t i = first; i < end; ++i) {
    Fiber& f = cluster->fibers[i];
    if (f.waits != what || f.key != key) continue;
    f.waits = Waits::nothing;
    cluster->ready.push_back(&f);
  }
}

void no_end() { fault("no end after %llu steps: an endless loop?", (unsigned long long)cluster->steps); }

static void thread_exits() {
  self->waits = Waits::exited;
  --self->block->alive;
  --cluster->alive;
  for (int i = 0; i < 64; ++i)
    if (self->stack[i]) fault("local variables need more than the %zu bytes that a thread has here", kStack);
  recheck_barriers_after_exit(*self->block);
  if (self->block->alive) return;
  check_copies_done(*self->block);
  check_products_done(*self->block);
  check_barriers_empty(*self->block);
}

static void fiber_main() {
  running_body(running_arguments);
  thread_exits();
  yield();
  abort();  // an exited fiber is never run again
}

void prepare(Fiber& f) {
  memset(f.stack, 0, 64);  // the lowest bytes must still be zero at the end: see thread_exits
  // Stacks lie a power of two apart. Without these steps the tops of all would compete for one set of the caches.
  const size_t step = size_t(f.thread) % 64 * 576;
  void** top = reinterpret_cast<void**>(f.stack + kStack - 64 - step);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  f.stack_pointer = top;
}

// ---- what happens when ---------------------------------------------------------------------------------------
Issuer issuer_here() {
  // Addresses change from run to run, their low bits do not.
  Random of_place{uint64_t(self->pc) % 4096 + cluster->lazy_places};
  const bool lazy = cluster->random.chance(cluster->chance_lazy) || (cluster->lazy_places && of_place.next() % 2);
  return {self, self->pc, lazy};
}

// ---- one cluster -----------------------------------------------------------------------------------------------
static bool carry_out_one(bool lazy) {
  Cluster& c = *cluster;
  size_t groups = 0;
  for (Block& b : c.blocks) groups += b.warpgroups.size();
  const size_t all = c.loads.size() + c.stores.size() + groups;
  if (!all) return false;
  const size_t start = c.random.next() % all;
  for (size_t step = 0; step < all; ++step) {
    size_t i = (start + step) % all;
    if (i < c.loads.size()) {
      if (c.loads[i].issuer.lazy != lazy) continue;
      return finish_load(i), true;
    }
    i -= c.loads.size();
    if (i < c.stores.size()) {
      if (c.stores[i]->issuer.lazy != lazy) continue;
      return advance_store(i), true;
    }
    i -= c.stores.size();
    for (Block& b : c.blocks) {
      if (i < b.warpgroups.size()) {
        if (carry_out_product(b, int(i), lazy)) return true;
        break;
      }
      i -= b.warpgroups.size();
    }
  }
  return false;
}

bool carry_out_one() { return carry_out_one(false) || carry_out_one(true); }

static std::string deadlock() {
  std::map<std::string, std::vector<const Fiber*>> waiting;
  for (const Fiber& f : cluster->fibers)
    if (f.waits != Waits::exited) waiting[describe_barrier(f) + ", at " + place(f.pc)].push_back(&f);
  std::string text = "deadlock:";
  for (auto& [what, fibers] : waiting) {
    const Block& b = *fibers[0]->block;
    char head[160];
    snprintf(head, sizeof head, "\n  block (%u, %u, %u): %zu threads (%d to %d) wait on ", b.index.x, b.index.y,
             b.index.z, fibers.size(), fibers.front()->thread, fibers.back()->thread);
    text += head + what;
  }
  return text;
}

static size_t pick_fiber() {
  Cluster& c = *cluster;
  size_t pick = c.random.next() % c.ready.size();
  // Some tries for one that is not slow; then it is a slow one's turn, so that a thread which spins cannot starve it.
  for (int tries = 0; tries < 16 && c.ready[pick]->slow; ++tries) pick = c.random.next() % c.ready.size();
  return pick;
}

// Makes a fiber that is ready the running one, after what is carried out before. Returns its stack; the scheduler's if
// all have exited or one has failed.
static void* next_stack() {
  Cluster& c = *cluster;
  self = nullptr;
  for (;;) {
    if (!c.alive || failed) return scheduler_stack;
    if (c.chance_async && c.random.chance(c.chance_async)) carry_out_one(false);
    if (!c.ready.empty()) break;
    if (carry_out_one()) continue;
    carried_out = {};
    fault("%s", deadlock().c_str());
  }
  const size_t pick = pick_fiber();
  self = c.ready[pick];
  c.ready[pick] = c.ready.back();
  c.ready.pop_back();
  threadIdx = self->index;
  blockIdx = self->block->index;
  return self->stack_pointer;
}

// From fiber to fiber at one place, so that the processor predicts where it returns to.
__attribute__((noinline)) void yield() {
  Fiber& me = *self;
  void* next = next_stack();
  if (self != &me) emulator_switch(&me.stack_pointer, next);
}

void run_fibers() {
  try {
    if (void* first = next_stack()) emulator_switch(&scheduler_stack, first);
    scheduler_stack = nullptr;
    self = nullptr;
    while (!failed && !cluster->stores.empty()) advance_store(0);
  } catch (ClusterStopped) {}
}

}  // namespace emulator
