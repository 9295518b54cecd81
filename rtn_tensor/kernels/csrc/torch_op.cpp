// rtn::linear on CPU tensors without Python: from torch's dispatcher straight to rtn_linear. A compiled model calls it once a layer, and
// the same way through Python takes 13 us per call on warm caches and up to 60 where the weights of the layer before have emptied them.
//
// It speaks torch's stable C interface (torch/csrc/stable/c/shim.h, torch >= 2.10), whose functions are found by name in the process, so
// that this library still needs no headers of torch and is loaded where there is none. What it does not take it hands to rtn_python::linear,
// the same op in Python.
#include <stdlib.h>

#include <atomic>
#include <stdexcept>
#include <string>

#include "old_glibc.h"
#include "rtn.h"

namespace {

using Value = uint64_t;   // StableIValue: an integer, a Tensor, or a pointer to an optional's value, null where it has none
using Tensor = void*;     // AtenTensorHandle
using Status = int32_t;   // 0 is success
constexpr uint64_t VERSION = uint64_t(2) << 56 | uint64_t(11) << 48;  // of the interface that this file was written for

struct Torch {
  Status (*library_init_impl)(const char*, const char*, const char*, uint32_t, void**);
  Status (*library_init_fragment)(const char*, const char*, uint32_t, void**);
  Status (*library_def)(void*, const char*);
  Status (*library_impl)(void*, const char*, void (*)(Value*, uint64_t, uint64_t), uint64_t);
  Status (*call_dispatcher)(const char*, const char*, Value*, uint64_t);
  Status (*get_dim)(Tensor, int64_t*);
  Status (*get_sizes)(Tensor, int64_t**);
  Status (*get_strides)(Tensor, int64_t**);
  Status (*get_dtype)(Tensor, int32_t*);
  Status (*get_device_type)(Tensor, int32_t*);
  Status (*get_data_ptr)(Tensor, void**);
  Status (*empty_strided)(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Tensor*);
  Status (*delete_tensor)(Tensor);
  Status (*get_num_threads)(uint32_t*);
  int32_t (*float32)();
  int32_t (*bfloat16)();
  int32_t (*float16)();
  int32_t (*uint8)();
  int32_t (*int8)();
  int32_t (*cpu)();
  // Not in every version that the rest is in.
  Status (*delete_value)(Value*);
  const char* (*what)();

  void* torch_cpu;

  template <class F>
  bool find(F& function, const char* name) {
    function = reinterpret_cast<F>(dlsym(torch_cpu, name));
    return function;
  }

  bool load() {
    torch_cpu = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);  // Python has loaded it out of sight of RTLD_DEFAULT
    if (!torch_cpu) return false;
    find(delete_value, "torch_delete_stable_ivalue");
    find(what, "torch_exception_get_what_without_backtrace");
    return find(library_init_fragment, "aoti_torch_library_init_fragment") && find(library_def, "aoti_torch_library_def") &&
           find(library_init_impl, "aoti_torch_library_init_impl") && find(library_impl, "torch_library_impl") &&
           find(call_dispatcher, "torch_call_dispatcher") && find(get_dim, "aoti_torch_get_dim") && find(get_sizes, "aoti_torch_get_sizes") &&
           find(get_strides, "aoti_torch_get_strides") && find(get_dtype, "aoti_torch_get_dtype") &&
           find(get_device_type, "aoti_torch_get_device_type") &&
           find(get_data_ptr, "aoti_torch_get_data_ptr") && find(empty_strided, "aoti_torch_empty_strided") &&
           find(delete_tensor, "aoti_torch_delete_tensor_object") && find(get_num_threads, "torch_get_num_threads") &&
           find(float32, "aoti_torch_dtype_float32") && find(bfloat16, "aoti_torch_dtype_bfloat16") &&
           find(float16, "aoti_torch_dtype_float16") && find(uint8, "aoti_torch_dtype_uint8") && find(int8, "aoti_torch_dtype_int8") && find(cpu, "aoti_torch_device_type_cpu");
  }
};

