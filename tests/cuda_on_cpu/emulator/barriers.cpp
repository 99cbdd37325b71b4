// Where threads meet: mbarriers, named barriers, the cluster's barrier, collectives of a warp.
#include "emulator.h"

namespace emulator {

// ---- mbarriers -------------------------------------------------------------------------------------------------
static Mbarrier& find(Block& b, uint32_t bar) {
  auto found = b.mbarriers.find(bar);
  if (found == b.mbarriers.end())
    fault("the mbarrier at shared memory +%d is not initialised", int(bar - kSharedStart));
  return found->second;
}

static void end_phase_if_complete(Block& b, uint32_t bar, Mbarrier& m) {
  if (m.pending || m.bytes) return;
  ++m.phase;
  m.pending = m.arrivals;
  wake(Waits::mbarrier, key_of(b, bar));
}

void mbarrier_init(uint32_t bar, uint32_t arrivals) {
  CALLED_FROM_KERNEL;
  Block& b = *self->block;
  if (bar % 8) fault("an mbarrier at shared memory +%u, which is not 8-byte aligned", bar - kSharedStart);
  if (!arrivals || arrivals >= 1u << 20) fault("an mbarrier with %u arrivals; 1 to 2^20 - 1 are possible", arrivals);
  if (b.mbarriers.count(bar)) fault("the mbarrier at shared memory +%u is initialised twice", bar - kSharedStart);
  Mbarrier m{};
  m.arrivals = m.pending = arrivals;
  b.mbarriers[bar] = m;
  mark(b, bar, 8, mbarrier);
  self->unfenced_barriers.push_back(bar);
  maybe_yield(cluster->chance_yield);
}

void fence_barriers() {
  for (uint32_t bar : self->unfenced_barriers) self->block->mbarriers[bar].fenced = true;
  self->unfenced_barriers.clear();
}
void mbarrier_init_fence() { fence_barriers(); }

static Block& block_of_cluster(uint32_t rank, const char* what) {
  if (rank >= cluster->blocks.size())
    fault("%s names block %u of a cluster of %zu", what, rank, cluster->blocks.size());
  Block& b = cluster->blocks[rank];
  if (!b.alive) fault("%s reaches block %u of the cluster, which has exited", what, rank);
  return b;
}

void mbarrier_arrive(uint32_t bar, uint32_t rank) {
  CALLED_FROM_KERNEL;
  Block& b = block_of_cluster(rank, "mbar_arrive");
  Mbarrier& m = find(b, bar);
  if (!m.pending) fault("more than %u arrivals at the mbarrier at shared memory +%u", m.arrivals, bar - kSharedStart);
  --m.pending;
  end_phase_if_complete(b, bar, m);
  maybe_yield(cluster->chance_yield);
}

void mbarrier_expect(uint32_t bar, uint32_t bytes) {
  CALLED_FROM_KERNEL;
  Mbarrier& m = find(*self->block, bar);
  m.bytes += bytes;
  if (m.bytes >= 1 << 20) fault("an mbarrier counts at most 2^20 - 1 bytes, not %lld", (long long)m.bytes);
}

void bytes_arrived(Block& b, uint32_t bar, uint32_t bytes) {
  Mbarrier& m = find(b, bar);
  if (!m.fenced)
    fault("a bulk copy reports to the mbarrier at shared memory +%u, initialised without mbar_init_fence",
          bar - kSharedStart);
  m.bytes -= bytes;
  end_phase_if_complete(b, bar, m);
}

bool mbarrier_test(uint32_t bar, uint32_t parity) {
  CALLED_FROM_KERNEL;
  maybe_yield(cluster->chance_yield | 0x40000000);  // who polls lets others run
  const bool ended = (find(*self->block, bar).phase & 1) != parity;
  if (!ended && ++cluster->idle_polls > 256) carry_out_one();  // all may be polling: what is under way must get on
  return ended;
}

void mbarrier_wait(uint32_t bar, uint32_t parity) {
  CALLED_FROM_KERNEL;
  if (parity > 1) fault("mbar_wait for parity %u; 0 and 1 are possible", parity);
  Block& b = *self->block;
  wait_until(Waits::mbarrier, key_of(b, bar), int(parity), [&] { return (find(b, bar).phase & 1) != parity; });
}

// ---- barriers of a block ---------------------------------------------------------------------------------------
static void end_barrier(Block& b, int id) {
  Barrier& barrier = b.barriers[id];
  barrier.arrived = barrier.threads = 0;
  ++barrier.phase;
  barrier.votes[barrier.phase & 1] = 0;
  wake(Waits::barrier, key_of(b, id));
}

static void end_cluster_barrier() {
  cluster->barrier.arrived = 0;
  ++cluster->barrier.phase;
  wake(Waits::cluster_barrier, 0);
}

// Barrier 0 is that of all threads which have not exited.
static void end_barrier_of_all(Block& b) {
  b.barriers[0].met = b.alive;
  end_barrier(b, 0);
}

Votes barrier_all(bool vote) {
  CALLED_FROM_KERNEL;
  maybe_yield(cluster->chance_yield);
  Block& b = *self->block;
  Barrier& barrier = b.barriers[0];
  const uint32_t phase = barrier.phase;
  barrier.votes[phase & 1] += vote;
  if (++barrier.arrived == b.alive) end_barrier_of_all(b);
  while (barrier.phase == phase) sleep_on(Waits::barrier, key_of(b, 0), 0);
  return {barrier.votes[phase & 1], barrier.met};  // the next phase cannot end before this thread arrives again
}

void recheck_barriers_after_exit(Block& b) {
  if (b.alive && b.barriers[0].arrived == b.alive) end_barrier_of_all(b);
  if (cluster->alive && cluster->barrier.arrived >= cluster->alive) end_cluster_barrier();
}

void barrier_named(int id, int threads, bool wait) {
  CALLED_FROM_KERNEL;
  meet(wait ? "bar_sync" : "bar_arrive", warp_lanes(), id);
  Block& b = *self->block;
  const int of_block = int(blockDim.x * blockDim.y * blockDim.z);
  if (id < 1 || id > 15) fault("named barrier %d; 1 to 15 are possible (0 is __syncthreads)", id);
  if (threads < 32 || threads % 32 || threads > of_block)
    fault("barrier %d for %d threads: not whole warps of a block of %d", id, threads, of_block);
  Barrier& barrier = b.barriers[id];
  if (!barrier.arrived) barrier.threads = threads;
  if (barrier.threads != threads) fault("barrier %d for %d threads and for %d", id, barrier.threads, threads);
  const uint32_t phase = barrier.phase;
  if (++barrier.arrived == threads) return end_barrier(b, id);
  while (wait && barrier.phase == phase) sleep_on(Waits::barrier, key_of(b, id), threads);
}

// ---- the cluster's barrier -------------------------------------------------------------------------------------
uint32_t cluster_rank() { return self->block->rank; }

void cluster_barrier_arrive() {
  CALLED_FROM_KERNEL;
  maybe_yield(cluster->chance_yield);
  if (self->cluster_phase > cluster->barrier.phase) fault("cluster_arrive twice without cluster_wait");
  self->cluster_phase = cluster->barrier.phase + 1;
  if (++cluster->barrier.arrived >= cluster->alive) end_cluster_barrier();
}

void cluster_barrier_wait() {
  CALLED_FROM_KERNEL;
  wait_until(Waits::cluster_barrier, 0, 0, [] { return cluster->barrier.phase >= self->cluster_phase; });
}

// ---- collectives of a warp -------------------------------------------------------------------------------------
uint32_t warp_lanes() {
  const int threads = int(blockDim.x * blockDim.y * blockDim.z), left = threads - self->thread / 32 * 32;
  return left >= 32 ? ~0u : (1u << left) - 1;
}

Lanes& meet(const char* name, uint32_t mask, uint64_t value) {
  maybe_yield(cluster->chance_yield);
  Block& b = *self->block;
  const int warp = self->thread / 32, lane = self->thread % 32;
  if (!(mask >> lane & 1)) fault("%s: lane %d is not in its own mask %08x", name, lane, mask);
  if (!self->meeting || self->meeting_mask != mask) {
    self->meeting = &b.warps[warp][mask];
    self->meeting_mask = mask;
  }
  WarpMeeting& m = *self->meeting;
  const uint32_t phase = m.phase;
  if (!m.arrived) m.name = name;
  if (m.name != name && strcmp(m.name, name))
    fault("lanes of one warp are in different collectives: %s and %s", m.name, name);
  m.arrived |= 1u << lane;
  m.values[phase & 1].at[lane] = value;
  const uint64_t key = uint64_t(b.rank) << 48 | uint64_t(warp) << 32 | mask;
  if (m.arrived == mask) {
    m.arrived = 0;
    m.values[phase & 1].reduced = false;
    ++m.phase;
    wake(Waits::warp, key, size_t(self - cluster->fibers.data()) - lane, 32);  // no other warp's lanes wait for it
  }
  while (m.phase == phase) sleep_on(Waits::warp, key, lane);
  return m.values[phase & 1];
}

void warp_meet(const char* name, uint32_t mask) {
  CALLED_FROM_KERNEL;
  meet(name, mask, 0);
}

// Within this lane's group of `width` lanes; from itself where the source lies outside of it.
uint64_t warp_shuffle(const char* name, uint32_t mask, uint64_t value, Shuffle how, int by, int width) {
  CALLED_FROM_KERNEL;
  const int lane = self->thread % 32, first = lane / width * width;
  int source = how == Shuffle::from           ? first + by % width
               : how == Shuffle::exclusive_or ? lane ^ by
               : how == Shuffle::up           ? lane - by
                                              : lane + by;
  if (source < first || source >= first + width) source = lane;
  if (!(mask >> source & 1)) fault("shuffle from lane %d, which is not in the mask %08x", source, mask);
  return meet(name, mask, value).at[source];
}

uint32_t warp_lanes_with(const char* name, uint32_t mask, uint64_t value, uint64_t wanted) {
  CALLED_FROM_KERNEL;
  const Lanes& all = meet(name, mask, value);
  uint32_t same = 0;
  for (int i = 0; i < 32; ++i) same |= uint32_t(all.at[i] == wanted) << i;
  return same & mask;
}

uint32_t warp_reduce(const char* name, uint32_t mask, uint32_t value, Atomic op, AtomicType type) {
  CALLED_FROM_KERNEL;
  Lanes& all = meet(name, mask, value);
  if (!all.reduced) {
    int i = __builtin_ctz(mask);
    all.total = uint32_t(all.at[i]);
    while (++i < 32)
      if (mask >> i & 1) all.total = combine(op, type, all.total, uint32_t(all.at[i]));
    all.reduced = true;
  }
  return all.total;
}

// Any lane may be elected; it stays the same in one run, as kernels rely on.
bool elect_one() {
  CALLED_FROM_KERNEL;
  const uint32_t lanes = warp_lanes();
  meet("elect_one", lanes, 0);
  Random of_warp{cluster->elections + uint64_t(self->thread / 32)};
  return self->thread % 32 == int(of_warp.next() % uint64_t(__builtin_popcount(lanes)));
}

void set_registers(int count, bool increase) {
  CALLED_FROM_KERNEL;
  if (count < 24 || count > 256 || count % 8) fault("setmaxnreg %d: a multiple of 8 from 24 to 256 is possible", count);
  if (self->registers && (increase ? count < self->registers : count > self->registers))
    fault("setmaxnreg from %d to %d in the wrong direction", self->registers, count);
  const int sum = self->block->registers += count - self->registers;  // of the threads that have called it
  self->registers = count;
  const int threads = int(blockDim.x * blockDim.y * blockDim.z);
  const int pool = 65536 / threads / 8 * 8 * threads;  // what a launch gives at most: alike, in steps of 8
  if (sum > pool) fault("setmaxnreg: %d registers for the block; %d threads start with at most %d", sum, threads, pool);
}

void check_barriers_empty(const Block& b) {
  for (int id = 1; id < 16; ++id)
    if (b.barriers[id].arrived)
      fault("the block ended with %d of %d threads at named barrier %d", b.barriers[id].arrived, b.barriers[id].threads,
            id);
}

// ---- reports ---------------------------------------------------------------------------------------------------
std::string describe_barrier(const Fiber& f) {
  char text[200] = "nothing";
  const uint32_t low = uint32_t(f.key);
  if (f.waits == Waits::mbarrier) {
    const Mbarrier& m = f.block->mbarriers[low];
    snprintf(
        text, sizeof text,
        "the mbarrier at shared memory +%u for the end of phase parity %d (in phase %u; %u of %u arrivals and %lld "
        "bytes are missing)",
        low - kSharedStart, f.detail, m.phase, m.pending, m.arrivals, (long long)m.bytes);
  } else if (f.waits == Waits::barrier) {
    const Barrier& b = f.block->barriers[low];
    snprintf(text, sizeof text, "%s %u (%d of %d threads are there)", low ? "named barrier" : "__syncthreads, barrier",
             low, b.arrived, low ? b.threads : f.block->alive);
  } else if (f.waits == Waits::cluster_barrier) {
    snprintf(text, sizeof text, "the cluster's barrier (%d of %d threads are there)", cluster->barrier.arrived,
             cluster->alive);
  } else if (f.waits == Waits::warp) {
    const WarpMeeting& m = f.block->warps[f.thread / 32].at(low);
    snprintf(text, sizeof text, "%s of warp %d (of the lanes %08x only %08x are there)", m.name, f.thread / 32, low,
             m.arrived);
  } else if (f.waits == Waits::wgmma) {
    snprintf(text, sizeof text, "wgmma_wait (a warp of the warpgroup did not issue the same products)");
  } else if (f.waits == Waits::bulk) {
    snprintf(text, sizeof text, "bulk_wait");
  }
  return text;
}

}  // namespace emulator
