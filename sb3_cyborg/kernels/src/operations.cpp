// Operations on tensors of any strides, and the replay of recorded calls: see recording.py. Compiled once for each instruction set.
//
// An operation takes a description, which the recorder has made, and the addresses of its operands. Rows of floats are computed
// with vectors. Operands of other types are small; their elements are computed one by one, in double precision.

#include "kernels.h"
#include "thunk.h"
#include "vectors.h"

namespace {

constexpr int DIMS = 6;

enum Type { FLOAT, INT64, BOOL, DOUBLE, UINT8, INT32 };

struct Operand {
  int64_t type, strides[DIMS];  // in elements
};

// Sizes of an operation by element; the last dimension is the inner loop.
struct Elementwise {
  int64_t operation, dims, shape[DIMS];
  Operand out, in[3];
};

enum Operation {
  COPY, NEGATIVE, EXP, LOG, LOG1P, SQRT, RSQRT, RECIPROCAL, SQUARE, SIN, COS, OP_TANH, SIGMOID, OP_SILU, SOFTPLUS, OP_RELU, ABS, NOT,
  ADD, SUB, MUL, DIV, MAXIMUM, MINIMUM, EQ, NE, LT, LE, GT, GE, AND, OR,
  WHERE, ADDCMUL, CLAMP, LERP,
};

inline int64_t bytes_of(int64_t type) {
  switch (type) {
    case INT64: case DOUBLE: return 8;
    case BOOL: case UINT8: return 1;
    default: return 4;
  }
}

inline double load_any(const char* p, int64_t type) {
  switch (type) {
    case FLOAT: { float x; std::memcpy(&x, p, 4); return x; }
    case INT64: { int64_t x; std::memcpy(&x, p, 8); return static_cast<double>(x); }
    case DOUBLE: { double x; std::memcpy(&x, p, 8); return x; }
    case INT32: { int32_t x; std::memcpy(&x, p, 4); return x; }
    default: return static_cast<double>(*reinterpret_cast<const uint8_t*>(p));
  }
}
// A whole number within [low, high]; the lower bound for NaN and for numbers that are out of it.
inline int64_t whole(double value, double low, double high) {
  return static_cast<int64_t>(value >= low && value <= high ? value : low);
}
inline void store_any(char* p, int64_t type, double value) {
  switch (type) {
    case FLOAT: { const float x = static_cast<float>(value); std::memcpy(p, &x, 4); return; }
    case INT64: { const int64_t x = whole(value, -0x1p63, 0x1.fffffffffffffp62); std::memcpy(p, &x, 8); return; }
    case DOUBLE: std::memcpy(p, &value, 8); return;
    case INT32: { const int32_t x = static_cast<int32_t>(whole(value, -0x1p31, 0x1p31 - 1)); std::memcpy(p, &x, 4); return; }
    case BOOL: *reinterpret_cast<uint8_t*>(p) = value != 0.0; return;
    default: *reinterpret_cast<uint8_t*>(p) = static_cast<uint8_t>(whole(value, 0.0, 255.0));
  }
}

// NaN of either argument is the result, as in PyTorch.
inline double larger(double a, double b) { return a != a || a > b ? a : b; }
inline double smaller(double a, double b) { return a != a || a < b ? a : b; }

double compute(int64_t operation, double a, double b, double c) {
  switch (operation) {
    case COPY: return a;
    case NEGATIVE: return -a;
    case EXP: return std::exp(a);
    case LOG: return std::log(a);
    case LOG1P: return std::log1p(a);
    case SQRT: return std::sqrt(a);
    case RSQRT: return 1.0 / std::sqrt(a);
    case RECIPROCAL: return 1.0 / a;
    case SQUARE: return a * a;
    case SIN: return std::sin(a);
    case COS: return std::cos(a);
    case OP_TANH: return std::tanh(a);
    case SIGMOID: return 1.0 / (1.0 + std::exp(-a));
    case OP_SILU: return a / (1.0 + std::exp(-a));
    case SOFTPLUS: return a > 20.0 ? a : std::log1p(std::exp(a));
    case OP_RELU: return a < 0.0 ? 0.0 : a;
    case ABS: return std::fabs(a);
    case NOT: return a == 0.0;
    case ADD: return a + b;
    case SUB: return a - b;
    case MUL: return a * b;
    case DIV: return a / b;
    case MAXIMUM: return larger(a, b);
    case MINIMUM: return smaller(a, b);
    case EQ: return a == b;
    case NE: return a != b;
    case LT: return a < b;
    case LE: return a <= b;
    case GT: return a > b;
    case GE: return a >= b;
    case AND: return a != 0.0 && b != 0.0;
    case OR: return a != 0.0 || b != 0.0;
    case WHERE: return a != 0.0 ? b : c;
    case ADDCMUL: return a + b * c;
    case CLAMP: return smaller(larger(a, b), c);
    default: return c < 0.5 ? a + c * (b - a) : b - (b - a) * (1.0 - c);  // LERP
  }
}

// Addresses of a row: the output and three inputs, null where there is none.
struct Row {
  char* out;
  const char* in[3];
};

// `row` for each row of the last dimension.
template <class F>
inline void each_row(const Elementwise& e, Row start, F row) {
  const int last = static_cast<int>(e.dims) - 1;
  int64_t index[DIMS] = {};
  int64_t steps[4][DIMS];
  for (int d = 0; d < e.dims; ++d) {
    steps[3][d] = e.out.strides[d] * bytes_of(e.out.type);
    for (int i = 0; i < 3; ++i) steps[i][d] = e.in[i].strides[d] * bytes_of(e.in[i].type);
  }
  while (true) {
    row(start);
    int d = last - 1;
    for (; d >= 0; --d) {
      start.out += steps[3][d];
      for (int i = 0; i < 3; ++i) start.in[i] += steps[i][d];
      if (++index[d] < e.shape[d]) break;
      index[d] = 0;
      start.out -= steps[3][d] * e.shape[d];
      for (int i = 0; i < 3; ++i) start.in[i] -= steps[i][d] * e.shape[d];
    }
    if (d < 0) return;
  }
}

inline vec load_or_splat(const char* p, int64_t stride, int64_t i, int64_t left) {
  const float* x = reinterpret_cast<const float*>(p);
  return stride ? load_n(x + i, left) : splat(*x);
}

// `function` of N operands by vectors; all are floats, and their last strides are 0 or 1.
template <int N, class F>
void by_vectors(const Elementwise& e, Row start, F function) {
  const int last = static_cast<int>(e.dims) - 1;
  const int64_t n = e.shape[last], sa = e.in[0].strides[last], sb = e.in[1].strides[last], sc = e.in[2].strides[last];
  each_row(e, start, [&](const Row& row) {
    float* out = reinterpret_cast<float*>(row.out);
    for (int64_t i = 0; i < n; i += VL) {
      const int64_t left = n - i;
      const vec a = load_or_splat(row.in[0], sa, i, left);
      const vec b = N > 1 ? load_or_splat(row.in[1], sb, i, left) : a;
      const vec c = N > 2 ? load_or_splat(row.in[2], sc, i, left) : a;
      store_n(out + i, function(a, b, c), left);
    }
  });
}

// By element of floats, for functions without a vector form.
template <class F>
void by_floats(const Elementwise& e, Row start, F function) {
  const int last = static_cast<int>(e.dims) - 1;
  const int64_t n = e.shape[last], so = e.out.strides[last], sa = e.in[0].strides[last];
  each_row(e, start, [&](const Row& row) {
    float* out = reinterpret_cast<float*>(row.out);
    const float* a = reinterpret_cast<const float*>(row.in[0]);
    for (int64_t i = 0; i < n; ++i) out[i * so] = function(a[i * sa]);
  });
}

// Selection of floats; the condition is a bool of any stride.
void select_floats(const Elementwise& e, Row start) {
  const int last = static_cast<int>(e.dims) - 1;
  const int64_t n = e.shape[last], so = e.out.strides[last];
  const int64_t sa = e.in[0].strides[last], sb = e.in[1].strides[last], sc = e.in[2].strides[last];
  each_row(e, start, [&](const Row& row) {
    float* out = reinterpret_cast<float*>(row.out);
    const uint8_t* condition = reinterpret_cast<const uint8_t*>(row.in[0]);
    const float *b = reinterpret_cast<const float*>(row.in[1]), *c = reinterpret_cast<const float*>(row.in[2]);
    if (sa == 0 && so == 1) {
      const float* chosen = *condition ? b : c;
      const int64_t stride = *condition ? sb : sc;
      if (stride == 1) std::memcpy(out, chosen, n * sizeof(float));
      else for (int64_t i = 0; i < n; ++i) out[i] = chosen[i * stride];
    } else {
      for (int64_t i = 0; i < n; ++i) out[i * so] = condition[i * sa] ? b[i * sb] : c[i * sc];
    }
  });
}

template <int N>
inline bool has_vectors(const Elementwise& e) {
  const int last = static_cast<int>(e.dims) - 1;
  bool fits = e.out.type == FLOAT && e.out.strides[last] == 1;
  for (int i = 0; i < N; ++i)
    fits = fits && e.in[i].type == FLOAT && (e.in[i].strides[last] == 0 || e.in[i].strides[last] == 1);
  return fits;
}

inline vec larger_v(vec a, vec b) { return (a != a) | (a > b) ? a : b; }
inline vec smaller_v(vec a, vec b) { return (a != a) | (a < b) ? a : b; }
inline vec sqrt_v(vec a) {
  for (int i = 0; i < VL; ++i) a[i] = std::sqrt(a[i]);
  return a;
}

// The operation with vectors of floats, if it has such a form.
bool with_vectors(const Elementwise& e, Row row) {
  if (has_vectors<1>(e)) {
    switch (e.operation) {
      case NEGATIVE: by_vectors<1>(e, row, [](vec a, vec, vec) { return -a; }); return true;
      case EXP: by_vectors<1>(e, row, [](vec a, vec, vec) { return exp_v(a); }); return true;
      case SQRT: by_vectors<1>(e, row, [](vec a, vec, vec) { return sqrt_v(a); }); return true;
      case RSQRT: by_vectors<1>(e, row, [](vec a, vec, vec) { return 1.0f / sqrt_v(a); }); return true;
      case RECIPROCAL: by_vectors<1>(e, row, [](vec a, vec, vec) { return 1.0f / a; }); return true;
      case SQUARE: by_vectors<1>(e, row, [](vec a, vec, vec) { return a * a; }); return true;
      case OP_TANH: by_vectors<1>(e, row, [](vec a, vec, vec) { return tanh_v(a); }); return true;
      case SIGMOID: by_vectors<1>(e, row, [](vec a, vec, vec) { return sigmoid_v(a); }); return true;
      case OP_SILU: by_vectors<1>(e, row, [](vec a, vec, vec) { return activate<SILU>(a); }); return true;
      case OP_RELU: by_vectors<1>(e, row, [](vec a, vec, vec) { return activate<RELU>(a); }); return true;
      case ABS: by_vectors<1>(e, row, [](vec a, vec, vec) { return a < 0.0f ? -a : a; }); return true;
      default: break;
    }
  }
  if (has_vectors<2>(e)) {
    switch (e.operation) {
      case ADD: by_vectors<2>(e, row, [](vec a, vec b, vec) { return a + b; }); return true;
      case SUB: by_vectors<2>(e, row, [](vec a, vec b, vec) { return a - b; }); return true;
      case MUL: by_vectors<2>(e, row, [](vec a, vec b, vec) { return a * b; }); return true;
      case DIV: by_vectors<2>(e, row, [](vec a, vec b, vec) { return a / b; }); return true;
      case MAXIMUM: by_vectors<2>(e, row, [](vec a, vec b, vec) { return larger_v(a, b); }); return true;
      case MINIMUM: by_vectors<2>(e, row, [](vec a, vec b, vec) { return smaller_v(a, b); }); return true;
      default: break;
    }
  }
  if (has_vectors<3>(e)) {
    switch (e.operation) {
      case ADDCMUL: by_vectors<3>(e, row, [](vec a, vec b, vec c) { return a + b * c; }); return true;
      case LERP:
        by_vectors<3>(e, row, [](vec a, vec b, vec c) { return c < 0.5f ? a + c * (b - a) : b - (b - a) * (1.0f - c); });
        return true;
      case CLAMP: by_vectors<3>(e, row, [](vec a, vec b, vec c) { return smaller_v(larger_v(a, b), c); }); return true;
      default: break;
    }
  }
  return false;
}

inline bool all_floats(const Elementwise& e, int first, int end) {
  bool floats = e.out.type == FLOAT;
  for (int i = first; i < end; ++i) floats = floats && e.in[i].type == FLOAT;
  return floats;
}

void copy_rows(const Elementwise& e, Row row) {
  const int last = static_cast<int>(e.dims) - 1;
  const int64_t n = e.shape[last], size = bytes_of(e.out.type), so = e.out.strides[last], sa = e.in[0].strides[last];
  if (so == 1 && sa == 1) {
    each_row(e, row, [&](const Row& r) { std::memcpy(r.out, r.in[0], n * size); });
  } else if (size == 4) {
    each_row(e, row, [&](const Row& r) {
      int32_t* out = reinterpret_cast<int32_t*>(r.out);
      const int32_t* in = reinterpret_cast<const int32_t*>(r.in[0]);
      for (int64_t i = 0; i < n; ++i) out[i * so] = in[i * sa];
    });
  } else {
    each_row(e, row, [&](const Row& r) {
      for (int64_t i = 0; i < n; ++i) std::memcpy(r.out + i * so * size, r.in[0] + i * sa * size, size);
    });
  }
}

}  // namespace

