// Collectives and messages between processes of one host, over memory that they all map.
//
// Collectives go in steps, one for each chunk of a slot's size. In step k every rank writes its contribution to its slot
// k % kSlots and publishes `posted = k + 1`; whoever has read what it needs of step k publishes `done = k + 1`. A rank
// may be kSlots steps ahead of the slowest reader, so one that is off its core for a while does not stop the others
// at once. Reductions add in rank order, so every rank gets the same bits in every run.
//
// Messages of each ordered pair of ranks lie in memory that belongs to the sender and grows when the receiver is
// late, so a send returns as soon as it has copied.
#pragma once

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#define PC_API extern "C" __attribute__((visibility("default")))

namespace pcs {

using i64 = int64_t;
using u32 = uint32_t;
using u64 = uint64_t;
using Word = std::atomic<u32>;

constexpr i64 kSlotBytes = 256 << 10;
constexpr u32 kSlots = 16;
constexpr u32 kMessages = 1024;
constexpr i64 kPiece = 128 << 10;

enum Status { kOk = 0, kTimeout = 1, kDead = 2, kMismatch = 3, kSystem = 4 };

struct alignas(128) Control {
  Word posted, posted_waiters;
  u64 tag[kSlots];  // what the rank does in the step, to find ranks that have gone separate ways
  alignas(128) Word done, done_waiters;
};

struct Message {
  u64 offset, bytes, tag, end;  // end: value of `written` when the message is complete
};

struct alignas(128) Mailbox {
  Word sent, sent_waiters;
  alignas(128) Word taken, taken_waiters;
  alignas(128) std::atomic<u64> written;
  int fd;
  u64 capacity;
  Message ring[kMessages];
};

inline i64 slots_offset(int size) {
  const i64 bytes = static_cast<i64>(size * sizeof(Control)) + static_cast<i64>(size) * size * sizeof(Mailbox);
  return (bytes + 4095) / 4096 * 4096;
}

inline i64 now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline long futex(Word* word, int operation, u32 value, const timespec* timeout) {
  return syscall(SYS_futex, reinterpret_cast<u32*>(word), operation, value, timeout, nullptr, 0);
}

// A mapping of another process's growing memory.
struct Mapping {
  char* data = nullptr;
  u64 bytes = 0;
  int fd = -1;

  Mapping() = default;
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() {
    if (data) munmap(data, bytes);
    if (fd >= 0) close(fd);
  }
  bool map(u64 wanted) {
    void* address = data ? mremap(data, bytes, wanted, MREMAP_MAYMOVE)
                         : mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (address == MAP_FAILED) return false;
    data = static_cast<char*>(address);
    bytes = wanted;
    return true;
  }
};

struct Pending {
  u64 offset, bytes;
  u32 number;
};

struct Group {
  int rank = 0, size = 0;
  char* base = nullptr;
  i64 bytes = 0;
  u32 step = 0;
  i64 spin_ns = 0, waited_ns = 0;
  std::vector<int> pids, pidfds;
  std::vector<std::unique_ptr<Mapping>> outgoing, incoming;
  std::vector<std::vector<Pending>> pending;
  // The outcome of the last failed call.
  int peer = -1;
  u64 detail[2] = {0, 0};

  ~Group() {
    if (base) munmap(base, bytes);
    for (int fd : pidfds)
      if (fd >= 0) close(fd);
  }

  Control& control(int r) const { return reinterpret_cast<Control*>(base)[r]; }
  Mailbox& mailbox(int from, int to) const {
    return reinterpret_cast<Mailbox*>(base + size * sizeof(Control))[from * size + to];
  }
  char* slot(int r, u32 k) const { return base + slots_offset(size) + (r * kSlots + k % kSlots) * kSlotBytes; }

  bool alive(int r) const {
    if (pidfds[r] >= 0) {
      pollfd p{pidfds[r], POLLIN, 0};
      return poll(&p, 1, 0) == 0;
    }
    return kill(pids[r], 0) == 0 || errno != ESRCH;
  }

  // Waits until ready() holds: spins, then yields, then sleeps on `word` and looks now and then whether `other` lives.
  template <class Ready>
  int wait(Word& word, Word& waiters, int other, i64 deadline, Ready ready) {
    for (int i = 0; i < 200; ++i) {
      if (ready()) return kOk;
      relax();
    }
    const i64 start = now_ns();
    const int status = wait_long(word, waiters, other, deadline, start, ready);
    waited_ns += now_ns() - start;
    return status;
  }

