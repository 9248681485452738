// Messages between two ranks.
#include "shm.h"

namespace {

using namespace pcs;

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
