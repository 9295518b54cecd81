// Runs calls that it reads from stdin, and writes what came out to stdout. Every buffer is as long as the call's numbers ask for, so that
// a byte too far is seen; each call runs three times at once, in other places and on other numbers of threads, and must agree bit for bit.
//
// A request is the function's index, the call's fields (a buffer's size in bytes in place of its address, -1 for null), then the buffers.
// The answer is the status, then the buffers that the function writes. First of all comes the status of choosing argv[1]. An index past the
// functions asks for rtn_rounds_weight, whose five numbers follow.
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <thread>
#include <vector>

#include "../../rtn_tensor/kernels/csrc/rtn.h"

namespace {

struct Function {
  int (*call)(const void*);
  size_t fields, threads;  // how many there are, and which of them is the number of threads
  size_t buffers;          // the first of them, which are addresses
  unsigned writes;         // bit b: it writes buffer b
};

template <class Args, int (*function)(const Args*)>
Function described(size_t buffers, unsigned writes) {
  return {[](const void* a) { return function(static_cast<const Args*>(a)); }, sizeof(Args) / 8, offsetof(Args, threads) / 8, buffers, writes};
}

const Function FUNCTIONS[] = {
    described<rtn_linear_args, rtn_linear>(7, 1 << 4),
    described<rtn_planes_args, rtn_quantize>(5, 1 << 1 | 1 << 2 | 1 << 3),
    described<rtn_planes_args, rtn_dequantize>(5, 1 << 0),
};

using Bytes = std::vector<char>;

// ASan guards both ends of the heap's buffers, and aligns them to 16 bytes; but it does not look into vector instructions that take a
// mask. A page that may not be touched stops those.
enum Place { HEAP, HEAP_ALIGNED_TO_8, BEFORE_A_PAGE };

struct Buffer {
  char *memory, *data;
  size_t mapped = 0;

  Buffer(Place place, const Bytes& content, bool writable) {
    if (place == BEFORE_A_PAGE) {
      const size_t page = size_t(sysconf(_SC_PAGESIZE)), whole = (content.size() + page - 1) / page * page;
      mapped = whole + page;
      memory = static_cast<char*>(mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
      data = memory + whole - content.size();
      std::copy(content.begin(), content.end(), data);
      mprotect(memory, whole, writable ? PROT_READ | PROT_WRITE : PROT_READ);
      mprotect(memory + whole, page, PROT_NONE);
    } else {
      const size_t shift = place == HEAP ? 0 : 8;
      memory = static_cast<char*>(malloc(content.size() + shift));
      data = memory + shift;
      std::copy(content.begin(), content.end(), data);
    }
  }
  Buffer(Buffer&& other) : memory(other.memory), data(other.data), mapped(other.mapped) { other.memory = nullptr; }
  ~Buffer() {
    if (mapped && memory) munmap(memory, mapped);
    else free(memory);
  }
};

struct Run {
  const Function& function;
  std::vector<int64_t> fields;
  const std::vector<Bytes>& given;
  Place place;
  int64_t threads;
  int64_t status = 0;
  std::vector<Bytes> written;

  void operator()() {
    std::vector<Buffer> buffers;
    for (size_t b = 0; b < function.buffers; ++b) {
      buffers.emplace_back(place, given[b], function.writes >> b & 1);
      fields[b] = fields[b] == -1 ? 0 : int64_t(buffers[b].data);
    }
    fields[function.threads] = threads;
    status = function.call(fields.data());
    for (size_t b = 0; b < function.buffers; ++b) {
      if (function.writes >> b & 1) written.emplace_back(buffers[b].data, buffers[b].data + given[b].size());
    }
  }
};

// Of no bytes, a vector's address may be null, which fread and fwrite do not allow.
bool read(void* to, size_t bytes) { return !bytes || fread(to, 1, bytes, stdin) == bytes; }
void write(const void* from, size_t bytes) {
  if (bytes) fwrite(from, 1, bytes, stdout);
}

}  // namespace

int main(int, char** argv) {
  int64_t number = rtn_set_isa(argv[1]);
  write(&number, 8);
  fflush(stdout);
  while (read(&number, 8)) {
    if (number == std::end(FUNCTIONS) - std::begin(FUNCTIONS)) {
      int64_t of[5];
      if (!read(of, sizeof(of))) return 1;
      number = rtn_rounds_weight(of[0], of[1], of[2], of[3], of[4]);
      write(&number, 8);
      fflush(stdout);
      continue;
    }
    const Function& function = FUNCTIONS[number];
    std::vector<int64_t> fields(function.fields);
    if (!read(fields.data(), 8 * fields.size())) return 1;
    std::vector<Bytes> given;
    for (size_t b = 0; b < function.buffers; ++b) {
      given.emplace_back(fields[b] == -1 ? 0 : fields[b]);
      if (!read(given[b].data(), given[b].size())) return 1;
    }
    Run runs[] = {{function, fields, given, HEAP, 1, 0, {}},
                  {function, fields, given, HEAP_ALIGNED_TO_8, 2, 0, {}},
                  {function, fields, given, BEFORE_A_PAGE, 3, 0, {}}};
    std::vector<std::thread> callers;
    for (Run& run : runs) callers.emplace_back(std::ref(run));
    for (std::thread& caller : callers) caller.join();
    for (const Run& run : runs) {
      if (run.status != runs[0].status || run.written != runs[0].written) {
        fprintf(stderr, "runs in other places, or with other numbers of threads, differ\n");
        return 1;
      }
    }
    write(&runs[0].status, 8);
    for (const Bytes& bytes : runs[0].written) write(bytes.data(), bytes.size());
    fflush(stdout);
  }
}
