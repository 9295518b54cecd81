#include <cpuid.h>

#include "linear.h"
#include "avx2.h"
#include "planes.h"

namespace rtn {
extern const Isa avx2;

namespace {
bool available() {
  unsigned a, b, c, d;  // GCC 11 knows the instructions, and no name for them in __builtin_cpu_supports
  return avx2.available() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
int linear(const rtn_linear_args& a) { return a.int8_x ? Linear<AvxVnni, Int8Product>(a)() : Linear<Avx2, FloatProduct>(a)(); }
}  // namespace

extern const Isa avxvnni = {"avxvnni", available, linear, quantize, dequantize};
}  // namespace rtn
