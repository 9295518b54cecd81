#include "linear.h"
#include "avx512.h"
#include "planes.h"

namespace rtn {
extern const Isa avx512;

namespace {
bool available() { return __builtin_cpu_supports("avx512vnni") && avx512.available(); }
int linear(const rtn_linear_args& a) { return a.int8_x ? int8_linear(a) : Linear<Avx512, FloatProduct>(a)(); }
}  // namespace

extern const Isa avx512vnni = {"avx512vnni", available, linear, quantize, dequantize};
}  // namespace rtn