// out = operation(a, b, c) by element; b and c are null where the operation has fewer operands.
EXPORT void KERNEL(elementwise)(const Elementwise* e, void* out, const void* a, const void* b, const void* c) {
  const Row row = {static_cast<char*>(out), {static_cast<const char*>(a), static_cast<const char*>(b), static_cast<const char*>(c)}};
  if (e->operation == COPY && e->out.type == e->in[0].type) return copy_rows(*e, row);
  if (with_vectors(*e, row)) return;
  if (e->operation == WHERE && e->in[0].type == BOOL && all_floats(*e, 1, 3)) return select_floats(*e, row);
  if (all_floats(*e, 0, 1)) {
    switch (e->operation) {
      case LOG: return by_floats(*e, row, [](float x) { return std::log(x); });
      case LOG1P: return by_floats(*e, row, [](float x) { return std::log1p(x); });
      case SOFTPLUS: return by_floats(*e, row, [](float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); });
      default: break;
    }
  }
  const int last = static_cast<int>(e->dims) - 1;
  each_row(*e, row, [&](const Row& r) {
    for (int64_t i = 0; i < e->shape[last]; ++i) {
      double x[3] = {};
      for (int k = 0; k < 3; ++k)
        if (r.in[k]) x[k] = load_any(r.in[k] + i * e->in[k].strides[last] * bytes_of(e->in[k].type), e->in[k].type);
      store_any(r.out + i * e->out.strides[last] * bytes_of(e->out.type), e->out.type, compute(e->operation, x[0], x[1], x[2]));
    }
  });
}
RECORDABLE(elementwise)

