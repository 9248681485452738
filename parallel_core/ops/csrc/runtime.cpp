// Thread count and the matrix product that the other kernels call.
#include <malloc.h>

#include "common.h"
#include "gemm.h"

namespace pc {
int num_threads = 1;
Sgemm sgemm = nullptr;
}  // namespace pc

// `sgemm` is dnnl_sgemm of the oneDNN library that MindSpore ships, or null.
PC_API void pc_init(int threads, void* sgemm) {
  pc::num_threads = threads > 0 ? threads : 1;
  pc::sgemm = reinterpret_cast<pc::Sgemm>(sgemm);
}

// Freed buffers stay in the process up to `bytes`: a fresh mapping costs a page fault for every 4 KiB at first touch.
PC_API void pc_keep_freed_memory(int64_t bytes) {
  mallopt(M_MMAP_THRESHOLD, static_cast<int>(bytes));
  mallopt(M_TRIM_THRESHOLD, static_cast<int>(bytes));
}
