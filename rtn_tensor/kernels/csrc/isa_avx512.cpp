#include "linear.h"
#include "avx2.h"
#include "avx512.h"
#include "planes.h"

namespace rtn {
namespace {
bool available() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}
int linear(const rtn_linear_args& a) { return a.int8_x ? Linear<Avx2Int8, Int8Product>(a)() : Linear<Avx512, FloatProduct>(a)(); }
}  // namespace

extern const Isa avx512 = {"avx512", available, linear, quantize, dequantize};
}  // namespace rtn