namespace {

enum Reduction { SUM, MEAN, LARGEST, LEAST, ANY, ALL, ARGMAX };

// Sizes of a reduction: dimensions that stay, of which the output is contiguous, and those that are reduced.
struct Reduce {
  int64_t reduction, in_type, out_type;
  int64_t kept, kept_shape[DIMS], kept_strides[DIMS];
  int64_t reduced, reduced_shape[DIMS], reduced_strides[DIMS];
};

// `function(offset)` for each index of the dimensions, the last one fastest; offsets in elements.
template <class F>
inline void each_offset(int64_t dims, const int64_t* shape, const int64_t* strides, F function) {
  int64_t index[DIMS] = {}, offset = 0;
  while (true) {
    function(offset);
    int64_t d = dims - 1;
    for (; d >= 0; --d) {
      offset += strides[d];
      if (++index[d] < shape[d]) break;
      index[d] = 0;
      offset -= strides[d] * shape[d];
    }
    if (d < 0) return;
  }
}

inline int64_t count(int64_t dims, const int64_t* shape) {
  int64_t n = 1;
  for (int64_t d = 0; d < dims; ++d) n *= shape[d];
  return n;
}

// Sums of floats by vectors: of contiguous elements, or of vectors of the last dimension that stays.
bool sum_by_vectors(const Reduce& r, const float* in, float* out) {
  if ((r.reduction != SUM && r.reduction != MEAN) || r.in_type != FLOAT || r.out_type != FLOAT) return false;
  const int64_t n = count(r.reduced, r.reduced_shape);
  if (r.reduced == 1 && r.reduced_strides[0] == 1) {
    each_offset(r.kept, r.kept_shape, r.kept_strides, [&](int64_t offset) {
      vec total = {};
      for (int64_t i = 0; i < n; i += VL) total += load_n(in + offset + i, n - i);
      *out++ = r.reduction == MEAN ? sum(total) / n : sum(total);
    });
    return true;
  }
  if (r.kept == 0 || r.kept_strides[r.kept - 1] != 1) return false;
  const int64_t width = r.kept_shape[r.kept - 1];
  each_offset(r.kept - 1, r.kept_shape, r.kept_strides, [&](int64_t offset) {
    for (int64_t i = 0; i < width; i += VL) {
      vec total = {};
      each_offset(r.reduced, r.reduced_shape, r.reduced_strides,
                  [&](int64_t further) { total += load_n(in + offset + further + i, width - i); });
      if (r.reduction == MEAN) total = total / static_cast<float>(n);
      store_n(out + i, total, width - i);
    }
    out += width;
  });
  return true;
}

}  // namespace

