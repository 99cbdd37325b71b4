// Bulk copies: tensor maps, loads, stores, reduce-adds, the groups of stores.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "emulator.h"

namespace emulator {

// ---- tensor maps -----------------------------------------------------------------------------------------------
// What encode_tensor_map puts into the 128 opaque bytes.
struct TensorMap {
  uint64_t magic, base, size[5], stride[5];
  uint16_t box[5];
  uint8_t rank, element, type, swizzled;
};
static_assert(sizeof(TensorMap) <= 128, "it has to fit CUtensorMap");
constexpr uint64_t kMagic = 0x70616d20726f736e;
enum Type { f16 = 6, f32 = 7, bf16 = 9 };  // of CUtensorMapDataType

// The checks are those that the driver documents for cuTensorMapEncodeTiled.
int encode_tensor_map(void* map, int type, uint32_t rank, void* base, const uint64_t* size,
                      const uint64_t* stride_bytes, const uint32_t* box, const uint32_t* element_strides,
                      int interleave, int swizzle, int fill) {
  constexpr int invalid = 1, no_swizzle = 0, swizzle_128 = 3;
  if (rank < 1 || rank > 5 || uint64_t(base) % 16 || uint64_t(map) % 64 || interleave || fill) return invalid;
  if (type != f16 && type != f32 && type != bf16) return invalid;
  if (swizzle != no_swizzle && swizzle != swizzle_128) return invalid;
  TensorMap m{};
  m.magic = kMagic;
  m.base = uint64_t(base);
  m.rank = uint8_t(rank);
  m.type = uint8_t(type);
  m.element = type == f32 ? 4 : 2;
  m.swizzled = swizzle == swizzle_128;
  for (uint32_t i = 0; i < 5; ++i) {
    m.size[i] = i < rank ? size[i] : 1;
    m.box[i] = i < rank ? uint16_t(box[i]) : 1;
    m.stride[i] = i == 0 ? m.element : i < rank ? stride_bytes[i - 1] : 0;
    if (i < rank && (box[i] < 1 || box[i] > 256 || element_strides[i] != 1)) return invalid;
    if (m.size[i] < 1 || m.size[i] > uint64_t(1) << 32) return invalid;
    if (i > 0 && i < rank && (m.stride[i] % 16 || m.stride[i] >= uint64_t(1) << 40)) return invalid;
  }
  const uint32_t inner = m.box[0] * m.element;
  if (inner % 16 || (m.swizzled && inner > 128)) return invalid;
  memset(map, 0, 128);
  memcpy(map, &m, sizeof m);
  return 0;
}

static TensorMap read_map(const void* p, int rank) {
  TensorMap m;
  memcpy(&m, p, sizeof m);
  if (m.magic != kMagic) fault("not a tensor map (it must be a __grid_constant__ parameter, or in global memory)");
  if (m.rank != rank) fault("a tensor map of rank %d with %d coordinates", m.rank, rank);
  return m;
}
static uint32_t bytes_of(const TensorMap& m) {
  uint32_t n = m.element;
  for (uint16_t b : m.box) n *= b;
  return n;
}
static void check_tile(const TensorMap& m, uint32_t at, const char* what) {
  const uint32_t alignment = m.swizzled ? 1024 : 128;
  if (at % alignment)
    fault("%s at shared memory +%u, which is not %u-byte aligned", what, at - kSharedStart, alignment);
  check_shared_range(*self->block, at, bytes_of(m), what);
}

// The 128-byte swizzle: address bits 4-6, which 16-byte piece of a 128-byte row, change by bits 7-9, which row of
// eight.
uint32_t swizzle128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

struct Coordinates {
  int at[5];
};
static Coordinates coordinates(int rank, const int* at) {
  Coordinates c{};
  for (int i = 0; i < rank; ++i) c.at[i] = at[i];
  return c;
}

// Walks the box in pieces of 16 bytes of shared memory: visit(offset in the tile, global address, first and last valid
// byte of the piece). Tiles start at multiples of 1024 when swizzled, so offsets swizzle as addresses do.
template <class Visit> static void walk_box(const TensorMap& m, const Coordinates& c, Visit visit) {
  const uint32_t inner = m.box[0] * m.element, rows = bytes_of(m) / inner;
  const int64_t x0 = int64_t(c.at[0]) * m.element, row_end = int64_t(m.size[0] * m.element);
  for (uint32_t row = 0; row < rows; ++row) {
    uint64_t address = m.base;
    bool inside = true;
    for (uint32_t i = 1, rest = row; i < m.rank; rest /= m.box[i], ++i) {
      const int64_t at = c.at[i] + int64_t(rest % m.box[i]);
      inside &= at >= 0 && at < int64_t(m.size[i]);
      address += at * m.stride[i];
    }
    for (uint32_t x = 0; x < inner; x += 16) {
      const int64_t at = x0 + x;
      const int64_t first = inside ? std::max<int64_t>(0, -at) : 16, last = std::min<int64_t>(16, row_end - at);
      const uint32_t offset = row * inner + x;
      visit(m.swizzled ? swizzle128(offset) : offset, reinterpret_cast<uint8_t*>(address + at), first, last);
    }
  }
}

// ---- loads -----------------------------------------------------------------------------------------------------
static void issue(BulkLoad load) {
  for (size_t r = 0; r < 32; ++r) {
    if (!(load.blocks >> r & 1)) continue;
    if (r >= cluster->blocks.size()) fault("multicast to block %zu of a cluster of %zu", r, cluster->blocks.size());
    Block& b = cluster->blocks[r];
    if (!b.alive) fault("multicast to block %zu of the cluster, which has exited", r);
    const bool free = all_bytes(b, load.dst, load.bytes, kHeld, 0);
    for (uint32_t i = load.dst; !free && i < load.dst + load.bytes; ++i)
      if (b.bytes[i] & in_flight)
        fault("a bulk load to shared memory +%u, which is %s", i - kSharedStart,
              b.bytes[i] == mbarrier ? "part of an mbarrier" : "the target of another one under way");
    memset(b.shared + load.dst, 0xff, load.bytes);  // NaN until it has come
    mark(b, load.dst, load.bytes, in_flight);
  }
  cluster->loads.push_back(std::move(load));
  maybe_yield(cluster->chance_yield);
}

void tensor_load(uint32_t dst, const void* map, uint32_t bar, uint32_t blocks, int rank, const int* at) {
  CALLED_FROM_KERNEL;
  const TensorMap m = read_map(map, rank);
  check_tile(m, dst, "a bulk load");
  const Coordinates c = coordinates(rank, at);
  auto fetch = [m, c](uint8_t* tile) {
    walk_box(m, c, [&](uint32_t offset, const uint8_t* from, int64_t first, int64_t last) {
      memset(tile + offset, 0, 16);
      if (first >= last) return;
      check_global(from + first, last - first, "a bulk load (through its tensor map)");
      memcpy(tile + offset + first, from + first, last - first);
    });
  };
  if (!blocks) blocks = 1u << self->block->rank;
  issue({issuer_here(), dst, bar, bytes_of(m), blocks, fetch});
}

static void check_bulk(const void* global, uint32_t shared, uint32_t bytes, const char* what) {
  if (uint64_t(global) % 16 || shared % 16 || bytes % 16 || !bytes)
    fault("%s: the addresses and the number of bytes must be multiples of 16", what);
  check_shared_range(*self->block, shared, bytes, what);
}

void bulk_load(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  CALLED_FROM_KERNEL;
  check_bulk(src, dst, bytes, "bulk_load");
  check_global(src, bytes, "bulk_load");
  auto fetch = [=](uint8_t* tile) { memcpy(tile, src, bytes); };
  issue({issuer_here(), dst, bar, bytes, 1u << self->block->rank, fetch});
}

// A thread's own copies: NaN until it waits for them.
void copy_async(void* dst, const void* src) {
  CALLED_FROM_KERNEL;
  check_access(src, 16, 16, false);
  check_access(dst, 16, 16, true);
  shared_address(dst);
  memset(dst, 0xff, 16);
  self->copies.emplace_back(dst, src);
  maybe_yield(cluster->chance_yield);
}

void copy_async_wait() {
  CALLED_FROM_KERNEL;
  for (const auto& [dst, src] : self->copies) {
    check_access(dst, 16, 16, true);
    memcpy(dst, src, 16);
  }
  self->copies.clear();
}

void finish_load(size_t i) {
  const BulkLoad load = std::move(cluster->loads[i]);
  cluster->loads[i] = std::move(cluster->loads.back());
  cluster->loads.pop_back();
  carried_out = load.issuer;
  for (Block& b : cluster->blocks) {
    if (!(load.blocks >> b.rank & 1)) continue;
    load.fetch(b.shared + load.dst);
    mark(b, load.dst, load.bytes, valid);
    bytes_arrived(b, load.bar, load.bytes);
  }
}

// ---- stores and reduce-adds ------------------------------------------------------------------------------------
template <class T> static void add_values(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += sizeof(T)) {
    T a, b;
    memcpy(&a, to + i, sizeof a);
    memcpy(&b, from + i, sizeof b);
    a = T(float(a) + float(b));
    memcpy(to + i, &a, sizeof a);
  }
}
static void add_bytes(int type, uint8_t* to, const uint8_t* from, int64_t bytes) {
  std::lock_guard<std::mutex> lock(add_lock());
  if (type == f32) add_values<float>(to, from, bytes);
  if (type == bf16) add_values<__nv_bfloat16>(to, from, bytes);
  if (type == f16) add_values<__half>(to, from, bytes);
}