Torch torch;
std::atomic<bool> direct{false};

struct View {
  int64_t dim;
  int64_t *sizes, *strides;
  void* data;
  int32_t torch_dtype;
  int64_t dtype;  // ours, or -1

  bool read(Tensor t) {
    int32_t device;
    if (torch.get_device_type(t, &device) || device != torch.cpu()) return false;
    if (torch.get_dim(t, &dim) || torch.get_sizes(t, &sizes) || torch.get_strides(t, &strides) || torch.get_data_ptr(t, &data) ||
        torch.get_dtype(t, &torch_dtype))
      return false;
    dtype = torch_dtype == torch.bfloat16() ? RTN_BFLOAT16 : torch_dtype == torch.float32() ? RTN_FLOAT32 : torch_dtype == torch.float16() ? RTN_FLOAT16 : torch_dtype == torch.uint8() ? RTN_SCALE8 : -1;
    // A file may have numbers begin anywhere; Python copies such.
    const uintptr_t size = dtype == RTN_FLOAT32 ? 4 : dtype < 0 || dtype == RTN_SCALE8 ? 1 : 2;
    return reinterpret_cast<uintptr_t>(data) % size == 0;
  }
  bool dense_rows() const { return strides[dim - 1] == 1 || sizes[dim - 1] == 1; }
  bool contiguous() const {
    for (int64_t d = dim - 1, expected = 1; d >= 0; expected *= sizes[d--])
      if (sizes[d] != 1 && strides[d] != expected) return false;
    return true;
  }
};

constexpr int64_t MOST_DIMS = 8;

// Null where this is a call for the op in Python.
Tensor product(const Value* stack) {
  View x, qdata, scale, bias, zero = {};
  const char* forced = getenv("RTN_KERNEL");
  if (!direct || (forced && *forced)) return nullptr;
  if (!x.read(Tensor(stack[0])) || !qdata.read(Tensor(stack[1])) || !scale.read(Tensor(stack[2]))) return nullptr;
  const Value* optional = reinterpret_cast<const Value*>(stack[3]);
  const Value* asymmetric = reinterpret_cast<const Value*>(stack[6]);
  if (x.dtype < 0 || scale.dtype < 0 || x.dim < 1 || x.dim > MOST_DIMS || qdata.dim != 2 || scale.dim != 2) return nullptr;
  if (qdata.torch_dtype != torch.uint8()) return nullptr;
  if (!(x.contiguous() || (x.dim == 2 && x.dense_rows())) || !qdata.dense_rows() || !scale.dense_rows()) return nullptr;
  if (optional && (!bias.read(Tensor(*optional)) || bias.torch_dtype != x.torch_dtype || bias.dim != 1 || !bias.dense_rows())) return nullptr;
  if (asymmetric && (!zero.read(Tensor(*asymmetric)) || zero.torch_dtype != torch.int8() || zero.dim != 2 || !zero.dense_rows())) return nullptr;

  const int64_t n = qdata.sizes[0], k = x.sizes[x.dim - 1], bits = int64_t(stack[4]), group_size = int64_t(stack[5]);
  // One of no elements has no address, and would pass for none.
  if ((optional && bias.sizes[0] != n) || (asymmetric && !zero.data)) return nullptr;

  int64_t sizes[MOST_DIMS], strides[MOST_DIMS];
  sizes[x.dim - 1] = n;
  strides[x.dim - 1] = 1;
  int64_t m = 1;
  for (int64_t d = x.dim - 2; d >= 0; --d) {
    sizes[d] = x.sizes[d];
    strides[d] = strides[d + 1] * (sizes[d + 1] ? sizes[d + 1] : 1);
    m *= sizes[d];
  }
  uint32_t threads = 1;
  Tensor y;
  if (torch.get_num_threads(&threads) || torch.empty_strided(x.dim, sizes, strides, x.torch_dtype, torch.cpu(), 0, &y)) return nullptr;
  rtn_linear_args a = {};
  a.x = x.data;
  a.qdata = static_cast<const uint8_t*>(qdata.data);
  a.scale = scale.data;
  a.bias = optional ? bias.data : nullptr;
  a.zero = static_cast<const int8_t*>(zero.data);
  a.m = m;
  a.n = n;
  a.k = k;
  a.experts = 1;
  a.bits = bits;
  a.group_size = group_size;
  a.int8_x = (stack[7] & 0xFF) != 0;
  a.dtype = x.dtype;
  a.scale_dtype = scale.dtype;
  a.x_stride = x.dim == 2 ? x.strides[0] : k;
  a.y_stride = n;
  a.qdata_stride = qdata.strides[0];
  a.scale_stride = scale.strides[0];
  if (asymmetric) {
    a.zero_stride = zero.strides[0];
    a.zero_experts = 1;
    a.zero_rows = zero.sizes[0];
    a.zero_groups = zero.sizes[1];
  }
  a.threads = threads;
  a.qdata_experts = a.scale_experts = 1;
  a.qdata_rows = n;
  a.qdata_bytes = qdata.sizes[1];
  a.scale_rows = scale.sizes[0];
  a.scale_groups = scale.sizes[1];
  a.bias_size = optional ? bias.sizes[0] : 0;
  if (torch.get_data_ptr(y, &a.y) || rtn_linear(&a)) {
    torch.delete_tensor(y);
    return nullptr;
  }
  return y;
}

