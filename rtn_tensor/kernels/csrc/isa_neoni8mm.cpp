#include <asm/hwcap.h>
#include <sys/auxv.h>

#include "linear.h"
#include "neon.h"
#include "planes.h"

namespace rtn {
extern const Isa neonbf16;

namespace {
bool available() { return neonbf16.available() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM); }
int linear(const rtn_linear_args& a) { return a.int8_x ? Linear<NeonI8mm, Int8Product>(a)() : neonbf16.linear(a); }
}  // namespace

extern const Isa neoni8mm = {"neoni8mm", available, linear, quantize, dequantize};
}  // namespace rtn
