// The part of oneDNN's C interface (version 3) that a matrix product needs; MindSpore ships the library, not its headers.
#include "matmul.h"

#include <dlfcn.h>

#include <array>
#include <map>
#include <vector>

namespace pc {

bool bf16_products = false, float32_products = false;

namespace {

using Handle = void*;
struct Argument {
  int index;
  Handle memory;
};

constexpr int kCpu = 1, kBf16 = 2, kF32 = 3;                  // dnnl_cpu, dnnl_bf16, dnnl_f32
constexpr int kSource = 1, kDestination = 17, kWeights = 33;  // DNNL_ARG_...

struct Library {
  int (*engine_create)(Handle*, int, size_t);
  int (*stream_create)(Handle*, Handle, unsigned);
  int (*desc_create)(Handle*, int, const i64*, int, const i64*);
  int (*desc_destroy)(Handle);
  int (*memory_create)(Handle*, Handle, Handle, void*);
  int (*memory_destroy)(Handle);
  int (*set_data)(Handle, void*);
  int (*attr_create)(Handle*);
  int (*attr_destroy)(Handle);
  int (*attr_set_post_ops)(Handle, Handle);
  int (*post_ops_create)(Handle*);
  int (*post_ops_destroy)(Handle);
  int (*append_sum)(Handle, float, int, int);
  int (*matmul_create)(Handle*, Handle, Handle, Handle, Handle, Handle, Handle);
  int (*primitive_desc_destroy)(Handle);
  int (*primitive_create)(Handle*, Handle);
  int (*primitive_destroy)(Handle);
  int (*execute)(Handle, Handle, int, const Argument*);
  Handle engine;

  bool open(const char* path) {
    Handle library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return false;
    bool found = true;
    auto load = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      found = found && function != nullptr;
    };
    load(engine_create, "dnnl_engine_create");
    load(stream_create, "dnnl_stream_create");
    load(desc_create, "dnnl_memory_desc_create_with_strides");
    load(desc_destroy, "dnnl_memory_desc_destroy");
    load(memory_create, "dnnl_memory_create");
    load(memory_destroy, "dnnl_memory_destroy");
    load(set_data, "dnnl_memory_set_data_handle");
    load(attr_create, "dnnl_primitive_attr_create");
    load(attr_destroy, "dnnl_primitive_attr_destroy");
    load(attr_set_post_ops, "dnnl_primitive_attr_set_post_ops");
    load(post_ops_create, "dnnl_post_ops_create");
    load(post_ops_destroy, "dnnl_post_ops_destroy");
    load(append_sum, "dnnl_post_ops_append_sum");
    load(matmul_create, "dnnl_matmul_primitive_desc_create");
    load(primitive_desc_destroy, "dnnl_primitive_desc_destroy");
    load(primitive_create, "dnnl_primitive_create");
    load(primitive_destroy, "dnnl_primitive_destroy");
    load(execute, "dnnl_primitive_execute");
    return found && engine_create(&engine, kCpu, 0) == 0;
  }
};

Library dnnl;

struct Matmul {
  Handle primitive = nullptr, a = nullptr, b = nullptr, c = nullptr;

  // Kind of the operands, sizes M, N, K, strides of A, of B, of C's rows, and whether C is added to.
  using Key = std::array<i64, 10>;

  bool make(const Key& key) {
    const auto [kind, M, N, K, a_row, a_col, b_row, b_col, c_row, add] = key;
    const i64 shapes[3][2] = {{M, K}, {K, N}, {M, N}}, strides[3][2] = {{a_row, a_col}, {b_row, b_col}, {c_row, 1}};
    const int type = kind == kBfloat16 ? kBf16 : kF32, types[3] = {type, type, kF32};
    Handle descs[3] = {}, attributes = nullptr, post = nullptr, operation = nullptr;
    bool made = dnnl.attr_create(&attributes) == 0;
    if (made && add) {
      made = dnnl.post_ops_create(&post) == 0 && dnnl.append_sum(post, 1.0f, 0, 0) == 0 &&
             dnnl.attr_set_post_ops(attributes, post) == 0;
    }
    for (int i = 0; i < 3 && made; ++i) made = dnnl.desc_create(&descs[i], 2, shapes[i], types[i], strides[i]) == 0;
    made = made && dnnl.matmul_create(&operation, dnnl.engine, descs[0], descs[1], nullptr, descs[2], attributes) == 0 &&
           dnnl.primitive_create(&primitive, operation) == 0;
    Handle* memories[3] = {&a, &b, &c};
    for (int i = 0; i < 3 && made; ++i) made = dnnl.memory_create(memories[i], descs[i], dnnl.engine, nullptr) == 0;
    if (operation) dnnl.primitive_desc_destroy(operation);
    for (Handle desc : descs)
      if (desc) dnnl.desc_destroy(desc);
    if (post) dnnl.post_ops_destroy(post);
    if (attributes) dnnl.attr_destroy(attributes);
    return made;
  }