// out = reduction(in) over some dimensions; `out` is contiguous. ARGMAX has one reduced dimension and an int64 result.
EXPORT void KERNEL(reduce)(const Reduce* r, const void* in, void* out) {
  if (sum_by_vectors(*r, static_cast<const float*>(in), static_cast<float*>(out))) return;
  const char* first = static_cast<const char*>(in);
  char* to = static_cast<char*>(out);
  const int64_t size = bytes_of(r->in_type), n = count(r->reduced, r->reduced_shape);
  each_offset(r->kept, r->kept_shape, r->kept_strides, [&](int64_t offset) {
    double result = 0.0, best = 0.0;
    int64_t i = 0;
    each_offset(r->reduced, r->reduced_shape, r->reduced_strides, [&](int64_t further) {
      const double x = load_any(first + (offset + further) * size, r->in_type);
      switch (r->reduction) {
        case SUM: case MEAN: result += x; break;
        case LARGEST: result = i == 0 ? x : larger(x, result); break;
        case LEAST: result = i == 0 ? x : smaller(x, result); break;
        case ANY: result = result != 0.0 || x != 0.0; break;
        case ALL: result = (i == 0 || result != 0.0) && x != 0.0; break;
        default:  // the first of the largest; NaN counts as larger than all numbers
          if (i == 0 || (best == best && (x > best || x != x))) {
            best = x;
            result = static_cast<double>(i);
          }
      }
      ++i;
    });
    store_any(to, r->out_type, r->reduction == MEAN ? result / n : result);
    to += bytes_of(r->out_type);
  });
}
RECORDABLE(reduce)

