#include "linear.h"
#include "avx2.h"
#include "planes.h"

namespace rtn {
namespace {
bool available() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
int linear(const rtn_linear_args& a) { return a.int8_x ? Linear<Avx2Int8, Int8Product>(a)() : Linear<Avx2, FloatProduct>(a)(); }
}  // namespace

extern const Isa avx2 = {"avx2", available, linear, quantize, dequantize};
}  // namespace rtn
