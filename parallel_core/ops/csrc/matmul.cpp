// The part of oneDNN's C interface (version 3) that a matrix product needs; MindSpore ships the library, not its headers.
#include "matmul.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <vector>

namespace pc {

bool bf16_products = false, float32_products = false, products_with[3] = {};
bool has_gemm_of_bf16 = false;

namespace {

using Handle = void*;
struct Argument {
  int index;
  Handle memory;
};

constexpr int kCpu = 1, kTypes[3] = {3, 2, 1};               // dnnl_cpu; dnnl_f32, dnnl_bf16, dnnl_f16, by kind
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
  int (*gemm_bf16)(char, char, i64, i64, i64, float, const void*, i64, const void*, i64, float, float*, i64);
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
    gemm_bf16 = reinterpret_cast<decltype(gemm_bf16)>(dlsym(library, "dnnl_gemm_bf16bf16f32"));
    has_gemm_of_bf16 = gemm_bf16 != nullptr;
    return found && engine_create(&engine, kCpu, 0) == 0;
  }
};

Library dnnl;

struct Matmul {
  Handle primitive = nullptr, a = nullptr, b = nullptr, c = nullptr;

  // Kinds of A and B, sizes M, N, K, strides of A, of B, of C's rows, and whether C is added to.
  using Key = std::array<i64, 11>;

  bool make(const Key& key) {
    const auto [a_kind, b_kind, M, N, K, a_row, a_col, b_row, b_col, c_row, add] = key;
    const i64 shapes[3][2] = {{M, K}, {K, N}, {M, N}}, strides[3][2] = {{a_row, a_col}, {b_row, b_col}, {c_row, 1}};
    const int types[3] = {kTypes[a_kind], kTypes[b_kind], kTypes[kFloat32]};
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

// Whether a product of bfloat16 numbers is faster by oneDNN's gemm than by its primitive, by 2 to 20 parts of a hundred:
// it copies both matrices in the order in which it multiplies them, which pays where the lines of A stand apart, and
// where B is more than a core's own cache holds beside the rest, unless its lines are long and stand apart.
bool gemm_is_faster(i64 N, i64 K, Strided A, Strided B) {
#if defined(__AMX_BF16__)
  return false;  // another kernel, which nobody has compared
#else
  const bool is_large = K * N >= 1 << 19, has_far_lines = B.column != 1 && K > N;
  return has_gemm_of_bf16 && (A.column != 1 || (is_large && !has_far_lines));
#endif
}

}  // namespace

void gemm_of_bf16(bool ta, bool tb, i64 M, i64 N, i64 K, const void* A, i64 lda, const void* B, i64 ldb, bool add,
                  float* C, i64 ldc) {
  // Of a matrix of one row any step between rows is right, such as 1; gemm wants at least a row's length.
  lda = std::max(lda, ta ? M : K);
  ldb = std::max(ldb, tb ? K : N);
  const int status = dnnl.gemm_bf16(ta ? 'T' : 'N', tb ? 'T' : 'N', M, N, K, 1.0f, A, lda, B, ldb, add ? 1.0f : 0.0f, C,
                                    ldc);
  if (status != 0) __builtin_trap();  // only memory can lack, as below
}

void onednn_product(i64 M, i64 N, i64 K, Strided A, Strided B, Target C, const float* wide) {
  const bool rows = M >= N, by_gemm = A.kind == kBfloat16 && B.kind == kBfloat16 && gemm_is_faster(N, K, A, B);
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
  by_blocks(M, N, K, C, [&](int part, i64 i, i64 j, i64 m, i64 n, float* c, i64 row, bool add) {
    if (wide != nullptr && rows) round(i, i + m);
    const void *a = at(A.data, A.kind, i * A.row), *b = at(B.data, B.kind, j * B.column);
    if (by_gemm) {
      const bool ta = A.column != 1, tb = B.column != 1;
      return gemm_of_bf16(ta, tb, m, n, K, a, ta ? A.column : A.row, b, tb ? B.column : B.row, add, c, row);
    }
    const Matmul::Key key = {A.kind, B.kind, m, n, K, A.row, A.column, B.row, B.column, row, add};
    // `pc_open_onednn` has run one of the kinds: only memory can lack.
    if (!state[static_cast<size_t>(part)].run(key, a, b, c)) __builtin_trap();
  });
}

namespace {

// Returns whether [1 2; 3 4] times itself, added to ones, is what it should be.
bool multiplies(Kind a_kind, Kind b_kind) {
  const float numbers[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  float a[4], b[4], square[4] = {1.0f, 1.0f, 1.0f, 1.0f};
  narrow(numbers, a, a_kind, 4);
  narrow(numbers, b, b_kind, 4);
  Part part;
  return part.run({a_kind, b_kind, 2, 2, 2, 2, 1, 2, 1, 2, 1}, a, b, square) && square[0] == 8.0f &&
         square[1] == 11.0f && square[2] == 16.0f && square[3] == 23.0f;
}

}  // namespace

}  // namespace pc

// Returns whether the library at `path` has the primitive, and it multiplies numbers of `kind` as it should. From then
// on it takes float32 products that sgemm is slow at, and those with weights of 16 bits.
PC_API int pc_open_onednn(const char* path, int kind) {
  static const bool opened = pc::dnnl.open(path);
  pc::float32_products = opened && pc::multiplies(pc::kFloat32, pc::kFloat32);
#if defined(__AVX512F__)  // elsewhere the library may do it number by number
  for (const pc::Kind narrow : {pc::kBfloat16, pc::kFloat16})
    pc::products_with[narrow] = pc::float32_products && pc::multiplies(pc::kFloat32, narrow);
#endif
  return pc::float32_products && (kind == pc::kFloat32 || pc::multiplies(pc::kBfloat16, pc::kBfloat16));
}

// Returns what was set before.
PC_API int pc_use_bf16_products(int use) {
  const bool before = pc::bf16_products;
  pc::bf16_products = use != 0;
  return before;
}