// Softmax of rows of `size` floats, or its logarithm; x and y may be the same.
EXPORT void KERNEL(softmax)(const float* x, float* y, int64_t rows, int64_t size, int32_t logarithm) {
  for (int64_t r = 0; r < rows; ++r, x += size, y += size) {
    float largest = x[0];
    for (int64_t i = 1; i < size; ++i) largest = x[i] > largest ? x[i] : largest;
    vec total = {};
    for (int64_t i = 0; i < size; i += VL) {
      const int64_t left = size - i;
      vec z = load_n(x + i, left) - largest;
      vec e = exp_v(z);
      for (int64_t c = left; c < VL; ++c) e[c] = 0.0f;
      total += e;
      store_n(y + i, logarithm ? z : e, left);
    }
    const float norm = logarithm ? std::log(sum(total)) : 1.0f / sum(total);
    for (int64_t i = 0; i < size; i += VL) {
      const vec z = load_n(y + i, size - i);
      store_n(y + i, logarithm ? z - norm : z * norm, size - i);
    }
  }
}
RECORDABLE(softmax)

// out[r, j] = in[r, index[r, j]] for rows of `size` elements and m indices; an index out of range gives zero bytes.
EXPORT void KERNEL(gather)(const char* in, const int64_t* index, char* out, int64_t rows, int64_t size, int64_t m, int64_t bytes) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < m; ++j) {
      const int64_t place = index[r * m + j];
      char* to = out + (r * m + j) * bytes;
      if (place >= 0 && place < size) std::memcpy(to, in + (r * size + place) * bytes, bytes);
      else std::memset(to, 0, bytes);
    }
}
RECORDABLE(gather)

