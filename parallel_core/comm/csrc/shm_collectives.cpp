// The collectives. Lengths are in bytes; every function returns a Status.
#include "shm_reduce.h"

namespace {

using namespace pcs;

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

i64 steps_of(i64 bytes, i64 room) { return (bytes + room - 1) / room; }

// kind of operation, dtype and bytes in one word
u64 make_tag(int kind, int dtype, i64 bytes) {
  return static_cast<u64>(kind) << 56 | static_cast<u64>(dtype) << 48 | static_cast<u64>(bytes);
}

// Gives the sources of rank-ordered reduction: the others' slots, and `own`.
void sources(const Group& g, u32 k, i64 offset, const char* own, const char** from) {
  for (int r = 0; r < g.size; ++r) from[r] = r == g.rank ? own : g.slot(r, k) + offset;
}

}  // namespace

PC_API i64 pcs_segment_bytes(int size) { return slots_offset(size) + static_cast<i64>(size) * kSlots * kSlotBytes; }

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

// Seconds that this rank has waited for others in this group so far.
PC_API double pcs_waited(void* group) { return static_cast<double>(static_cast<Group*>(group)->waited_ns) * 1e-9; }

PC_API int pcs_barrier(void* group, double limit) {
  return static_cast<Group*>(group)->run(
      1, make_tag(0, 0, 0), deadline_after(limit), -1, [](i64, char*) {}, [](i64, u32) {});
}

// x [bytes] becomes its reduction.
PC_API int pcs_all_reduce(void* group, void* x, i64 bytes, int dtype, int item, int op, double limit) {
  Group& g = *static_cast<Group*>(group);
  const i64 deadline = deadline_after(limit), chunks = steps_of(bytes, kSlotBytes);
  const u64 tag = make_tag(1 + op, dtype, bytes);
  std::vector<const char*> from(g.size);
  char* data = static_cast<char*>(x);
  const auto length = [&](i64 i) { return std::min(kSlotBytes, bytes - i * kSlotBytes); };
  const auto put = [&](i64 i, char* slot) { std::memcpy(slot, data + i * kSlotBytes, length(i)); };
  if (g.size <= 3 || bytes <= 8192)
    return g.run(chunks, tag, deadline, -1, put, [&](i64 i, u32 k) {
      char* chunk = data + i * kSlotBytes;
      sources(g, k, 0, chunk, from.data());
      reduce(op, dtype, chunk, from.data(), g.size, length(i));
    });
  // Many ranks: each reduces its share of a chunk, then all collect the shares.
  for (i64 i = 0; i < chunks; ++i) {
    char* chunk = data + i * kSlotBytes;
    const i64 items = length(i) / item;
    const auto begin = [&](int r) { return items * r / g.size * item; };
    const i64 lo = begin(g.rank), hi = begin(g.rank + 1);
    const int first = g.run(1, tag, deadline, -1, [&](i64, char* slot) { put(i, slot); }, [&](i64, u32 k) {
      sources(g, k, lo, chunk + lo, from.data());
      reduce(op, dtype, chunk + lo, from.data(), g.size, hi - lo);
    });
    if (first != kOk) return first;
    const int second = g.run(
        1, tag, deadline, -1, [&](i64, char* slot) { std::memcpy(slot, chunk + lo, hi - lo); }, [&](i64, u32 k) {
          for (int r = 0; r < g.size; ++r)
            if (r != g.rank) std::memcpy(chunk + begin(r), g.slot(r, k), begin(r + 1) - begin(r));
        });
    if (second != kOk) return second;
  }
  return kOk;
}

// x [outer, size, length] -> out [outer, length]: the sum of this rank's parts. Lengths in bytes.
PC_API int pcs_reduce_scatter(void* group, void* x, void* out, i64 outer, i64 length, int dtype, int item,
                              double limit) {
  Group& g = *static_cast<Group*>(group);
  const i64 total = outer * length, room = kSlotBytes / g.size / item * item;
  std::vector<const char*> from(g.size);
  const auto part = [&](int r) { return Part{static_cast<char*>(x) + r * length, length, g.size * length}; };
  const auto end = [&](i64 i) { return std::min((i + 1) * room, total); };
  const auto put = [&](i64 i, char* slot) {
    for (int r = 0; r < g.size; ++r)
      if (r != g.rank) part(r).copy_to(slot + r * room, i * room, end(i));
  };
  return g.run(steps_of(total, room), make_tag(4, dtype, total), deadline_after(limit), -1, put, [&](i64 i, u32 k) {
    part(g.rank).pieces(i * room, end(i), [&](char* own, i64 offset, i64 n) {
      sources(g, k, g.rank * room + offset, own, from.data());
      reduce(0, dtype, static_cast<char*>(out) + i * room + offset, from.data(), g.size, n);
    });
  });
}