// The tensors on the stack are ours to give back.
void release(Value* stack) {
  for (int i = 0; i < 3; ++i) torch.delete_tensor(Tensor(stack[i]));
  for (const int i : {3, 6}) {
    Value* optional = reinterpret_cast<Value*>(stack[i]);
    if (!optional) continue;
    torch.delete_tensor(Tensor(*optional));
    if (torch.delete_value) torch.delete_value(optional);
    else delete optional;
  }
}

void linear(Value* stack, uint64_t, uint64_t) {
  if (const Tensor y = product(stack)) {
    release(stack);
    stack[0] = Value(y);
  } else if (torch.call_dispatcher("rtn_python::linear", "", stack, VERSION)) {
    const std::string what = torch.what ? torch.what() : "rtn::linear failed; the reason is printed above";
    throw std::runtime_error(what.substr(0, what.find("\n\nAt:\n")));  // without the Python lines that it came through
  }
}

void linear_or_none(Value* stack, uint64_t, uint64_t) {
  const Tensor y = product(stack);
  release(stack);
  stack[0] = y ? Value(new Value(Value(y))) : 0;
}

}  // namespace

extern "C" int rtn_register(void) {
  void *library, *python;  // torch keeps what it registers until the process ends
  if (!torch.load() || torch.library_init_impl("rtn", "CPU", __FILE__, __LINE__, &library)) return -1;
  if (torch.library_init_impl("rtn_python", "CPU", __FILE__, __LINE__, &python)) return -1;
  if (torch.library_impl(python, "linear_in_cpp", linear_or_none, VERSION)) return -1;
  return torch.library_impl(library, "linear", linear, VERSION) ? -1 : 0;
}

// For a process without the Python package, which defines the op itself: after this an AOTInductor package whose weights are all linear runs.
extern "C" int rtn_define(void) {
  void* library;
  if (!torch.load() || torch.library_init_fragment("rtn", __FILE__, __LINE__, &library)) return -1;
  if (torch.library_def(library, "linear(Tensor x, Tensor qdata, Tensor scale, Tensor? bias, int bits, int group_size, Tensor? zero=None, bool int8_x=False) -> Tensor")) return -1;
  direct = true;
  return rtn_register();
}

extern "C" void rtn_direct(int on) { direct = on; }