namespace {

// Sizes of products of matrices, c (batch, m, n) = a (batch, m, k) b (batch, k, n) + bias, c contiguous.
struct Products {
  int64_t batch, m, n, k, a[3], b[3];  // strides in elements, by batch, row and column
};

}  // namespace

// c = a b + bias (n); bias may be null.
EXPORT void KERNEL(products)(const Products* p, const float* a, const float* b, const float* bias, float* c) {
  const bool by_columns = p->b[2] == 1, by_depth = p->b[1] == 1 && p->a[2] == 1;
  for (int64_t i = 0; i < p->batch; ++i)
    for (int64_t row = 0; row < p->m; ++row, c += p->n) {
      const float *x = a + i * p->a[0] + row * p->a[1], *w = b + i * p->b[0];
      for (int64_t j = 0; j < p->n;) {
        if (by_columns) {
          const int64_t left = p->n - j;
          vec total[4] = {};
          const int parts = left > 3 * VL ? 4 : left > 2 * VL ? 3 : left > VL ? 2 : 1;
          for (int q = 0; q < parts && bias; ++q) total[q] = load_n(bias + j + q * VL, left - q * VL);
          for (int64_t k = 0; k < p->k; ++k) {
            const float factor = x[k * p->a[2]];
            for (int q = 0; q < parts; ++q) total[q] += factor * load_n(w + k * p->b[1] + j + q * VL, left - q * VL);
          }
          for (int q = 0; q < parts; ++q) store_n(c + j + q * VL, total[q], left - q * VL);
          j += parts * VL;
        } else if (by_depth) {
          vec total = {};
          for (int64_t k = 0; k < p->k; k += VL) total += load_n(x + k, p->k - k) * load_n(w + j * p->b[2] + k, p->k - k);
          c[j] = sum(total) + (bias ? bias[j] : 0.0f);
          ++j;
        } else {
          float total = bias ? bias[j] : 0.0f;
          for (int64_t k = 0; k < p->k; ++k) total += x[k * p->a[2]] * w[k * p->b[1] + j * p->b[2]];
          c[j] = total;
          ++j;
        }
      }
    }
}
RECORDABLE(products)

namespace {

struct Call {
  void (*thunk)(const int64_t*);
  const int64_t* words;
};

// words[place] = bases[base] + offset
struct Patch {
  int64_t* word;
  int64_t base, offset;
};

}  // namespace

// Calls in order, after the addresses of the inputs and outputs have been written into their arguments.
EXPORT void KERNEL(replay)(const Call* calls, int64_t num_calls, const Patch* patches, int64_t num_patches, const int64_t* bases) {
  for (int64_t i = 0; i < num_patches; ++i) *patches[i].word = bases[patches[i].base] + patches[i].offset;
  for (int64_t i = 0; i < num_calls; ++i) calls[i].thunk(calls[i].words);
}
