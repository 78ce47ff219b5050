// The kernels for GPUs, run on this machine.
#pragma once

#include "step.h"

namespace simt {

// One step of what a leaf's thread blocks begin with in a range of blocks: a thread block's work is
// not divided. Moments and residual are replaced where they are, in the memory of the results.
void run_on_gpu(const jadam::Leaf& leaf, jadam::Range range, const jadam::Numbers& numbers,
                uint32_t count);

}  // namespace simt
