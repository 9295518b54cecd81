#include "linear.h"
#include "generic.h"
#include "planes.h"

namespace rtn {
namespace {
bool available() { return true; }
int linear(const rtn_linear_args& a) { return a.int8_x ? Linear<GenericInt8, Int8Product>(a)() : Linear<Generic, FloatProduct>(a)(); }
}  // namespace

extern const Isa generic = {"generic", available, linear, quantize, dequantize};
}  // namespace rtn