static void issue(uint32_t src, uint32_t bytes, std::function<void(const uint8_t*)> write) {
  auto store = std::make_shared<BulkStore>();
  store->issuer = issuer_here();
  store->src = src;
  store->bytes = bytes;
  store->write = std::move(write);
  self->stores.push_back(store);
  cluster->stores.push_back(std::move(store));
  maybe_yield(cluster->chance_yield);
}

void tensor_store(const void* map, uint32_t src, int rank, const int* at, bool add) {
  CALLED_FROM_KERNEL;
  const TensorMap m = read_map(map, rank);
  check_tile(m, src, "a bulk store");
  const Coordinates c = coordinates(rank, at);
  issue(src, bytes_of(m), [m, c, add](const uint8_t* tile) {
    walk_box(m, c, [&](uint32_t offset, uint8_t* to, int64_t first, int64_t last) {
      if (first >= last) return;
      check_global(to + first, last - first, "a bulk store (through its tensor map)");
      if (add) add_bytes(m.type, to + first, tile + offset + first, last - first);
      else memcpy(to + first, tile + offset + first, last - first);
    });
  });
}

void bulk_store(void* dst, uint32_t src, uint32_t bytes, bool add) {
  CALLED_FROM_KERNEL;
  check_bulk(dst, src, bytes, add ? "bulk_reduce_add" : "bulk_store");
  check_global(dst, bytes, add ? "bulk_reduce_add" : "bulk_store");
  issue(src, bytes, [=](const uint8_t* tile) {
    if (add) add_bytes(f32, static_cast<uint8_t*>(dst), tile, bytes);
    else memcpy(dst, tile, bytes);
  });
}

