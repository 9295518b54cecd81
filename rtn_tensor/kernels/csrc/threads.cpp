// Threads of the OpenMP runtime that torch has already loaded, found by name: linking one of our own would put a second pool of threads
// on the same cores. Where none is found, or after a fork (which no OpenMP pool survives), the caller does the work alone.
#include <pthread.h>
#include <stdlib.h>

#include <atomic>

#include "rtn.h"

#include <dlfcn.h>

namespace rtn {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};

GompParallel find_gomp() {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
  // libgomp's own entry point, which LLVM's and Intel's runtimes have too.
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

GompParallel gomp() {
  static const GompParallel found = find_gomp();
  return found;
}

struct Work {
  std::atomic<int64_t> next;
  int64_t n;
  void (*fn)(void*, int64_t);
  void* context;
};

void work(void* pointer) {
  Work& w = *static_cast<Work*>(pointer);
  for (int64_t i; (i = w.next.fetch_add(1, std::memory_order_relaxed)) < w.n;) w.fn(w.context, i);
}

struct Scratch {
  void* memory[SLOTS] = {};
  int64_t bytes[SLOTS] = {};
  ~Scratch() {
    for (void* m : memory) free(m);
  }
};

thread_local Scratch local;

}  // namespace

void parallel_for(int64_t threads, int64_t n, void (*fn)(void*, int64_t), void* context) {
  Work w{{0}, n, fn, context};
  if (threads > n) threads = n;
  if (threads > 1 && gomp() && !forked) gomp()(work, &w, unsigned(threads), 0);
  else work(&w);
}

void* scratch(Slot slot, int64_t bytes) {
  if (local.bytes[slot] < bytes) {
    free(local.memory[slot]);
    local.memory[slot] = nullptr;
    local.bytes[slot] = 0;
    const int64_t rounded = (bytes + bytes / 4 + 63) / 64 * 64;  // some room, so that a growing batch does not ask each time
    if (posix_memalign(&local.memory[slot], 64, size_t(rounded))) return local.memory[slot] = nullptr;
    local.bytes[slot] = rounded;
  }
  // Never null for a request of no bytes: null means there is no memory.
  return bytes || local.memory[slot] ? local.memory[slot] : &local;
}

}  // namespace rtn

extern "C" int rtn_has_threads(void) { return rtn::gomp() != nullptr; }