  void destroy() {
    for (Handle memory : {a, b, c})
      if (memory) dnnl.memory_destroy(memory);
    if (primitive) dnnl.primitive_destroy(primitive);
  }
};

// What one part of a job uses; parts run at the same time, and a primitive's memory objects belong to one call.
struct Part {
  Handle stream = nullptr;
  std::map<Matmul::Key, Matmul> known;

  bool run(const Matmul::Key& key, const void* A, const void* B, float* C) {
    constexpr size_t kMostKept = 512;  // sequences of every length would make one primitive each
    if (known.size() >= kMostKept && known.find(key) == known.end()) {
      for (auto& entry : known) entry.second.destroy();
      known.clear();
    }
    Matmul& matmul = known[key];
    if (stream == nullptr && dnnl.stream_create(&stream, dnnl.engine, 1) != 0) return false;
    if (matmul.c == nullptr && !matmul.make(key)) return false;
    dnnl.set_data(matmul.a, const_cast<void*>(A));
    dnnl.set_data(matmul.b, const_cast<void*>(B));
    dnnl.set_data(matmul.c, C);
    const Argument arguments[3] = {{kSource, matmul.a}, {kWeights, matmul.b}, {kDestination, matmul.c}};
    return dnnl.execute(matmul.primitive, stream, 3, arguments) == 0;
  }
};

std::vector<Part> state;

}  // namespace

void primitive_product(Kind kind, i64 M, i64 N, i64 K, Strided A, Strided B, float* C, bool add, const float* wide) {
  const bool rows = M >= N;
  const auto round = [&](i64 first, i64 last) {
    uint16_t* to = static_cast<uint16_t*>(const_cast<void*>(A.data));
    narrow(wide + first * K, to + first * K, kBfloat16, (last - first) * K);
  };
  if (wide != nullptr && !rows) {
    parallel(M * K, [&](int part, int parts) {
      const Range r = share(M, part, parts);
      round(r.begin, r.end);
    }, kPieces);
  }
  if (static_cast<int>(state.size()) < shares()) state.resize(static_cast<size_t>(shares()));
  parallel(M * N * K / 64, [&](int part, int parts) {
    const Range r = share(rows ? M : N, part, parts);
    const i64 n = r.end - r.begin;
    if (n == 0) return;
    if (wide != nullptr && rows) round(r.begin, r.end);
    const Matmul::Key key = {kind, rows ? n : M, rows ? N : n, K, A.row, A.column, B.row, B.column, N, add};
    const bool done = state[static_cast<size_t>(part)].run(key, rows ? at(A.data, kind, r.begin * A.row) : A.data,
                                                           rows ? B.data : at(B.data, kind, r.begin * B.column),
                                                           C + r.begin * (rows ? N : 1));
    if (!done) __builtin_trap();  // `pc_open_onednn` has run one of the kind: only memory can lack
  });
}

namespace {

// Returns whether [1 2; 3 4] times itself, added to ones, is what it should be.
bool multiplies(Kind kind) {
  const float numbers[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  float operand[4], square[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  narrow(numbers, operand, kind, 4);
  Part part;
  return part.run({kind, 2, 2, 2, 2, 1, 2, 1, 2, 1}, operand, operand, square) && square[0] == 8.0f &&
         square[1] == 11.0f && square[2] == 16.0f && square[3] == 23.0f;
}

}  // namespace

}  // namespace pc

// Returns whether the library at `path` has the primitive, and it multiplies numbers of `kind` as it should. From then
// on it takes float32 products that sgemm is slow at.
PC_API int pc_open_onednn(const char* path, int kind) {
  static const bool opened = pc::dnnl.open(path);
  pc::float32_products = opened && pc::multiplies(pc::kFloat32);
  return pc::float32_products && (kind == pc::kFloat32 || pc::multiplies(pc::kBfloat16));
}

// Returns what was set before.
PC_API int pc_use_bf16_products(int use) {
  const bool before = pc::bf16_products;
  pc::bf16_products = use != 0;
  return before;
}
