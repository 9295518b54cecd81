// Threads of the OpenMP runtime that torch has already loaded, found by name: linking one of our own would put a second pool of threads
// on the same cores. Where none is found, or after a fork (which no OpenMP pool survives), the caller does the work alone.
#include <pthread.h>
#include <stdlib.h>

#include <atomic>

#include "old_glibc.h"
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
  struct Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  static constexpr int64_t MOST = 1024;
  std::atomic<int64_t> arrived{0};
  int64_t parts;
  void (*fn)(void*, int64_t);
  void* context;
  Part part[MOST];
};

// Each thread has a part of its own, of neighbours, so that what it prefetches is what it will use; then it helps the others.
void work(void* pointer) {
  Work& w = *static_cast<Work*>(pointer);
  const int64_t own = w.arrived.fetch_add(1, std::memory_order_relaxed);
  for (int64_t p = 0; p < w.parts; ++p) {
    Work::Part& part = w.part[(own + p) % w.parts];
    for (int64_t i; (i = part.next.fetch_add(1, std::memory_order_relaxed)) < part.end;) w.fn(w.context, i);
  }
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
  if (threads > n) threads = n;
  if (threads > Work::MOST) threads = Work::MOST;
  if (threads <= 1 || !gomp() || forked) {
    for (int64_t i = 0; i < n; ++i) fn(context, i);
    return;
  }
  Work w;
  w.parts = threads;
  w.fn = fn;
  w.context = context;
  for (int64_t p = 0; p < threads; ++p) {
    w.part[p].next.store(p * n / threads, std::memory_order_relaxed);
    w.part[p].end = (p + 1) * n / threads;
  }
  gomp()(work, &w, unsigned(threads), 0);
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

void shrink(Slot slot) {
  constexpr int64_t KEPT = 32 << 20;  // a prefill of 2048 tokens of 8192; to get more anew takes little beside the product that needs it
  if (local.bytes[slot] <= KEPT) return;
  free(local.memory[slot]);
  local.memory[slot] = nullptr;
  local.bytes[slot] = 0;
}

}  // namespace rtn

extern "C" int rtn_has_threads(void) { return rtn::gomp() != nullptr; }
