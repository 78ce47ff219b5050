// The kernels for NVIDIA's GPUs behind jax.ffi: leaves to launches.

#include <iterator>
#include <map>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "../leaves.h"
#include "device_leaf.h"
#include "driver.h"

// The kernels as text that the driver compiles, once for each context.
asm(".pushsection .rodata\n"
    "jadam_ptx:\n"
    ".incbin \"" JADAM_PTX
    "\"\n"
    ".byte 0\n"
    ".popsection\n");
extern const char jadam_ptx[] asm("jadam_ptx");

namespace jadam {
namespace {

constexpr int kPtxVersion = 12010;  // of CUDA, whose drivers compile PTX 8.1
constexpr int kCapability = 8;      // sm_80, whose warps have a maximum in one instruction
constexpr int kMajor = 75;          // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
constexpr int kRelaxed = 2;         // CU_STREAM_CAPTURE_MODE_RELAXED

// Makes the context of a stream that of this thread.
class InContext {
 public:
  InContext(const Driver& driver, CudaContext context) : driver_(driver) {
    driver_.push_context(context);
  }
  ~InContext() {
    CudaContext popped;
    driver_.pop_context(&popped);
  }

 private:
  const Driver& driver_;
};

// A kernel by its name. It may be looked for while a stream is captured into a graph, where loading
// a module counts as unsafe unless this thread says otherwise.
int find_kernel(const Driver& driver, CudaContext context, const std::string& name,
                CudaFunction& found) {
  static std::mutex mutex;
  static std::map<CudaContext, CudaModule> modules;
  static std::map<std::pair<CudaContext, std::string>, CudaFunction> functions;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto known = functions.find({context, name}); known != functions.end()) {
    found = known->second;
    return 0;
  }
  int mode = kRelaxed;
  driver.exchange_capture_mode(&mode);
  int error = 0;
  if (modules.count(context) == 0) {
    CudaModule module;
    error = driver.load_module(&module, jadam_ptx);
    if (error == 0) modules[context] = module;
  }
  if (error == 0) error = driver.find_function(&found, modules[context], name.c_str());
  if (error == 0) functions[{context, name}] = found;
  driver.exchange_capture_mode(&mode);
  return error;
}

// As many leaves of one kernel in a launch as it takes.
ffi::Error launch_leaves(CudaStream stream, ffi::RemainingArgs args, ffi::RemainingRets rets,
                         ffi::Span<const int32_t> decays, bool writes_params,
                         ffi::Span<const int32_t> weights, ffi::Span<const int32_t> salts) {
  Shared shared;
  std::vector<Leaf> leaves;
  ffi::Error error = read_call(args, rets, decays, writes_params, weights, salts, shared, leaves);
  if (error.failure()) return error;
  const Driver& driver = Driver::get();
  const auto failed = [&](const std::string& what, int code) {
    return ffi::Error::Internal("jadam_step: " + what + ": " + driver.what(code));
  };
  if (!driver.missing.empty()) return ffi::Error::Internal("jadam_step: no " + driver.missing);
  CudaContext context;
  if (int code = driver.stream_context(stream, &context)) return failed("no context", code);
  const InContext in_context(driver, context);
  std::vector<Leaf> leaves_of[std::size(kEntries)];
  for (const Leaf& leaf : leaves) {
    if (leaf.blocks() > int64_t(UINT32_MAX / 2)) return wrong("a leaf is too large");
    if (leaf.m != leaf.m_out || leaf.v != leaf.v_out || leaf.residual != leaf.residual_out) {
      return wrong("moments or a residual are not replaced where they are");
    }
    leaves_of[entry_of(leaf)].push_back(leaf);
  }
  for (size_t entry = 0; entry < std::size(kEntries); ++entry) {
    const auto& [name, division] = kEntries[entry];
    const std::vector<Leaf>& those = leaves_of[entry];
    if (those.empty()) continue;
    CudaFunction kernel;
    if (int code = find_kernel(driver, context, name, kernel)) {
      return failed("the driver does not take the kernel", code);
    }
    for (size_t first = 0; first < those.size(); first += kLeavesInLaunch) {
      Launch launch{shared.numbers, shared.count, shared.first_lane, 0, {}};
      uint32_t chunks = 0;
      for (size_t i = first; i < those.size() && launch.leaves < kLeavesInLaunch; ++i) {
        const DeviceLeaf leaf = on_device(those[i], division, chunks);
        chunks += chunks_of(leaf, division);
        launch.leaf[launch.leaves++] = leaf;
      }
      void* parameters[] = {&launch};
      const int code = driver.launch(kernel, chunks, 1, 1, kThreads, 1, 1, 0, stream, parameters,
                                     nullptr);
      if (code != 0) return failed("no launch", code);
    }
  }
  return ffi::Error::Success();
}

std::string why_not() {
  const Driver& driver = Driver::get();
  if (!driver.missing.empty()) return "no " + driver.missing;
  if (int error = driver.init(0)) return "no GPU: " + driver.what(error);
  int version = 0, devices = 0;
  driver.version(&version);
  if (version < kPtxVersion) {
    return "a driver for CUDA " + std::to_string(kPtxVersion / 1000) + "." +
           std::to_string(kPtxVersion % 1000 / 10) + " or later is needed, this one is for " +
           std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  }
  driver.device_count(&devices);
  for (int device = 0; device < devices; ++device) {
    int capability = 0;
    driver.attribute(&capability, kMajor, device);
    if (capability < kCapability) {
      return "GPU " + std::to_string(device) + " has compute capability " +
             std::to_string(capability) + ", the kernel needs " + std::to_string(kCapability);
    }
  }
  return devices > 0 ? "" : "no GPU";
}

}  // namespace
}  // namespace jadam

// Why the kernels cannot run on this machine's GPUs; empty if they can.
extern "C" const char* jadam_why_not_on_gpu() {
  static const std::string reason = jadam::why_not();
  return reason.c_str();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    jadam_step_on_gpu, jadam::launch_leaves,
    jadam::with_attributes(
        xla::ffi::Ffi::Bind().Ctx<xla::ffi::PlatformStream<jadam::CudaStream>>()),
    {xla::ffi::Traits::kCmdBufferCompatible});
