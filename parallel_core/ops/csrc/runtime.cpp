// The worker threads, and what the kernels take from outside.
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "common.h"
#include "gemm.h"

namespace pc {
int num_threads = 1;
int fixed_shares = 0;
Sgemm sgemm = nullptr;

namespace {

constexpr std::chrono::microseconds kSpin{250};

// One job at a time, announced by `ticket`: number of the job, its parts, the next part to claim.
struct Pool {
  void (*body)(const void*, int, int) = nullptr;
  const void* context = nullptr;
  std::atomic<u64> ticket{0};  // job << 32 | parts << 16 | next
  std::atomic<int> left{0};
  std::atomic<u32> job{0}, sleepers{0};
  int workers = 0;
  pid_t owner = 0;
};

Pool& pool() {
  static Pool* one = new Pool;  // never destroyed: workers outlive main()
  return *one;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Claims and runs parts of job `job` until none is left to claim.
void work(Pool& p, u32 job) {
  u64 seen = p.ticket.load();
  while (static_cast<u32>(seen >> 32) == job) {
    const int parts = static_cast<int>(seen >> 16 & 0xffff), next = static_cast<int>(seen & 0xffff);
    if (next >= parts) return;
    if (!p.ticket.compare_exchange_weak(seen, seen + 1)) continue;
    p.body(p.context, next, parts);  // the job cannot end before this part is done
    p.left.fetch_sub(1);
    seen = p.ticket.load();
  }
}

void worker() {
  Pool& p = pool();
  u32 last = 0;
  while (true) {
    const auto until = std::chrono::steady_clock::now() + kSpin;
    u32 job = p.job.load();
    while (job == last && std::chrono::steady_clock::now() < until) {
      for (int i = 0; i < 32; ++i) relax();
      job = p.job.load();
    }
    if (job == last) {
      p.sleepers.fetch_add(1);
      syscall(SYS_futex, reinterpret_cast<u32*>(&p.job), FUTEX_WAIT_PRIVATE, last, nullptr, nullptr, 0);
      p.sleepers.fetch_sub(1);
      continue;
    }
    last = job;
    work(p, job);
  }
}

}  // namespace

void run_parts(void (*body)(const void*, int, int), const void* context, int parts) {
  Pool& p = pool();
  if (p.owner != getpid()) {  // the first use, or the first in a forked child, which has none of the threads
    p.owner = getpid();
    p.workers = 0;
    p.sleepers = 0;
  }
  for (; p.workers < num_threads - 1; ++p.workers) std::thread(worker).detach();
  const u32 job = p.job.load() + 1;
  p.body = body;
  p.context = context;
  p.left = parts;
  p.ticket = static_cast<u64>(job) << 32 | static_cast<u64>(parts) << 16;
  p.job = job;
  if (p.sleepers.load() != 0)
    syscall(SYS_futex, reinterpret_cast<u32*>(&p.job), FUTEX_WAKE_PRIVATE, num_threads - 1, nullptr, nullptr, 0);
  work(p, job);
  for (int spins = 0; p.left.load() != 0; ++spins) {
    if (spins < 20000)
      relax();
    else
      sched_yield();
  }
}

}  // namespace pc

// `sgemm` is dnnl_sgemm of the oneDNN library that MindSpore ships, or null.
PC_API void pc_init(int threads, void* sgemm) {
  pc::num_threads = threads > 0 ? threads : 1;
  pc::sgemm = reinterpret_cast<pc::Sgemm>(sgemm);
}

PC_API void pc_fix_shares(int shares) { pc::fixed_shares = shares; }