// A store happens in two steps, each at its own time: it reads shared memory, then it writes global memory.
void advance_store(size_t i) {
  const std::shared_ptr<BulkStore> s = cluster->stores[i];
  carried_out = s->issuer;
  if (s->state == BulkStore::issued) {
    const Block& b = *s->issuer.fiber->block;
    check_async_read(b, s->src, s->bytes, "a bulk store");
    s->data.assign(b.shared + s->src, b.shared + s->src + s->bytes);
    s->state = BulkStore::read;
  } else {
    s->write(s->data.data());
    s->state = BulkStore::done;
    cluster->stores[i] = cluster->stores.back();
    cluster->stores.pop_back();
  }
  wake(Waits::bulk, uint64_t(s->issuer.fiber - cluster->fibers.data()));
}

void bulk_commit() {
  self->store_groups.push_back(std::move(self->stores));
  self->stores.clear();
}

void bulk_wait(int newest, bool read_only) {
  CALLED_FROM_KERNEL;
  const BulkStore::State wanted = read_only ? BulkStore::read : BulkStore::done;
  wait_until(Waits::bulk, uint64_t(self - cluster->fibers.data()), newest, [&] {
    for (size_t g = 0; g + newest < self->store_groups.size(); ++g)
      for (auto& s : self->store_groups[g])
        if (s->state < wanted) return false;
    return true;
  });
}

void check_copies_done(const Block& b) {
  for (const BulkLoad& l : cluster->loads)
    if (l.blocks >> b.rank & 1)
      fault("the block ended while a bulk load to it was under way, issued at %s", place(l.issuer.pc).c_str());
  for (const auto& s : cluster->stores)
    if (s->issuer.fiber->block == &b && s->state == BulkStore::issued)
      fault("the block ended before a bulk store had read its shared memory (bulk_wait_read), issued at %s",
            place(s->issuer.pc).c_str());
}

}  // namespace emulator