  template <class Ready>
  int wait_long(Word& word, Word& waiters, int other, i64 deadline, i64 start, Ready ready) {
    while (now_ns() - start < spin_ns) {
      for (int i = 0; i < 64; ++i) {
        if (ready()) return kOk;
        relax();
      }
      sched_yield();
    }
    waiters.fetch_add(1);
    int status = kOk;
    i64 looked = now_ns();
    while (true) {
      const u32 seen = word.load();
      if (ready()) break;
      const i64 now = now_ns();
      if (now >= deadline) {
        status = kTimeout;
        break;
      }
      if (now - looked > 100000000) {
        looked = now;
        if (!alive(other)) {
          status = ready() ? kOk : kDead;
          break;
        }
      }
      const i64 left = std::min<i64>(deadline - now, 100000000);
      const timespec timeout{left / 1000000000, left % 1000000000};
      futex(&word, FUTEX_WAIT, seen, &timeout);
    }
    waiters.fetch_sub(1);
    if (status != kOk) peer = other;
    return status;
  }

  static void publish(Word& word, Word& waiters, u32 value) {
    word.store(value);
    if (waiters.load() != 0) futex(&word, FUTEX_WAKE, 1 << 30, nullptr);
  }

  // Waits until the slot of step k is free: every rank has read what it held before.
  int reserve(u32 k, i64 deadline) {
    for (int i = 1; i < size; ++i) {
      const int other = (rank + i) % size;
      Control& theirs = control(other);
      const int status = wait(theirs.done, theirs.done_waiters, other, deadline, [&] {
        return static_cast<int32_t>(k - theirs.done.load(std::memory_order_acquire)) < static_cast<int32_t>(kSlots);
      });
      if (status != kOk) return status;
    }
    return kOk;
  }

  // Says that this rank's slot of step k is written.
  void post(u32 k, u64 tag) {
    Control& mine = control(rank);
    mine.tag[k % kSlots] = tag;
    publish(mine.posted, mine.posted_waiters, k + 1);
  }

  // Waits until rank `other` has written its slot of step k.
  int arrive(int other, u32 k, u64 tag, i64 deadline) {
    Control& theirs = control(other);
    const int status = wait(theirs.posted, theirs.posted_waiters, other, deadline, [&] {
      return static_cast<int32_t>(theirs.posted.load(std::memory_order_acquire) - (k + 1)) >= 0;
    });
    if (status == kOk && theirs.tag[k % kSlots] != tag) {
      peer = other;
      detail[0] = theirs.tag[k % kSlots];
      return kMismatch;
    }
    return status;
  }

  int arrive_all(u32 k, u64 tag, i64 deadline) {
    for (int i = 1; i < size; ++i)
      if (const int status = arrive((rank + i) % size, k, tag, deadline)) return status;
    return kOk;
  }

  // Says that this rank has read all it needs of step k.
  void finish(u32 k) {
    Control& mine = control(rank);
    publish(mine.done, mine.done_waiters, k + 1);
  }

  // Runs `steps` steps: put(i, slot) fills this rank's slot of step i, take(i, k) uses the slots of step k. Writing
  // runs ahead of reading by as many steps as there are slots. Only the slots of `source` are waited for, if >= 0.
  template <class Put, class Take>
  int run(i64 steps, u64 tag, i64 deadline, int source, Put put, Take take) {
    i64 written = 0;
    for (i64 i = 0; i < steps; ++i) {
      for (; written < std::min<i64>(steps, i + kSlots); ++written) {
        const u32 k = step + static_cast<u32>(written);
        if (const int status = reserve(k, deadline)) return status;
        if (source < 0 || source == rank) put(written, slot(rank, k));
        post(k, tag);
      }
      const u32 k = step + static_cast<u32>(i);
      if (source < 0) {
        if (const int status = arrive_all(k, tag, deadline)) return status;
      } else if (source != rank) {
        if (const int status = arrive(source, k, tag, deadline)) return status;
      }
      take(i, k);
      finish(k);
    }
    step += static_cast<u32>(steps);
    return kOk;
  }
};

inline i64 deadline_after(double seconds) { return now_ns() + static_cast<i64>(seconds * 1e9); }

}  // namespace pcs
