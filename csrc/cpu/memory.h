// Scratch memory. Internal linkage: compiled once per instruction set.
#pragma once
#include <cstddef>
#include <cstdint>
#include <new>

namespace {

// Aligned, uninitialised memory; false if the allocation failed.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) : data_(::operator new(bytes + 64, std::align_val_t(64), std::nothrow)) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t(64)); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  explicit operator bool() const { return data_; }
  template <class T> T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_;
};

// Cuts one block of floats into arrays aligned to cache lines. Only counts if the block is null.
class Cutter {
 public:
  explicit Cutter(float* data) : data_(data) {}
  float* take(int64_t n) {
    float* taken = data_ ? data_ + used_ : nullptr;
    used_ += (n + 15) / 16 * 16;
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  float* data_;
  int64_t used_ = 0;
};

}  // namespace
