// What is used of the CUDA driver, which is opened where it is there: no CUDA toolkit is needed to
// build this, and none to run it.
#pragma once

#include <dlfcn.h>

#include <string>
#include <type_traits>

namespace jadam {

using CudaStream = struct CUstream_st*;
using CudaContext = struct CUctx_st*;
using CudaModule = struct CUmod_st*;
using CudaFunction = struct CUfunc_st*;

// Functions of cuda.h, whose results are 0 or an error.
struct Driver {
  int (*init)(unsigned);
  int (*version)(int*);
  int (*device_count)(int*);
  int (*attribute)(int*, int, int);
  int (*error_string)(int, const char**);
  int (*stream_context)(CudaStream, CudaContext*);
  int (*push_context)(CudaContext);
  int (*pop_context)(CudaContext*);
  int (*exchange_capture_mode)(int*);
  int (*load_module)(CudaModule*, const void*);
  int (*find_function)(CudaFunction*, CudaModule, const char*);
  int (*launch)(CudaFunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                CudaStream, void**, void**);
  std::string missing;  // empty if all were found

  static const Driver& get() {
    static const Driver driver;
    return driver;
  }

  std::string what(int error) const {
    const char* text = nullptr;
    error_string(error, &text);
    return text == nullptr ? "error " + std::to_string(error) : text;
  }

 private:
  Driver() {
    void* const library = dlopen("libcuda.so.1", RTLD_NOW);
    if (library == nullptr) {
      missing = "libcuda.so.1, of NVIDIA's driver";
      return;
    }
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr) missing = name;
    };
    find(init, "cuInit");
    find(version, "cuDriverGetVersion");
    find(device_count, "cuDeviceGetCount");
    find(attribute, "cuDeviceGetAttribute");
    find(error_string, "cuGetErrorString");
    find(stream_context, "cuStreamGetCtx");
    find(push_context, "cuCtxPushCurrent_v2");
    find(pop_context, "cuCtxPopCurrent_v2");
    find(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
    find(load_module, "cuModuleLoadData");
    find(find_function, "cuModuleGetFunction");
    find(launch, "cuLaunchKernel");
  }
};

}  // namespace jadam
