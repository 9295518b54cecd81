// Threads of the OpenMP runtime that torch has already loaded, found by name: linking one of our own would put a second pool of threads
// on the same cores. Where none is found, or after a fork (which no OpenMP pool survives), the caller does the work alone.
#include <dlfcn.h>
#include <pthread.h>
#include <stdlib.h>

#include <atomic>

#include "rtn.h"

namespace rtn {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

std::atomic<bool> forked{false};

// From when the library is loaded: torch may have started the pool before our first parallel call.
const int watching = pthread_atfork(nullptr, nullptr, [] { forked = true; });

GompParallel gomp() {
  // libgomp's own entry point, which LLVM's and Intel's runtimes have too.
  static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
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
    // Some room, so that a growing batch does not ask each time; none at first, where a sanitizer shall see what passes the end.
    const int64_t size = local.memory[slot] ? bytes + bytes / 4 : bytes;
    free(local.memory[slot]);
    local.memory[slot] = nullptr;
    local.bytes[slot] = 0;
    if (posix_memalign(&local.memory[slot], 64, size_t(size))) return local.memory[slot] = nullptr;
    local.bytes[slot] = size;
  }
  // Never null for a request of no bytes: null means there is no memory.
  return bytes || local.memory[slot] ? local.memory[slot] : &local;
}

}  // namespace rtn

extern "C" int rtn_has_threads(void) { return rtn::gomp() != nullptr; }