// x [outer, length] -> out [outer, size, length]
PC_API int pcs_all_gather(void* group, void* x, void* out, i64 outer, i64 length, int dtype, double limit) {
  Group& g = *static_cast<Group*>(group);
  const i64 total = outer * length;
  const auto part = [&](int r) { return Part{static_cast<char*>(out) + r * length, length, g.size * length}; };
  const auto begin = [&](i64 i) { return i * kSlotBytes; };
  const auto end = [&](i64 i) { return std::min((i + 1) * kSlotBytes, total); };
  const char* own = static_cast<char*>(x);
  const auto put = [&](i64 i, char* slot) { std::memcpy(slot, own + begin(i), end(i) - begin(i)); };
  return g.run(steps_of(total, kSlotBytes), make_tag(5, dtype, total), deadline_after(limit), -1, put,
               [&](i64 i, u32 k) {
                 for (int r = 0; r < g.size; ++r)
                   part(r).copy_from(r == g.rank ? own + begin(i) : g.slot(r, k), begin(i), end(i));
               });
}

// Part r of x [outer, size, length] goes to rank r; the part of rank r arrives in out [outer_to, size, length_to].
PC_API int pcs_all_to_all(void* group, void* x, void* out, i64 outer, i64 length, i64 outer_to, i64 length_to,
                          int dtype, double limit) {
  Group& g = *static_cast<Group*>(group);
  const i64 total = outer * length, room = kSlotBytes / g.size;
  const auto given = [&](int r) { return Part{static_cast<char*>(x) + r * length, length, g.size * length}; };
  const auto got = [&](int r) { return Part{static_cast<char*>(out) + r * length_to, length_to, g.size * length_to}; };
  if (outer_to * length_to != total) return kSystem;
  const auto end = [&](i64 i) { return std::min((i + 1) * room, total); };
  const auto put = [&](i64 i, char* slot) {
    for (int r = 0; r < g.size; ++r) given(r).copy_to(slot + r * room, i * room, end(i));
  };
  return g.run(steps_of(total, room), make_tag(6, dtype, total), deadline_after(limit), -1, put, [&](i64 i, u32 k) {
    for (int r = 0; r < g.size; ++r) got(r).copy_from(g.slot(r, k) + g.rank * room, i * room, end(i));
  });
}

// given[r] bytes of x go to rank r, those for rank 0 first; got[r] bytes of rank r arrive in out. The longest part of all
// ranks has `most` bytes.
PC_API int pcs_all_to_all_rows(void* group, void* x, void* out, const int64_t* given, const int64_t* got, i64 most,
                               int dtype, double limit) {
  Group& g = *static_cast<Group*>(group);
  const i64 room = kSlotBytes / g.size;
  std::vector<char*> from(g.size), to(g.size);
  for (int r = 0; r < g.size; ++r) {
    from[r] = r == 0 ? static_cast<char*>(x) : from[r - 1] + given[r - 1];
    to[r] = r == 0 ? static_cast<char*>(out) : to[r - 1] + got[r - 1];
  }
  if (given[g.rank] != got[g.rank]) return kSystem;
  if (given[g.rank]) std::memcpy(to[g.rank], from[g.rank], given[g.rank]);
  const auto piece = [&](i64 i, i64 length) { return std::min(room, length - i * room); };
  const auto put = [&](i64 i, char* slot) {
    for (int r = 0; r < g.size; ++r)
      if (const i64 n = piece(i, given[r]); n > 0 && r != g.rank) std::memcpy(slot + r * room, from[r] + i * room, n);
  };
  return g.run(steps_of(most, room), make_tag(6, dtype, most), deadline_after(limit), -1, put, [&](i64 i, u32 k) {
    for (int r = 0; r < g.size; ++r)
      if (const i64 n = piece(i, got[r]); n > 0 && r != g.rank)
        std::memcpy(to[r] + i * room, g.slot(r, k) + g.rank * room, n);
  });
}

// The source runs ahead of the others as far as the slots allow.
PC_API int pcs_broadcast(void* group, void* x, i64 bytes, int dtype, int src, double limit) {
  Group& g = *static_cast<Group*>(group);
  char* data = static_cast<char*>(x);
  const auto length = [&](i64 i) { return std::min(kSlotBytes, bytes - i * kSlotBytes); };
  const auto put = [&](i64 i, char* slot) { std::memcpy(slot, data + i * kSlotBytes, length(i)); };
  return g.run(steps_of(bytes, kSlotBytes), make_tag(7 + src, dtype, bytes), deadline_after(limit), src, put,
               [&](i64 i, u32 k) {
                 if (g.rank != src) std::memcpy(data + i * kSlotBytes, g.slot(src, k), length(i));
               });
}
