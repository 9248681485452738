// Collectives and messages between processes of one host, over memory that they all map.
//
// Collectives go in steps. In step k every rank writes its contribution to its slot k % 2, publishes `posted = k + 1`,
// waits until all others have published it, and reads their slots. A rank that has posted step k + 1 has finished
// reading step k, so two slots are enough and no second counter is needed. Reductions add in rank order, so every
// rank gets the same bits in every run.
//
// Messages of each ordered pair of ranks lie in memory that belongs to the sender and grows when the receiver is
// late, so a send returns as soon as it has copied.
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

namespace {

using i64 = int64_t;
using u32 = uint32_t;
using u64 = uint64_t;
using Word = std::atomic<u32>;

constexpr i64 kSlotBytes = 256 << 10;
constexpr u32 kMessages = 1024;
constexpr i64 kPiece = 128 << 10;

enum Status { kOk = 0, kTimeout = 1, kDead = 2, kMismatch = 3, kSystem = 4 };

struct alignas(128) Control {
  Word posted, waiters;
  u64 tag[2];  // what the rank does in the step, to find ranks that have gone separate ways
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

i64 slots_offset(int size) {
  const i64 bytes = static_cast<i64>(size * sizeof(Control)) + static_cast<i64>(size) * size * sizeof(Mailbox);
  return (bytes + 4095) / 4096 * 4096;
}

i64 now_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec * 1000000000LL + t.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

long futex(Word* word, int operation, u32 value, const timespec* timeout) {
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
  i64 spin_ns = 0;
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
  char* slot(int r, u32 k) const { return base + slots_offset(size) + (2 * r + (k & 1)) * kSlotBytes; }

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

  // Ends the writing of step `step` and waits for the others; afterwards their slots can be read.
  int exchange(u64 tag, i64 deadline) {
    Control& mine = control(rank);
    mine.tag[step & 1] = tag;
    publish(mine.posted, mine.waiters, step + 1);
    for (int i = 1; i < size; ++i) {
      const int other = (rank + i) % size;
      Control& theirs = control(other);
      const int status = wait(theirs.posted, theirs.waiters, other, deadline, [&] {
        return static_cast<int32_t>(theirs.posted.load(std::memory_order_acquire) - (step + 1)) >= 0;
      });
      if (status != kOk) return status;
      if (theirs.tag[step & 1] != tag) {
        peer = other;
        detail[0] = theirs.tag[step & 1];
        return kMismatch;
      }
    }
    ++step;
    return kOk;
  }
};

// A tensor of outer rows whose part of `length` bytes per row is meant; consecutive rows lie `stride` bytes apart.
struct Part {
  char* base;
  i64 length, stride;

