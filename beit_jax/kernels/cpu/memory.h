// Memory that is asked for once, and kept.
#pragma once

#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

namespace beit {

// What a thread keeps for its copies.
struct Scratch {
  float* data = nullptr;
  std::size_t size = 0;
  float* of(std::size_t wanted) {
    if (wanted > size) {
      std::free(data);
      data = static_cast<float*>(std::aligned_alloc(64, (wanted * sizeof(float) + 63) / 64 * 64));
      if (!data) throw std::bad_alloc();
      size = wanted;
    }
    return data;
  }
  ~Scratch() { std::free(data); }
};

// What one call after the other borrows: more than one is kept only where calls overlap.
class Borrowed {
 public:
  Borrowed() {
    std::lock_guard<std::mutex> lock(kept().mutex);
    if (kept().free.empty()) return;
    memory = std::move(kept().free.back());
    kept().free.pop_back();
  }
  ~Borrowed() {
    std::lock_guard<std::mutex> lock(kept().mutex);
    kept().free.push_back(std::move(memory));
  }
  float* of(std::size_t wanted) { return memory->of(wanted); }

 private:
  struct Kept {
    std::mutex mutex;
    std::vector<std::unique_ptr<Scratch>> free;
  };
  static Kept& kept() {
    static Kept* all = new Kept;  // never destroyed: threads may outlive what is
    return *all;
  }
  std::unique_ptr<Scratch> memory = std::make_unique<Scratch>();
};

}  // namespace beit
