// Chooses the instruction set, once, by what the processor has.
#include "rtn.h"

#include <string.h>

#include <atomic>

namespace rtn {

extern const Isa avx512bf16, avx512, avx2, neonbf16, generic;

namespace {
// Fastest first; the last runs anywhere.
const Isa* const ISAS[] = {
#ifdef __x86_64__
    &avx512bf16, &avx512, &avx2,
#elif defined(__aarch64__) && defined(__linux__)
    &neonbf16,
#endif
    &generic};

const Isa* fastest() {
  for (const Isa* isa : ISAS)
    if (isa->available()) return isa;
  return nullptr;
}

std::atomic<const Isa*> chosen{fastest()};
}  // namespace
}  // namespace rtn

extern "C" {
const char* rtn_isa(void) { return rtn::chosen.load()->name; }

int rtn_set_isa(const char* name) {
  for (const rtn::Isa* isa : rtn::ISAS) {
    if (strcmp(isa->name, name) == 0 && isa->available()) {
      rtn::chosen = isa;
      return 0;
    }
  }
  return -1;
}

int rtn_linear(const rtn_linear_args* a) { return rtn::chosen.load()->linear(*a); }
int rtn_quantize(const rtn_planes_args* a) { return rtn::chosen.load()->quantize(*a); }
int rtn_dequantize(const rtn_planes_args* a) { return rtn::chosen.load()->dequantize(*a); }
}