  // Calls body(address, offset in [begin, end), bytes) for the contiguous pieces of bytes [begin, end) of the part.
  template <class Body>
  void pieces(i64 begin, i64 end, Body body) const {
    for (i64 at = begin; at < end;) {
      const i64 row = at / length, within = at % length, n = std::min(length - within, end - at);
      body(base + row * stride + within, at - begin, n);
      at += n;
    }
  }
  void copy_to(char* to, i64 begin, i64 end) const {
    pieces(begin, end, [&](char* from, i64 offset, i64 n) { std::memcpy(to + offset, from, n); });
  }
  void copy_from(const char* from, i64 begin, i64 end) const {
    pieces(begin, end, [&](char* to, i64 offset, i64 n) { std::memcpy(to, from + offset, n); });
  }
};

struct Half {
  uint16_t bits;
};
struct Brain {
  uint16_t bits;
};

inline float widen(Half h) {
  _Float16 f;
  std::memcpy(&f, &h, 2);
  return static_cast<float>(f);
}
inline float widen(Brain b) {
  const u32 bits = static_cast<u32>(b.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
template <class T>
inline T widen(T x) {
  return x;
}
inline void narrow(float f, Half* out) {
  const _Float16 h = static_cast<_Float16>(f);
  std::memcpy(out, &h, 2);
}
inline void narrow(float f, Brain* out) {
  u32 bits;
  std::memcpy(&bits, &f, 4);
  const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  out->bits = static_cast<uint16_t>(f != f ? 0x7fc0 : rounded);
}
template <class T>
inline void narrow(T x, T* out) {
  *out = x;
}

struct Sum {
  template <class T>
  static T apply(T a, T b) {
    return static_cast<T>(a + b);
  }
};
struct Max {  // NaN wins
  template <class T>
  static T apply(T a, T b) {
    return a != a ? a : (b > a || b != b ? b : a);
  }
};
struct Min {
  template <class T>
  static T apply(T a, T b) {
    return a != a ? a : (b < a || b != b ? b : a);
  }
};

// out[i] = from[0][i] op from[1][i] op ..., 16-bit types accumulated in float32; `out` may be one of `from`.
template <class T, class Op>
void reduce_typed(char* out_bytes, const char* const* from, int count, i64 bytes) {
  using Wide = decltype(widen(T()));
  const i64 n = bytes / static_cast<i64>(sizeof(T));
  T* out = reinterpret_cast<T*>(out_bytes);
  if (count == 2) {
    const T *a = reinterpret_cast<const T*>(from[0]), *b = reinterpret_cast<const T*>(from[1]);
#pragma omp simd
    for (i64 i = 0; i < n; ++i) narrow(Op::apply(widen(a[i]), widen(b[i])), &out[i]);
    return;
  }
  constexpr i64 kBlock = 512;
  Wide total[kBlock];
  for (i64 start = 0; start < n; start += kBlock) {
    const i64 m = std::min(kBlock, n - start);
    for (int r = 0; r < count; ++r) {
      const T* a = reinterpret_cast<const T*>(from[r]) + start;
      if (r == 0)
        for (i64 i = 0; i < m; ++i) total[i] = widen(a[i]);
      else
        for (i64 i = 0; i < m; ++i) total[i] = Op::apply(total[i], widen(a[i]));
    }
    for (i64 i = 0; i < m; ++i) narrow(total[i], &out[start + i]);
  }
}

template <class Op>
void reduce_op(int dtype, char* out, const char* const* from, int count, i64 bytes) {
  switch (dtype) {
    case 0: return reduce_typed<float, Op>(out, from, count, bytes);
    case 1: return reduce_typed<Half, Op>(out, from, count, bytes);
    case 2: return reduce_typed<Brain, Op>(out, from, count, bytes);
    case 3: return reduce_typed<int32_t, Op>(out, from, count, bytes);
    case 4: return reduce_typed<int64_t, Op>(out, from, count, bytes);
    case 5: return reduce_typed<uint8_t, Op>(out, from, count, bytes);
    default: return reduce_typed<double, Op>(out, from, count, bytes);
  }
}

void reduce(int op, int dtype, char* out, const char* const* from, int count, i64 bytes) {
  if (op == 0) return reduce_op<Sum>(dtype, out, from, count, bytes);
  if (op == 1) return reduce_op<Max>(dtype, out, from, count, bytes);
  reduce_op<Min>(dtype, out, from, count, bytes);
}

i64 deadline_after(double seconds) { return now_ns() + static_cast<i64>(seconds * 1e9); }

// kind of operation, dtype and bytes in one word
u64 make_tag(int kind, int dtype, i64 bytes) {
  return static_cast<u64>(kind) << 56 | static_cast<u64>(dtype) << 48 | static_cast<u64>(bytes);
}

// Gives the sources of rank-ordered reduction: the others' slots, and `own`.
void sources(const Group& g, u32 k, i64 offset, const char* own, const char** from) {
  for (int r = 0; r < g.size; ++r) from[r] = r == g.rank ? own : g.slot(r, k) + offset;
}

}  // namespace

PC_API i64 pcs_segment_bytes(int size) { return slots_offset(size) + 2LL * size * kSlotBytes; }

// Maps the segment `fd` (of pcs_segment_bytes, initially zero) and returns the group, or null.
PC_API void* pcs_open(int fd, int rank, int size, const int32_t* pids, double spin_seconds) {
  auto g = std::make_unique<Group>();
  g->rank = rank;
  g->size = size;
  g->spin_ns = static_cast<i64>(spin_seconds * 1e9);
  g->bytes = pcs_segment_bytes(size);
  void* address = mmap(nullptr, g->bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (address == MAP_FAILED) return nullptr;
  g->base = static_cast<char*>(address);
  g->pids.assign(pids, pids + size);
  for (int r = 0; r < size; ++r) {
    const int own = r == rank;
    g->pidfds.push_back(own ? -1 : static_cast<int>(syscall(434 /* pidfd_open */, pids[r], 0)));
    g->outgoing.push_back(std::make_unique<Mapping>());
    g->incoming.push_back(std::make_unique<Mapping>());
  }
  g->pending.resize(size);
  return g.release();
}

PC_API void pcs_close(void* group) { delete static_cast<Group*>(group); }

// After a call that did not return 0: the rank concerned, and two numbers about it.
PC_API void pcs_failure(void* group, int64_t* out) {
  const Group& g = *static_cast<Group*>(group);
  out[0] = g.peer;
  out[1] = static_cast<i64>(g.detail[0]);
  out[2] = static_cast<i64>(g.detail[1]);
}

PC_API int pcs_barrier(void* group, double limit) {
  return static_cast<Group*>(group)->exchange(make_tag(0, 0, 0), deadline_after(limit));
}

// x [bytes] becomes its reduction.
PC_API int pcs_all_reduce(void* group, void* x, i64 bytes, int dtype, int item, int op, double limit) {
  Group& g = *static_cast<Group*>(group);
  const i64 deadline = deadline_after(limit);
  const u64 tag = make_tag(1 + op, dtype, bytes);
  std::vector<const char*> from(g.size);
  for (i64 at = 0; at < bytes; at += kSlotBytes) {
    char* chunk = static_cast<char*>(x) + at;
    const i64 n = std::min(kSlotBytes, bytes - at);
    const u32 k = g.step;
    std::memcpy(g.slot(g.rank, k), chunk, n);
    if (const int status = g.exchange(tag, deadline)) return status;
    if (g.size <= 3 || n <= 8192) {
      sources(g, k, 0, chunk, from.data());
      reduce(op, dtype, chunk, from.data(), g.size, n);
      continue;
    }
    // Many ranks: each reduces its share of the chunk, then all collect the shares.
    const i64 items = n / item;
    const auto begin = [&](int r) { return items * r / g.size * item; };
    const i64 lo = begin(g.rank), hi = begin(g.rank + 1);
    sources(g, k, lo, chunk + lo, from.data());
    char* share = g.slot(g.rank, k + 1);
    reduce(op, dtype, share, from.data(), g.size, hi - lo);
    if (const int status = g.exchange(tag, deadline)) return status;
    for (int r = 0; r < g.size; ++r) std::memcpy(chunk + begin(r), g.slot(r, k + 1), begin(r + 1) - begin(r));
  }
  return kOk;
}

// x [outer, size, length] -> out [outer, length]: the sum of this rank's parts. Lengths in bytes.
PC_API int pcs_reduce_scatter(void* group, void* x, void* out, i64 outer, i64 length, int dtype, int item,
                              double limit) {
  Group& g = *static_cast<Group*>(group);
  const i64 deadline = deadline_after(limit), total = outer * length;
  const i64 room = kSlotBytes / g.size / item * item;
  const u64 tag = make_tag(4, dtype, total);
  std::vector<const char*> from(g.size);
  const auto part = [&](int r) { return Part{static_cast<char*>(x) + r * length, length, g.size * length}; };
  for (i64 at = 0; at < total; at += room) {
    const i64 end = std::min(at + room, total);
    const u32 k = g.step;
    for (int r = 0; r < g.size; ++r)
      if (r != g.rank) part(r).copy_to(g.slot(g.rank, k) + r * room, at, end);
    if (const int status = g.exchange(tag, deadline)) return status;
    part(g.rank).pieces(at, end, [&](char* own, i64 offset, i64 n) {
      sources(g, k, g.rank * room + offset, own, from.data());
      reduce(0, dtype, static_cast<char*>(out) + at + offset, from.data(), g.size, n);
    });
  }
  return kOk;
}

// x [outer, length] -> out [outer, size, length]
PC_API int pcs_all_gather(void* group, void* x, void* out, i64 outer, i64 length, int dtype, double limit) {
  Group& g = *static_cast<Group*>(group);
  const i64 deadline = deadline_after(limit), total = outer * length;
  const u64 tag = make_tag(5, dtype, total);
  const auto part = [&](int r) { return Part{static_cast<char*>(out) + r * length, length, g.size * length}; };
  for (i64 at = 0; at < total; at += kSlotBytes) {
    const i64 end = std::min(at + kSlotBytes, total);
    const u32 k = g.step;
    const char* own = static_cast<char*>(x) + at;
    std::memcpy(g.slot(g.rank, k), own, end - at);
    if (const int status = g.exchange(tag, deadline)) return status;
    for (int r = 0; r < g.size; ++r) part(r).copy_from(r == g.rank ? own : g.slot(r, k), at, end);
  }
  return kOk;
}

// Part r of x [outer, size, length] goes to rank r; the part of rank r arrives in out [outer_to, size, length_to].
PC_API int pcs_all_to_all(void* group, void* x, void* out, i64 outer, i64 length, i64 outer_to, i64 length_to,
                          int dtype, double limit) {
  Group& g = *static_cast<Group*>(group);
  const i64 deadline = deadline_after(limit), total = outer * length, room = kSlotBytes / g.size;
  const u64 tag = make_tag(6, dtype, total);
  const auto given = [&](int r) { return Part{static_cast<char*>(x) + r * length, length, g.size * length}; };
  const auto got = [&](int r) { return Part{static_cast<char*>(out) + r * length_to, length_to, g.size * length_to}; };
  if (outer_to * length_to != total) return kSystem;
  for (i64 at = 0; at < total; at += room) {
    const i64 end = std::min(at + room, total);
    const u32 k = g.step;
    for (int r = 0; r < g.size; ++r) given(r).copy_to(g.slot(g.rank, k) + r * room, at, end);
    if (const int status = g.exchange(tag, deadline)) return status;
    for (int r = 0; r < g.size; ++r) got(r).copy_from(g.slot(r, k) + g.rank * room, at, end);
  }
  return kOk;
}

PC_API int pcs_broadcast(void* group, void* x, i64 bytes, int dtype, int src, double limit) {
  Group& g = *static_cast<Group*>(group);
  const i64 deadline = deadline_after(limit);
  const u64 tag = make_tag(7 + src, dtype, bytes);
  for (i64 at = 0; at < bytes; at += kSlotBytes) {
    char* chunk = static_cast<char*>(x) + at;
    const i64 n = std::min(kSlotBytes, bytes - at);
    const u32 k = g.step;
    if (g.rank == src) std::memcpy(g.slot(src, k), chunk, n);
    if (const int status = g.exchange(tag, deadline)) return status;
    if (g.rank != src) std::memcpy(chunk, g.slot(src, k), n);
  }
  return kOk;
}

namespace {

// Finds room for `bytes` between the messages that have not been taken yet, or behind them.
int reserve(Group& g, int to, u64 bytes, u64* offset) {
  Mailbox& box = g.mailbox(g.rank, to);
  auto& pending = g.pending[to];
  const u32 taken = box.taken.load(std::memory_order_acquire);
  pending.erase(std::remove_if(pending.begin(), pending.end(),
                               [&](const Pending& p) { return static_cast<int32_t>(taken - p.number) > 0; }),
                pending.end());
  std::vector<Pending> sorted = pending;
  std::sort(sorted.begin(), sorted.end(), [](const Pending& a, const Pending& b) { return a.offset < b.offset; });
  u64 at = 0;
  for (const Pending& p : sorted) {
    if (p.offset >= at + bytes) break;
    at = p.offset + p.bytes;
  }
  *offset = at;
  Mapping& memory = *g.outgoing[to];
  if (at + bytes <= memory.bytes) return kOk;
  if (memory.fd < 0) {
    memory.fd = static_cast<int>(syscall(SYS_memfd_create, "parallel_core-messages", 1u /* close on exec */));
    if (memory.fd < 0) return kSystem;
  }
  u64 capacity = 1 << 20;
  while (capacity < at + bytes) capacity *= 2;
  if (ftruncate(memory.fd, static_cast<off_t>(capacity)) != 0 || !memory.map(capacity)) return kSystem;
  box.fd = memory.fd;
  box.capacity = capacity;  // published with the message's number
  return kOk;
}

}  // namespace

// Copies the message and returns; waits only if 1024 messages to that rank have not been received yet.
PC_API int pcs_send(void* group, const void* x, i64 bytes, int dtype, int to, double limit) {
  Group& g = *static_cast<Group*>(group);
  Mailbox& box = g.mailbox(g.rank, to);
  const u32 number = box.sent.load(std::memory_order_relaxed);
  const int status = g.wait(box.taken, box.taken_waiters, to, deadline_after(limit),
                            [&] { return number - box.taken.load(std::memory_order_acquire) < kMessages; });
  if (status != kOk) return status;
  u64 offset = 0;
  if (const int failed = reserve(g, to, bytes, &offset)) {
    g.peer = to;
    g.detail[0] = static_cast<u64>(errno);
    return failed;
  }
  g.pending[to].push_back({offset, static_cast<u64>(bytes), number});
  const u64 before = box.written.load(std::memory_order_relaxed);
  box.ring[number % kMessages] = {offset, static_cast<u64>(bytes), static_cast<u64>(dtype), before + bytes};
  // A long message is announced first, so that the receiver copies the beginning while the end is being written.
  if (bytes > kPiece) Group::publish(box.sent, box.sent_waiters, number + 1);
  char* to_memory = g.outgoing[to]->data + offset;
  for (i64 at = 0; at < bytes; at += kPiece) {
    const i64 n = std::min(kPiece, bytes - at);
    std::memcpy(to_memory + at, static_cast<const char*>(x) + at, n);
    box.written.store(before + at + n, std::memory_order_release);
  }
  if (bytes <= kPiece) Group::publish(box.sent, box.sent_waiters, number + 1);
  return kOk;
}

// Waits for the next message from `source`, which must have `bytes` bytes of `dtype`, and copies it out.
PC_API int pcs_receive(void* group, void* x, i64 bytes, int dtype, int source, double limit) {
  Group& g = *static_cast<Group*>(group);
  const i64 deadline = deadline_after(limit);
  Mailbox& box = g.mailbox(source, g.rank);
  const u32 number = box.taken.load(std::memory_order_relaxed);
  const auto arrived = [&] { return box.sent.load(std::memory_order_acquire) != number; };
  if (const int status = g.wait(box.sent, box.sent_waiters, source, deadline, arrived)) return status;
  const Message message = box.ring[number % kMessages];
  g.peer = source;
  if (message.bytes != static_cast<u64>(bytes) || message.tag != static_cast<u64>(dtype)) {
    g.detail[0] = message.bytes;
    g.detail[1] = message.tag;
    return kMismatch;
  }
  Mapping& memory = *g.incoming[source];
  if (memory.fd < 0 && bytes > 0) {
    char path[64];
    std::snprintf(path, sizeof(path), "/proc/%d/fd/%d", g.pids[source], box.fd);
    memory.fd = open(path, O_RDWR | O_CLOEXEC);
    if (memory.fd < 0) {
      g.detail[0] = static_cast<u64>(errno);
      return g.alive(source) ? kSystem : kDead;
    }
  }
  if (message.offset + bytes > memory.bytes && !memory.map(box.capacity)) {
    g.detail[0] = static_cast<u64>(errno);
    return kSystem;
  }
  const u64 before = message.end - bytes;
  for (i64 at = 0; at < bytes; at += kPiece) {
    const i64 n = std::min(kPiece, bytes - at);
    i64 looked = now_ns();
    while (static_cast<i64>(box.written.load(std::memory_order_acquire) - before) < at + n) {
      sched_yield();  // the sender is copying right now
      if (now_ns() - looked < 100000000) continue;
      looked = now_ns();
      if (!g.alive(source)) return kDead;
      if (looked > deadline) return kTimeout;
    }
    std::memcpy(static_cast<char*>(x) + at, memory.data + message.offset + at, n);
  }
  Group::publish(box.taken, box.taken_waiters, number + 1);
  return kOk;
}
