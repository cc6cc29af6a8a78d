// Kernels for a CPU, in single precision. This file is compiled once for each instruction set; see hatch_build.py.
//
// Vectors are the compiler's vector types, of VL floats. Every kernel takes plain pointers and sizes, works on one thread, keeps
// no state and allocates nothing: the caller passes scratch memory. Rows of matrices are contiguous. Sizes may be any positive
// numbers: the last columns, which do not fill a vector, are read and written one by one.
//
// A NaN or an infinity of one row never reaches another row: values are selected, not multiplied by zero.

#include "kernels.h"
#include "thunk.h"
#include "vectors.h"

namespace {

// --- products ------------------------------------------------------------------------------------------------------------
// The weights of a product are packed in panels of NR * VL columns: packed[panel][k][column], zeros in columns beyond the last.

// acc[r][c] += sum_k a[r][k] * panel[k][c * VL ...]
template <int MR, int NR>
inline void multiply(const float* a, int64_t lda, const float* panel, int64_t depth, vec (&acc)[MR][NR]) {
  for (int64_t k = 0; k < depth; ++k) {
    vec b[NR];
    for (int c = 0; c < NR; ++c) b[c] = load(panel + (k * NR + c) * VL);
    for (int r = 0; r < MR; ++r) {
      vec x = splat(a[r * lda + k]);
      for (int c = 0; c < NR; ++c) acc[r][c] += x * b[c];
    }
  }
}

#if VL == 16
constexpr int AFFINE_ROWS = 12;
constexpr int GATE_ROWS = 8;
constexpr int LSTM_ROWS = 6;
#else
constexpr int AFFINE_ROWS = 6;
constexpr int GATE_ROWS = 4;
constexpr int LSTM_ROWS = 3;
#endif

template <int ACT, int MR>
inline void affine_rows(const float* x, int64_t ldx, const float* panel, const float* bias, float* y, int64_t ldy,
                        int64_t depth, int64_t columns) {
  vec acc[MR][2];
  vec b0 = bias ? load_n(bias, columns) : vec{};
  vec b1 = bias && columns > VL ? load_n(bias + VL, columns - VL) : vec{};
  for (int r = 0; r < MR; ++r) {
    acc[r][0] = b0;
    acc[r][1] = b1;
  }
  multiply<MR, 2>(x, ldx, panel, depth, acc);
  for (int r = 0; r < MR; ++r) {
    store_n(y + r * ldy, activate<ACT>(acc[r][0]), columns);
    if (columns > VL) store_n(y + r * ldy + VL, activate<ACT>(acc[r][1]), columns - VL);
  }
}

template <int ACT, int MR>
struct AffineTail {
  static void run(int64_t rows, const float* x, int64_t ldx, const float* panel, const float* bias, float* y, int64_t ldy,
                  int64_t depth, int64_t columns) {
    if (rows == MR) affine_rows<ACT, MR>(x, ldx, panel, bias, y, ldy, depth, columns);
    else AffineTail<ACT, MR - 1>::run(rows, x, ldx, panel, bias, y, ldy, depth, columns);
  }
};
template <int ACT>
struct AffineTail<ACT, 0> {
  static void run(int64_t, const float*, int64_t, const float*, const float*, float*, int64_t, int64_t, int64_t) {}
};

template <int ACT>
void affine(const float* x, int64_t ldx, const float* packed, const float* bias, float* y, int64_t ldy, int64_t rows,
            int64_t depth, int64_t columns) {
  for (int64_t n = 0; n < columns; n += 2 * VL) {
    const float* panel = packed + n * depth;
    const float* b = bias ? bias + n : nullptr;
    int64_t left = columns - n, m = 0;
    for (; rows - m >= 2 * AFFINE_ROWS || rows - m == AFFINE_ROWS; m += AFFINE_ROWS)
      affine_rows<ACT, AFFINE_ROWS>(x + m * ldx, ldx, panel, b, y + m * ldy + n, ldy, depth, left);
    // The rest in equal blocks: a block of few rows waits for its own sums.
    const int64_t half = rows - m > AFFINE_ROWS ? (rows - m + 1) / 2 : rows - m;
    AffineTail<ACT, AFFINE_ROWS>::run(half, x + m * ldx, ldx, panel, b, y + m * ldy + n, ldy, depth, left);
    m += half;
    AffineTail<ACT, AFFINE_ROWS>::run(rows - m, x + m * ldx, ldx, panel, b, y + m * ldy + n, ldy, depth, left);
  }
}

// --- GRU -----------------------------------------------------------------------------------------------------------------
// Recurrent weights are packed for G gates at once: packed[panel of VL units][k][gate][unit].

template <int MR>
inline void gru_rows(float* gates, const float* previous, int64_t ldp, const float* panel, const float* bias, float* next,
                     float* new_h, int64_t size, int64_t unit, int64_t left) {
  vec acc[MR][3];
  for (int g = 0; g < 3; ++g) {
    const vec start = load_n(bias + g * size + unit, left);
    for (int r = 0; r < MR; ++r) acc[r][g] = start;
  }
  multiply<MR, 3>(previous, ldp, panel, size, acc);
  for (int r = 0; r < MR; ++r) {
    float* g = gates + r * 3 * size + unit;
    vec reset = sigmoid_v(load_n(g, left) + acc[r][0]);
    vec update = sigmoid_v(load_n(g + size, left) + acc[r][1]);
    vec recurrent = acc[r][2];
    vec fresh = tanh_v(load_n(g + 2 * size, left) + reset * recurrent);
    vec h = load_n(previous + r * ldp + unit, left);
    store_n(g, reset, left);
    store_n(g + size, update, left);
    store_n(g + 2 * size, fresh, left);
    store_n(new_h + r * size + unit, recurrent, left);
    store_n(next + r * size + unit, fresh + update * (h - fresh), left);
  }
}
template <int MR>
struct GruTail {
  static void run(int64_t rows, float* gates, const float* previous, int64_t ldp, const float* panel, const float* bias,
                  float* next, float* new_h, int64_t size, int64_t unit, int64_t left) {
    if (rows == MR) gru_rows<MR>(gates, previous, ldp, panel, bias, next, new_h, size, unit, left);
    else GruTail<MR - 1>::run(rows, gates, previous, ldp, panel, bias, next, new_h, size, unit, left);
  }
};
template <>
struct GruTail<0> {
  static void run(int64_t, float*, const float*, int64_t, const float*, const float*, float*, float*, int64_t, int64_t, int64_t) {}
};

// --- LSTM ----------------------------------------------------------------------------------------------------------------

template <int MR>
inline void lstm_rows(float* gates, const float* previous, const float* cell, const float* panel, const float* bias, float* next,
                      float* next_cell, int64_t size, int64_t unit, int64_t left) {
  vec acc[MR][4];
  for (int g = 0; g < 4; ++g) {
    const vec start = load_n(bias + g * size + unit, left);
    for (int r = 0; r < MR; ++r) acc[r][g] = start;
  }
  multiply<MR, 4>(previous, size, panel, size, acc);
  for (int r = 0; r < MR; ++r) {
    float* g = gates + r * 4 * size + unit;
    vec write = sigmoid_v(load_n(g, left) + acc[r][0]);
    vec forget = sigmoid_v(load_n(g + size, left) + acc[r][1]);
    vec item = tanh_v(load_n(g + 2 * size, left) + acc[r][2]);
    vec out = sigmoid_v(load_n(g + 3 * size, left) + acc[r][3]);
    vec c = forget * load_n(cell + r * size + unit, left) + write * item;
    store_n(g, write, left);
    store_n(g + size, forget, left);
    store_n(g + 2 * size, item, left);
    store_n(g + 3 * size, out, left);
    store_n(next_cell + r * size + unit, c, left);
    store_n(next + r * size + unit, out * tanh_v(c), left);
  }
}
template <int MR>
struct LstmTail {
  static void run(int64_t rows, float* gates, const float* previous, const float* cell, const float* panel, const float* bias,
                  float* next, float* next_cell, int64_t size, int64_t unit, int64_t left) {
    if (rows == MR) lstm_rows<MR>(gates, previous, cell, panel, bias, next, next_cell, size, unit, left);
    else LstmTail<MR - 1>::run(rows, gates, previous, cell, panel, bias, next, next_cell, size, unit, left);
  }
};
template <>
struct LstmTail<0> {
  static void run(int64_t, float*, const float*, const float*, const float*, const float*, float*, float*, int64_t, int64_t, int64_t) {
  }
};

// `states`, or a copy in `scratch` with zeros in the rows whose keep is 0.
const float* kept(const float* states, const uint8_t* keep, float* scratch, int64_t rows, int64_t size) {
  bool all = true;
  if (keep)
    for (int64_t r = 0; r < rows; ++r) all = all && keep[r];
  if (all) return states;
  for (int64_t r = 0; r < rows; ++r) {
    if (keep[r]) std::memcpy(scratch + r * size, states + r * size, size * sizeof(float));
    else std::memset(scratch + r * size, 0, size * sizeof(float));
  }
  return scratch;
}

}  // namespace

// Floats of packed weights (N, K): panels of 2 VL columns.
EXPORT int64_t KERNEL(packed_size)(int64_t columns, int64_t depth) { return (columns + 2 * VL - 1) / (2 * VL) * 2 * VL * depth; }

// weight[n * row_stride + k * column_stride] to panels of 2 VL columns n.
EXPORT void KERNEL(pack)(const float* weight, int64_t row_stride, int64_t column_stride, int64_t columns, int64_t depth,
                         float* packed) {
  for (int64_t n = 0; n < columns; n += 2 * VL)
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t c = 0; c < 2 * VL; ++c)
        *packed++ = n + c < columns ? weight[(n + c) * row_stride + k * column_stride] : 0.0f;
}
RECORDABLE(pack)

// Floats of packed recurrent weights of `gates` gates.
EXPORT int64_t KERNEL(packed_gates_size)(int64_t gates, int64_t size) { return (size + VL - 1) / VL * VL * gates * size; }

// weight (gates * size, size), rows contiguous, to panels of VL units of all gates.
EXPORT void KERNEL(pack_gates)(const float* weight, int64_t gates, int64_t size, float* packed) {
  for (int64_t unit = 0; unit < size; unit += VL)
    for (int64_t k = 0; k < size; ++k)
      for (int64_t g = 0; g < gates; ++g)
        for (int64_t c = 0; c < VL; ++c)
          *packed++ = unit + c < size ? weight[(g * size + unit + c) * size + k] : 0.0f;
}
RECORDABLE(pack_gates)

// y (rows, columns) = activation(x (rows, depth) W^T + bias); bias may be null.
EXPORT void KERNEL(affine)(const float* x, int64_t ldx, const float* packed, const float* bias, float* y, int64_t ldy,
                           int64_t rows, int64_t depth, int64_t columns, int32_t activation) {
  switch (activation) {
    case TANH: return affine<TANH>(x, ldx, packed, bias, y, ldy, rows, depth, columns);
    case RELU: return affine<RELU>(x, ldx, packed, bias, y, ldy, rows, depth, columns);
    case SILU: return affine<SILU>(x, ldx, packed, bias, y, ldy, rows, depth, columns);
    default: return affine<NONE>(x, ldx, packed, bias, y, ldy, rows, depth, columns);
  }
}
RECORDABLE(affine)

// y = activation(LayerNorm(x)) by row, biased variance; x and y may be the same.
EXPORT void KERNEL(layer_norm)(const float* x, const float* weight, const float* bias, float* y, int64_t rows, int64_t size,
                               float eps, int32_t silu) {
  for (int64_t r = 0; r < rows; ++r, x += size, y += size) {
    vec s = {};
    for (int64_t i = 0; i < size; i += VL) s += load_n(x + i, size - i);
    float mean = sum(s) / size;
    vec q = {};
    for (int64_t i = 0; i < size; i += VL) {
      vec d = load_n(x + i, size - i) - mean;
      if (size - i < VL)
        for (int c = size - i; c < VL; ++c) d[c] = 0.0f;
      q += d * d;
    }
    float scale = 1.0f / std::sqrt(sum(q) / size + eps);
    for (int64_t i = 0; i < size; i += VL) {
      vec z = (load_n(x + i, size - i) - mean) * scale * load_n(weight + i, size - i) + load_n(bias + i, size - i);
      store_n(y + i, silu ? activate<SILU>(z) : z, size - i);
    }
  }
}
RECORDABLE(layer_norm)

// y = x / sqrt(mean(x^2) + eps) by row of `size`; x and y may be the same.
EXPORT void KERNEL(rms_norm)(const float* x, float* y, int64_t rows, int64_t size, float eps) {
  for (int64_t r = 0; r < rows; ++r, x += size, y += size) {
    vec q = {};
    for (int64_t i = 0; i < size; i += VL) {
      vec d = load_n(x + i, size - i);
      q += d * d;
    }
    float scale = 1.0f / std::sqrt(sum(q) / size + eps);
    for (int64_t i = 0; i < size; i += VL) store_n(y + i, load_n(x + i, size - i) * scale, size - i);
  }
}
RECORDABLE(rms_norm)

// A GRU over a sequence. gates (T, B, 3 H): in, the inputs' part with its bias; out, the activated gates reset, update, new.
// bias (3 H): of the recurrent part. states (T + 1, B, H): states[0] is given. new_h (T, B, H): recurrent part of `new`.
// keep (T, B), 0 where a row starts from zeros, or null. scratch (B, H).
EXPORT void KERNEL(gru_forward)(float* gates, float* states, const float* packed, const float* bias, float* new_h,
                                const uint8_t* keep, float* scratch, int64_t steps, int64_t rows, int64_t size) {
  for (int64_t t = 0; t < steps; ++t) {
    const float* previous = kept(states, keep, scratch, rows, size);
    float* next = states + rows * size;
    for (int64_t unit = 0; unit < size; unit += VL) {
      const float* panel = packed + unit * 3 * size;
      int64_t left = size - unit, m = 0;
      for (; m + GATE_ROWS <= rows; m += GATE_ROWS)
        gru_rows<GATE_ROWS>(gates + m * 3 * size, previous + m * size, size, panel, bias, next + m * size, new_h + m * size,
                            size, unit, left);
      GruTail<GATE_ROWS - 1>::run(rows - m, gates + m * 3 * size, previous + m * size, size, panel, bias, next + m * size,
                                  new_h + m * size, size, unit, left);
    }
    gates += rows * 3 * size;
    new_h += rows * size;
    states = next;
    if (keep) keep += rows;
  }
}
RECORDABLE(gru_forward)

// Its backward. grad_h (T + 1, B, H): in, [zeros, gradients of the outputs]; out, gradients of all states. grad_gates (T, B, 3 H):
// out, gradients of the gates' pre-activations, of `new` its recurrent part. grad_new (T, B, H): out, of `new` its input's part.
// packed_t: the recurrent weights (3 H, H) packed as a product from 3 H to H. scratch (2, B, H).
EXPORT void KERNEL(gru_backward)(const float* gates, const float* states, const float* new_h, const float* packed_t,
                                 float* grad_h, float* grad_gates, float* grad_new, const uint8_t* keep, float* scratch,
                                 int64_t steps, int64_t rows, int64_t size) {
  float* carried = scratch + rows * size;
  for (int64_t t = steps - 1; t >= 0; --t) {
    const float* g = gates + t * rows * 3 * size;
    const float* previous = kept(states + t * rows * size, keep ? keep + t * rows : nullptr, scratch, rows, size);
    const float* dh = grad_h + (t + 1) * rows * size;
    float* dg = grad_gates + t * rows * 3 * size;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < size; i += VL) {
        int64_t left = size - i;
        vec reset = load_n(g + r * 3 * size + i, left), update = load_n(g + r * 3 * size + size + i, left);
        vec fresh = load_n(g + r * 3 * size + 2 * size + i, left);
        vec d = load_n(dh + r * size + i, left);
        vec d_new = d * (1.0f - update) * (1.0f - fresh * fresh);
        vec d_recurrent = d_new * reset;
        store_n(dg + r * 3 * size + i, d_recurrent * load_n(new_h + (t * rows + r) * size + i, left) * (1.0f - reset), left);
        store_n(dg + r * 3 * size + size + i,
                d * (load_n(previous + r * size + i, left) - fresh) * update * (1.0f - update), left);
        store_n(dg + r * 3 * size + 2 * size + i, d_recurrent, left);
        store_n(grad_new + (t * rows + r) * size + i, d_new, left);
      }
    affine<NONE>(dg, 3 * size, packed_t, nullptr, carried, size, rows, 3 * size, size);
    float* out = grad_h + t * rows * size;
    for (int64_t r = 0; r < rows; ++r) {
      if (keep && !keep[t * rows + r]) continue;
      for (int64_t i = 0; i < size; i += VL) {
        int64_t left = size - i;
        vec d = load_n(dh + r * size + i, left) * load_n(g + r * 3 * size + size + i, left);
        store_n(out + r * size + i, load_n(out + r * size + i, left) + load_n(carried + r * size + i, left) + d, left);
      }
    }
  }
}

// An LSTM over a sequence. gates (T, B, 4 H): in, the inputs' part with its bias; out, activated: write, forget, item, out. bias
// (4 H): of the recurrent part.
// states, cells (T + 1, B, H): the first of each is given. keep (T, B) or null. scratch (2, B, H).
EXPORT void KERNEL(lstm_forward)(float* gates, float* states, float* cells, const float* packed, const float* bias,
                                 const uint8_t* keep, float* scratch, int64_t steps, int64_t rows, int64_t size) {
  for (int64_t t = 0; t < steps; ++t) {
    const float* previous = kept(states, keep, scratch, rows, size);
    const float* cell = kept(cells, keep, scratch + rows * size, rows, size);
    float *next = states + rows * size, *next_cell = cells + rows * size;
    for (int64_t unit = 0; unit < size; unit += VL) {
      const float* panel = packed + unit * 4 * size;
      int64_t left = size - unit, m = 0;
      for (; m + LSTM_ROWS <= rows; m += LSTM_ROWS)
        lstm_rows<LSTM_ROWS>(gates + m * 4 * size, previous + m * size, cell + m * size, panel, bias, next + m * size,
                             next_cell + m * size, size, unit, left);
      LstmTail<LSTM_ROWS - 1>::run(rows - m, gates + m * 4 * size, previous + m * size, cell + m * size, panel, bias, next + m * size,
                                   next_cell + m * size, size, unit, left);
    }
    gates += rows * 4 * size;
    states = next;
    cells = next_cell;
    if (keep) keep += rows;
  }
}
RECORDABLE(lstm_forward)

// Its backward. grad_h (T + 1, B, H): in, [zeros, gradients of the outputs]; out, gradients of all hidden states. grad_c (B, H): in,
// gradient of the last cell state; out, of the first. grad_gates (T, B, 4 H): out. packed_t: (4 H, H) as a product from 4 H to H.
// scratch (2, B, H).
EXPORT void KERNEL(lstm_backward)(const float* gates, const float* cells, const float* packed_t, float* grad_h, float* grad_c,
                                  float* grad_gates, const uint8_t* keep, float* scratch, int64_t steps, int64_t rows,
                                  int64_t size) {
  float* carried = scratch + rows * size;
  for (int64_t t = steps - 1; t >= 0; --t) {
    const float* g = gates + t * rows * 4 * size;
    const uint8_t* keep_t = keep ? keep + t * rows : nullptr;
    const float* before = kept(cells + t * rows * size, keep_t, scratch, rows, size);
    const float* after = cells + (t + 1) * rows * size;
    const float* dh = grad_h + (t + 1) * rows * size;
    float* dg = grad_gates + t * rows * 4 * size;
    for (int64_t r = 0; r < rows; ++r) {
      bool carry = !keep_t || keep_t[r];
      for (int64_t i = 0; i < size; i += VL) {
        int64_t left = size - i;
        const float* row = g + r * 4 * size + i;
        vec write = load_n(row, left), forget = load_n(row + size, left), item = load_n(row + 2 * size, left);
        vec out = load_n(row + 3 * size, left), c = tanh_v(load_n(after + r * size + i, left));
        vec d = load_n(dh + r * size + i, left);
        vec dc = load_n(grad_c + r * size + i, left) + d * out * (1.0f - c * c);
        float* to = dg + r * 4 * size + i;
        store_n(to, dc * item * write * (1.0f - write), left);
        store_n(to + size, dc * load_n(before + r * size + i, left) * forget * (1.0f - forget), left);
        store_n(to + 2 * size, dc * write * (1.0f - item * item), left);
        store_n(to + 3 * size, d * c * out * (1.0f - out), left);
        store_n(grad_c + r * size + i, carry ? dc * forget : splat(0.0f), left);
      }
    }
    affine<NONE>(dg, 4 * size, packed_t, nullptr, carried, size, rows, 4 * size, size);
    float* out = grad_h + t * rows * size;
    for (int64_t r = 0; r < rows; ++r)
      if (!keep_t || keep_t[r])
        for (int64_t i = 0; i < size; i += VL) {
          int64_t left = size - i;
          store_n(out + r * size + i, load_n(out + r * size + i, left) + load_n(carried + r * size + i, left), left);
        }
  }
}

// --- attention -----------------------------------------------------------------------------------------------------------

namespace {

// columns (count, size), a row every `stride` floats, as rows (size, padded), zeros behind the last column.
void transpose(const float* columns, int64_t stride, int64_t count, int64_t size, int64_t padded, float* rows) {
  for (int64_t i = 0; i < size; ++i) {
    float* row = rows + i * padded;
    for (int64_t c = 0; c < count; ++c) row[c] = columns[c * stride + i];
    for (int64_t c = count; c < padded; ++c) row[c] = 0.0f;
  }
}

inline float dot(const float* a, const float* b, int64_t size) {
  vec total = {};
  for (int64_t i = 0; i < size; i += VL) total += load_n(a + i, size - i) * load_n(b + i, size - i);
  return sum(total);
}
inline void add_scaled(float* y, const float* x, float a, int64_t size) {
  for (int64_t i = 0; i < size; i += VL) store_n(y + i, load_n(y + i, size - i) + load_n(x + i, size - i) * a, size - i);
}

// out[c] = sum_i a[i] * rows[i * padded + c] for `count` columns, rounded up to whole vectors.
inline void combine(const float* a, const float* rows, int64_t padded, int64_t size, int64_t count, float* out) {
  int64_t c = 0;
  for (; c + 4 * VL <= count + VL - 1; c += 4 * VL) {
    vec acc[4] = {};
    for (int64_t i = 0; i < size; ++i)
      for (int v = 0; v < 4; ++v) acc[v] += load(rows + i * padded + c + v * VL) * a[i];
    for (int v = 0; v < 4; ++v) store(out + c + v * VL, acc[v]);
  }
  for (; c < count; c += VL) {
    vec acc = {};
    for (int64_t i = 0; i < size; ++i) acc += load(rows + i * padded + c) * a[i];
    store(out + c, acc);
  }
}

// Softmax of `count` scores in place. A NaN makes all of them NaN.
inline void softmax(float* scores, int64_t count) {
  float largest = -INFINITY;
  for (int64_t c = 0; c < count; ++c) largest = scores[c] > largest ? scores[c] : largest;
  if (largest == -INFINITY) largest = 0.0f;
  vec total = {};
  for (int64_t c = 0; c < count; c += VL) {
    vec e = exp_v(load_n(scores + c, count - c) - largest);
    if (count - c < VL)
      for (int i = count - c; i < VL; ++i) e[i] = 0.0f;
    total += e;
    store_n(scores + c, e, count - c);
  }
  float scale = 1.0f / sum(total);
  for (int64_t c = 0; c < count; c += VL) store_n(scores + c, load_n(scores + c, count - c) * scale, count - c);
}

inline int64_t round_up(int64_t n) { return (n + VL - 1) / VL * VL; }

}  // namespace

// Floats of scratch that window_forward and window_backward need.
EXPORT int64_t KERNEL(window_scratch)(int64_t steps, int64_t window, int64_t size, int64_t extras) {
  int64_t padded = round_up(steps + window) + 5 * VL;
  return (padded + round_up(window) + 5 * VL) * size + 2 * (window + extras + 8 * VL) + 2 * size + steps * (window + extras + size);
}

// Attention of each step over the entries of the last `window` steps, extra entries and a null entry: see window_attention.py.
// query (B, T, H, d) contiguous, of a product with 1/sqrt(d) already. keys, values (B, S + T, H, d): the heads and their d contiguous,
// strides of rows and steps given. reach (B, T). extra_keys, extra_values (B, n, E, H, d) contiguous, n blocks of `block` steps;
// extra_bias (H, E); visible (B, T, E). null_key, null_value (H, d). age_key (H, S, d), age 1 first, and age_bias (H, S), or null.
// context (B, T, H, d). weights (B, H, T, S + E + 1): of the window, oldest first, of the extra entries, of the null entry.
EXPORT void KERNEL(window_forward)(const float* query, const float* keys, const float* values, int64_t key_row, int64_t key_step,
                                   int64_t value_row, int64_t value_step, const float* reach, const float* extra_keys,
                                   const float* extra_values, const float* extra_bias, const uint8_t* visible,
                                   const float* null_key, const float* null_value, const float* age_key, const float* age_bias,
                                   float* context, float* weights, float* scratch, int64_t batch, int64_t steps, int64_t window,
                                   int64_t heads, int64_t size, int64_t extras, int64_t block) {
  const int64_t padded = round_up(steps + window) + 5 * VL, aged = round_up(window) + 5 * VL, columns = window + extras + 1;
  const int64_t blocks = (steps + block - 1) / block;
  float* by_feature = scratch;                       // keys (d, padded)
  float* age_by_feature = by_feature + padded * size;  // keys of ages, oldest first (d, aged)
  float* scores = age_by_feature + aged * size;
  float* by_age = scores + window + extras + 8 * VL;
  for (int64_t h = 0; h < heads; ++h) {
    if (age_key)
      for (int64_t i = 0; i < size; ++i)
        for (int64_t c = 0; c < aged; ++c)
          age_by_feature[i * aged + c] = c < window ? age_key[(h * window + window - 1 - c) * size + i] : 0.0f;
    for (int64_t b = 0; b < batch; ++b) {
      transpose(keys + b * key_row + h * size, key_step, steps + window, size, padded, by_feature);
      for (int64_t t = 0; t < steps; ++t) {
        const float* q = query + ((b * steps + t) * heads + h) * size;
        float* p = weights + ((b * heads + h) * steps + t) * columns;
        float* out = context + ((b * steps + t) * heads + h) * size;
        int64_t seen = (int64_t)reach[b * steps + t];
        seen = seen < 0 ? 0 : least(seen, window);
        const int64_t first = window - seen;
        combine(q, by_feature + t + first, padded, size, seen, scores);
        if (age_key) {
          combine(q, age_by_feature + first, aged, size, seen, by_age);
          for (int64_t c = 0; c < seen; ++c) scores[c] += by_age[c] + age_bias[h * window + window - 1 - first - c];
        }
        int64_t count = seen;
        for (int64_t e = 0; e < extras; ++e)
          scores[count++] = visible[(b * steps + t) * extras + e]
                                ? dot(q, extra_keys + (((b * blocks + t / block) * extras + e) * heads + h) * size, size) +
                                      extra_bias[h * extras + e]
                                : -INFINITY;
        scores[count++] = dot(q, null_key + h * size, size);
        softmax(scores, count);
        for (int64_t c = 0; c < first; ++c) p[c] = 0.0f;
        std::memcpy(p + first, scores, seen * sizeof(float));
        for (int64_t e = 0; e < extras; ++e) p[window + e] = visible[(b * steps + t) * extras + e] ? scores[seen + e] : 0.0f;
        p[window + extras] = scores[count - 1];
        const float* v = values + b * value_row + (t + first) * value_step + h * size;
        for (int64_t i = 0; i < size; i += VL) {
          const int64_t left = size - i;
          vec sums[4] = {load_n(null_value + h * size + i, left) * scores[count - 1]};
          int64_t c = 0;
          for (; c + 4 <= seen; c += 4)
            for (int u = 0; u < 4; ++u) sums[u] += load_n(v + (c + u) * value_step + i, left) * scores[c + u];
          for (; c < seen; ++c) sums[0] += load_n(v + c * value_step + i, left) * scores[c];
          for (int64_t e = 0; e < extras; ++e)
            if (visible[(b * steps + t) * extras + e])
              sums[0] += load_n(extra_values + (((b * blocks + t / block) * extras + e) * heads + h) * size + i, left) *
                         scores[seen + e];
          store_n(out + i, (sums[0] + sums[1]) + (sums[2] + sums[3]), left);
        }
      }
    }
  }
}

// Its backward. grad (B, T, H, d) of the context. All gradients are contiguous, in the shapes of window_forward, and zero before the
// call, but for grad_query, which is overwritten.
EXPORT void KERNEL(window_backward)(const float* query, const float* keys, const float* values, int64_t key_row, int64_t key_step,
                                    int64_t value_row, int64_t value_step, const float* reach, const float* extra_keys,
                                    const float* extra_values, const uint8_t* visible, const float* null_key,
                                    const float* null_value, const float* age_key, const float* weights, const float* grad,
                                    float* grad_query, float* grad_keys, float* grad_values, float* grad_extra_keys,
                                    float* grad_extra_values, float* grad_extra_bias, float* grad_null_key,
                                    float* grad_null_value, float* grad_age_key, float* grad_age_bias, float* scratch,
                                    int64_t batch, int64_t steps, int64_t window, int64_t heads, int64_t size, int64_t extras,
                                    int64_t block) {
  const int64_t padded = round_up(steps + window) + 5 * VL, columns = window + extras + 1;
  const int64_t blocks = (steps + block - 1) / block;
  float* by_feature = scratch;  // values (d, padded)
  float* scores = by_feature + padded * size + (round_up(window) + 5 * VL) * size;
  float* grad_scores = scores + 2 * (window + extras + 8 * VL) + 2 * size;  // (T, S)
  for (int64_t h = 0; h < heads; ++h)
    for (int64_t b = 0; b < batch; ++b) {
      transpose(values + b * value_row + h * size, value_step, steps + window, size, padded, by_feature);
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t place = (b * steps + t) * heads + h;
        const float *q = query + place * size, *g = grad + place * size;
        const float* p = weights + ((b * heads + h) * steps + t) * columns;
        float *dq = grad_query + place * size, *ds = grad_scores + t * window;
        int64_t seen = (int64_t)reach[b * steps + t];
        seen = seen < 0 ? 0 : least(seen, window);
        const int64_t first = window - seen;
        combine(g, by_feature + t + first, padded, size, seen, scores);
        float mean = 0.0f;
        for (int64_t c = 0; c < seen; ++c) mean += scores[c] * p[first + c];
        const float null_score = dot(g, null_value + h * size, size);
        mean += null_score * p[window + extras];
        for (int64_t e = 0; e < extras; ++e)
          if (visible[(b * steps + t) * extras + e]) {
            scores[seen + e] = dot(g, extra_values + (((b * blocks + t / block) * extras + e) * heads + h) * size, size);
            mean += scores[seen + e] * p[window + e];
          }
        for (int64_t c = 0; c < first; ++c) ds[c] = 0.0f;
        for (int64_t c = 0; c < seen; ++c) ds[first + c] = p[first + c] * (scores[c] - mean);
        const float d_null = p[window + extras] * (null_score - mean);
        const float* k = keys + b * key_row + t * key_step + h * size;
        for (int64_t i = 0; i < size; i += VL) {
          const int64_t left = size - i;
          vec sums[4] = {load_n(null_key + h * size + i, left) * d_null};
          int64_t c = first;
          for (; c + 4 <= window; c += 4)
            for (int u = 0; u < 4; ++u) sums[u] += load_n(k + (c + u) * key_step + i, left) * ds[c + u];
          for (; c < window; ++c) sums[0] += load_n(k + c * key_step + i, left) * ds[c];
          if (age_key) {
            const float* a = age_key + (h * window + window - 1) * size + i;
            for (c = first; c + 4 <= window; c += 4)
              for (int u = 0; u < 4; ++u) sums[u] += load_n(a - (c + u) * size, left) * ds[c + u];
            for (; c < window; ++c) sums[0] += load_n(a - c * size, left) * ds[c];
          }
          store_n(dq + i, (sums[0] + sums[1]) + (sums[2] + sums[3]), left);
        }
        add_scaled(grad_null_key + h * size, q, d_null, size);
        add_scaled(grad_null_value + h * size, g, p[window + extras], size);
        for (int64_t e = 0; e < extras; ++e)
          if (visible[(b * steps + t) * extras + e]) {
            const int64_t entry = (((b * blocks + t / block) * extras + e) * heads + h) * size;
            const float d = p[window + e] * (scores[seen + e] - mean);
            add_scaled(dq, extra_keys + entry, d, size);
            add_scaled(grad_extra_keys + entry, q, d, size);
            add_scaled(grad_extra_values + entry, g, p[window + e], size);
            grad_extra_bias[h * extras + e] += d;
          }
        if (age_key)
          for (int64_t c = first; c < window; ++c) grad_age_bias[h * window + window - 1 - c] += ds[c];
      }
      // Entry j is column j - t of step t. Steps that do not see it are skipped: their query may be NaN.
      const float* p = weights + (b * heads + h) * steps * columns;
      for (int64_t j = 0; j < steps + window - 1; ++j) {
        const int64_t from = j - window + 1 < 0 ? 0 : j - window + 1, to = least(steps - 1, j);
        for (int64_t i = 0; i < size; i += VL) {
          const int64_t left = size - i;
          vec key = {}, value = {};
          for (int64_t t = from; t <= to; ++t) {
            const float weight = p[t * columns + j - t];
            if (weight == 0.0f) continue;
            const int64_t place = ((b * steps + t) * heads + h) * size + i;
            key += load_n(query + place, left) * grad_scores[t * window + j - t];
            value += load_n(grad + place, left) * weight;
          }
          const int64_t entry = ((b * (steps + window) + j) * heads + h) * size + i;
          store_n(grad_keys + entry, key, left);
          store_n(grad_values + entry, value, left);
        }
      }
      if (age_key)
        for (int64_t c = 0; c < window; ++c)
          for (int64_t i = 0; i < size; i += VL) {
            const int64_t left = size - i;
            float* to = grad_age_key + (h * window + window - 1 - c) * size + i;
            vec total = load_n(to, left);
            for (int64_t t = 0; t < steps; ++t)
              if (p[t * columns + c] != 0.0f)
                total += load_n(query + ((b * steps + t) * heads + h) * size + i, left) * grad_scores[t * window + c];
            store_n(to, total, left);
          }
    }
}

namespace {

// Entries c of one row that a step reads: the first ones of an episode, then those of the window.
struct Entries {
  const float* first;
  const float* window;
  int64_t firsts, width;
  const float* operator[](int64_t c) const { return c < firsts ? first + c * width : window + (c - firsts) * width; }
};

// scores[h * count + c] += wanted[h] (E) . entry[c] for G heads and the visible entries; those of invisible ones become zero.
template <int G>
inline void score(const float* wanted, const Entries& entries, const uint8_t* visible, int64_t count, float* scores) {
  const int64_t width = entries.width;
  for (int64_t c = 0; c < count; c += 2) {  // two entries at a time, so that sums do not wait for each other
    const bool one = visible[c], two = c + 1 < count && visible[c + 1];
    vec sums[2][G] = {};
    if (one || two) {
      const float *e0 = entries[one ? c : c + 1], *e1 = entries[two ? c + 1 : c];
      for (int64_t i = 0; i < width; i += VL) {
        const int64_t left = width - i;
        const vec x0 = load_n(e0 + i, left), x1 = load_n(e1 + i, left);
        for (int h = 0; h < G; ++h) {
          const vec w = load_n(wanted + h * width + i, left);
          sums[0][h] += x0 * w;
          sums[1][h] += x1 * w;
        }
      }
    }
    for (int h = 0; h < G; ++h) {
      float* to = scores + h * count + c;
      to[0] = one ? to[0] + sum(sums[0][h]) : 0.0f;
      if (c + 1 < count) to[1] = two ? to[1] + sum(sums[1][h]) : 0.0f;
    }
  }
}

// mixed[h] (E) = sum_c p[h * count + c] entry[c] for G heads and the visible entries.
template <int G>
inline void mix(const float* p, const Entries& entries, const uint8_t* visible, int64_t count, float* mixed) {
  const int64_t width = entries.width;
  for (int64_t i = 0; i < width; i += 2 * VL) {
    const int64_t left = width - i, more = left - VL;
    vec sums[G][2] = {};
    for (int64_t c = 0; c < count; ++c) {
      if (!visible[c]) continue;
      const float* entry = entries[c] + i;
      const vec e0 = load_n(entry, left), e1 = more > 0 ? load_n(entry + VL, more) : vec{};
      for (int h = 0; h < G; ++h) {
        sums[h][0] += e0 * p[h * count + c];
        sums[h][1] += e1 * p[h * count + c];
      }
    }
    for (int h = 0; h < G; ++h) {
      store_n(mixed + h * width + i, sums[h][0], left);
      if (more > 0) store_n(mixed + h * width + i + VL, sums[h][1], more);
    }
  }
}

// The heads in groups of four, which share the loads of the entries.
inline void score_heads(const float* wanted, const Entries& entries, const uint8_t* visible, int64_t heads, int64_t count,
                        float* scores) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) score<4>(wanted + h * entries.width, entries, visible, count, scores + h * count);
  for (; h < heads; ++h) score<1>(wanted + h * entries.width, entries, visible, count, scores + h * count);
}
inline void mix_heads(const float* p, const Entries& entries, const uint8_t* visible, int64_t heads, int64_t count, float* mixed) {
  int64_t h = 0;
  for (; h + 4 <= heads; h += 4) mix<4>(p + h * count, entries, visible, count, mixed + h * entries.width);
  for (; h < heads; ++h) mix<1>(p + h * count, entries, visible, count, mixed + h * entries.width);
}

// Floats of the packed weights of one head from `depth` to `columns` features.
inline int64_t head_size(int64_t columns, int64_t depth) { return (columns + 2 * VL - 1) / (2 * VL) * 2 * VL * depth; }

// Softmax of the scores p of the entries from..count - 1, those that are invisible set to zero, and of the null entry's score.
inline float attention_weights(float* p, const uint8_t* visible, int64_t from, int64_t count, float null) {
  float largest = null;
  for (int64_t c = from; c < count; ++c)
    if (visible[c] && p[c] > largest) largest = p[c];
  vec total = {};
  for (int64_t c = from; c < count; c += VL) {
    vec e = exp_v(load_n(p + c, count - c) - largest);
    for (int i = 0; i < VL; ++i)
      if (c + i >= count || !visible[c + i]) e[i] = 0.0f;
    total += e;
    store_n(p + c, e, count - c);
  }
  const float own = std::exp(null - largest), norm = 1.0f / (sum(total) + own);
  for (int64_t c = from; c < count; ++c) p[c] = visible[c] ? p[c] * norm : 0.0f;
  return own * norm;
}

}  // namespace

// One step of attention to keys and values that two linear layers make of entries, without making them: see
// AttentionMemory.attend_projected. query (B, H, d), of a product with 1/sqrt(d). first (B, F, E) and entries (B, S, E), both
// contiguous. key, value: weights of the heads one after the other, packed from d to E and from E to d features. visible (B, F + S);
// bias (B, H, F + S); null_logits (B, H). context (B, H, d); weights (B, H, F + S); null_weights (B, H). scratch (2 B H E).
EXPORT void KERNEL(attend_projected)(const float* query, const float* first, const float* entries, const float* key,
                                     const float* value, const uint8_t* visible, const float* bias, const float* null_logits,
                                     float* context, float* weights, float* null_weights, float* scratch, int64_t batch,
                                     int64_t heads, int64_t size, int64_t firsts, int64_t slots, int64_t width) {
  const int64_t count = firsts + slots, row_width = heads * width;
  float *wanted = scratch, *mixed = scratch + batch * row_width;
  for (int64_t h = 0; h < heads; ++h)
    affine<NONE>(query + h * size, heads * size, key + h * head_size(width, size), nullptr, wanted + h * width, row_width, batch,
                 size, width);
  for (int64_t b = 0; b < batch; ++b) {
    const Entries row = {first + b * firsts * width, entries + b * slots * width, firsts, width};
    const uint8_t* seen = visible + b * count;
    float* p = weights + b * heads * count;
    std::memcpy(p, bias + b * heads * count, heads * count * sizeof(float));
    score_heads(wanted + b * row_width, row, seen, heads, count, p);
    for (int64_t h = 0; h < heads; ++h)
      null_weights[b * heads + h] = attention_weights(p + h * count, seen, 0, count, null_logits[b * heads + h]);
    mix_heads(p, row, seen, heads, count, mixed + b * row_width);
  }
  for (int64_t h = 0; h < heads; ++h)
    affine<NONE>(mixed + h * width, row_width, value + h * head_size(size, width), nullptr, context + h * size, heads * size, batch,
                 width, size);
}
RECORDABLE(attend_projected)

// One step of the ring memory. query (B, H, d), of a product with 1/sqrt(d). first (B, F, E): the first inputs of the episode; entries
// (B, S, E): the last ones, oldest first. since (B): steps of the episode so far. key, value: as in attend_projected. age_key:
// from d to S features of each head, packed, oldest first; age_bias (H, S), oldest first. first_key (F, H, d); first_bias (H, F). null_key, null_value (H, d). context (B, H, d),
// with the null entry's part; weights (B, H, F + S); null_weights (B, H). scratch (2 B H E), visible (F + S).
EXPORT void KERNEL(ring_step)(const float* query, const float* first, const float* entries, const float* since, const float* key,
                              const float* value, const float* age_key, const float* age_bias, const float* first_key,
                              const float* first_bias, const float* null_key, const float* null_value, float* context,
                              float* weights, float* null_weights, float* scratch, uint8_t* visible, int64_t batch, int64_t heads,
                              int64_t size, int64_t firsts, int64_t slots, int64_t width) {
  const int64_t count = firsts + slots, row_width = heads * width;
  float *wanted = scratch, *mixed = scratch + batch * row_width;
  for (int64_t h = 0; h < heads; ++h)
    affine<NONE>(query + h * size, heads * size, key + h * head_size(width, size), nullptr, wanted + h * width, row_width, batch,
                 size, width);
  for (int64_t h = 0; h < heads; ++h)
    affine<NONE>(query + h * size, heads * size, age_key + h * head_size(slots, size), age_bias + h * slots,
                 weights + h * count + firsts, heads * count, batch, size, slots);
  for (int64_t b = 0; b < batch; ++b) {
    const Entries row = {first + b * firsts * width, entries + b * slots * width, firsts, width};
    for (int64_t c = 0; c < firsts; ++c) visible[c] = since[b] - (float)c > (float)slots;
    for (int64_t c = 0; c < slots; ++c) visible[firsts + c] = (float)(slots - c) <= since[b];
    float* p = weights + b * heads * count;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t c = 0; c < firsts; ++c)
        if (visible[c])
          p[h * count + c] = dot(query + (b * heads + h) * size, first_key + (c * heads + h) * size, size) + first_bias[h * firsts + c];
    score_heads(wanted + b * row_width, row, visible, heads, count, p);
    for (int64_t h = 0; h < heads; ++h) {
      const float* q = query + (b * heads + h) * size;
      null_weights[b * heads + h] = attention_weights(p + h * count, visible, 0, count, dot(q, null_key + h * size, size));
    }
    mix_heads(p, row, visible, heads, count, mixed + b * row_width);
  }
  for (int64_t h = 0; h < heads; ++h)
    affine<NONE>(mixed + h * width, row_width, value + h * head_size(size, width), nullptr, context + h * size, heads * size, batch,
                 width, size);
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      add_scaled(context + (b * heads + h) * size, null_value + h * size, null_weights[b * heads + h], size);
}
RECORDABLE(ring_step)

// Shift registers of `slots` vectors: out (B, S, E) = [entries (B, S, E) without the oldest, x (B, E)]. Rows whose keep (B) is 0 begin
// with zeros; keep may be null.
EXPORT void KERNEL(shift)(const float* entries, const float* x, const uint8_t* keep, float* out, int64_t batch, int64_t slots,
                          int64_t width) {
  const int64_t older = (slots - 1) * width;
  for (int64_t b = 0; b < batch; ++b, out += slots * width) {
    if (!keep || keep[b]) std::memcpy(out, entries + b * slots * width + width, older * sizeof(float));
    else std::memset(out, 0, older * sizeof(float));
    std::memcpy(out + older, x + b * width, width * sizeof(float));
  }
}
RECORDABLE(shift)

// One step of attention to stored keys and values. query (B, H, d); keys, values (B, S, H, d), oldest first; since (B). null_key,
// null_value (H, d). context (B, H, d), with the null entry's part; weights (B, H, S); null_weights (B, H). visible (S).
EXPORT void KERNEL(kv_step)(const float* query, const float* keys, const float* values, const float* since, const float* null_key,
                            const float* null_value, float* context, float* weights, float* null_weights, uint8_t* visible,
                            int64_t batch, int64_t heads, int64_t size, int64_t slots) {
  const float scale = 1.0f / std::sqrt((float)size);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < slots; ++c) visible[c] = (float)(slots - c) <= since[b];
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t place = b * heads + h;
      const float *q = query + place * size, *k = keys + (b * slots * heads + h) * size;
      const float* v = values + (b * slots * heads + h) * size;
      float *p = weights + place * slots, *out = context + place * size;
      for (int64_t c = 0; c < slots; ++c) p[c] = visible[c] ? dot(q, k + c * heads * size, size) * scale : 0.0f;
      const float null = attention_weights(p, visible, 0, slots, dot(q, null_key + h * size, size) * scale);
      null_weights[place] = null;
      for (int64_t i = 0; i < size; i += VL) {
        vec total = load_n(null_value + h * size + i, size - i) * null;
        for (int64_t c = 0; c < slots; ++c)
          if (visible[c]) total += load_n(v + c * heads * size + i, size - i) * p[c];
        store_n(out + i, total, size - i);
      }
    }
  }
}
RECORDABLE(kv_step)

namespace {

// The slots of one row of the pmm memory, see Slots in pmm.py.
struct SlotRow {
  int64_t* item;
  uint8_t* occupied;
  float *usage, *age;
  int64_t slots;

  void reset() {
    std::memset(occupied, 0, slots);
    for (int64_t s = 0; s < slots; ++s) usage[s] = age[s] = 0.0f;
  }

  // After the read of a step: usage, eviction, age. dominant (S): whether a head gave the slot more than half of its attention.
  void update(const uint8_t* dominant, bool open, int64_t new_item, float usage_decay) {
    float least = INFINITY;  // a NaN stays, as in the forms of PyTorch and NumPy
    for (int64_t s = 0; s < slots; ++s) {
      // The product is rounded before the addition, as in acting: equal usages must be equal in both. A product of floats is exact
      // in double, so that the conversion rounds it.
      usage[s] = static_cast<float>(static_cast<double>(usage[s]) * usage_decay);
      if (dominant[s]) usage[s] += 1.0f;
      const float rank = occupied[s] ? usage[s] : -1.0f;  // empty slots are written first
      if (least == least && !(rank >= least)) least = rank;
    }
    int64_t victim = 0;
    float oldest = -INFINITY;
    for (int64_t s = 0; s < slots; ++s) {
      const float candidate = (occupied[s] ? usage[s] : -1.0f) == least ? age[s] : -1.0f;
      if (candidate > oldest) victim = s, oldest = candidate;
    }
    for (int64_t s = 0; s < slots; ++s) age[s] = occupied[s] ? age[s] + 1.0f : 0.0f;
    if (!open && !(least <= 0.0f)) return;
    item[victim] = new_item;
    occupied[victim] = 1;
    usage[victim] = open ? 1.0f : 0.0f;
    age[victim] = 0.0f;
  }
};

}  // namespace

// The pmm memory over a sequence: reads of the slots, and evictions. The items are the S of the state and the T of the steps. query (B, T,
// H, d); keys, values (B, S + T, H, d); bias (B, S + T): added to the scores of an item; null_logits (B, T, H); open (B, T): whether
// the write gate is open; keep (B, T) or null. item, occupied, usage, age (B, S): the slots; in, before the first step; out, after
// the last. context (B, T, H, d), without the null entry's part; weights (B, T, H, S); null_weights (B, T, H); items, seen (B, T, S): the
// item of each slot at the read of each step, and whether the slot is occupied. dominant (S): scratch.
EXPORT void KERNEL(pmm_forward)(const float* query, const float* keys, const float* values, const float* bias,
                                const float* null_logits, const uint8_t* open, const uint8_t* keep, int64_t* item,
                                uint8_t* occupied, float* usage, float* age, float* context, float* weights, float* null_weights,
                                int64_t* items, uint8_t* seen, uint8_t* dominant, int64_t batch, int64_t steps, int64_t heads,
                                int64_t size, int64_t slots, float usage_decay) {
  const float scale = 1.0f / std::sqrt((float)size);
  const int64_t row = heads * size;
  for (int64_t b = 0; b < batch; ++b) {
    SlotRow table = {item + b * slots, occupied + b * slots, usage + b * slots, age + b * slots, slots};
    const float *k = keys + b * (slots + steps) * row, *v = values + b * (slots + steps) * row;
    const float* added = bias + b * (slots + steps);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t place = b * steps + t;
      if (keep && !keep[place]) table.reset();
      std::memcpy(items + place * slots, table.item, slots * sizeof(int64_t));
      std::memcpy(seen + place * slots, table.occupied, slots);
      std::memset(dominant, 0, slots);
      for (int64_t h = 0; h < heads; ++h) {
        const float* q = query + place * row + h * size;
        float *p = weights + (place * heads + h) * slots, *out = context + place * row + h * size;
        for (int64_t s = 0; s < slots; ++s)
          p[s] = table.occupied[s] ? dot(q, k + table.item[s] * row + h * size, size) * scale + added[table.item[s]] : 0.0f;
        null_weights[place * heads + h] = attention_weights(p, table.occupied, 0, slots, null_logits[place * heads + h]);
        for (int64_t s = 0; s < slots; ++s) dominant[s] |= p[s] > 0.5f;  // false for NaN
        for (int64_t i = 0; i < size; i += VL) {
          vec total = {};
          for (int64_t s = 0; s < slots; ++s)
            if (table.occupied[s]) total += load_n(v + table.item[s] * row + h * size + i, size - i) * p[s];
          store_n(out + i, total, size - i);
        }
      }
      table.update(dominant, open[place], slots + t, usage_decay);
    }
  }
}

// Its backward. grad (B, T, H, d): of the context; grad_null (B, T, H): of the null entry's weight. grad_query (B, T, H, d) and
// grad_null_logits (B, T, H): out. grad_keys, grad_values (B, S + T, H, d) and grad_bias (B, S + T): in, zeros; out, the gradients.
// scratch (S).
EXPORT void KERNEL(pmm_backward)(const float* query, const float* keys, const float* values, const float* weights,
                                 const float* null_weights, const int64_t* items, const uint8_t* seen, const float* grad,
                                 const float* grad_null, float* grad_query, float* grad_keys, float* grad_values, float* grad_bias,
                                 float* grad_null_logits, float* scratch, int64_t batch, int64_t steps, int64_t heads,
                                 int64_t size, int64_t slots) {
  const float scale = 1.0f / std::sqrt((float)size);
  const int64_t row = heads * size;
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t first = b * (slots + steps);
    for (int64_t place = b * steps; place < (b + 1) * steps; ++place) {
      const int64_t* item = items + place * slots;
      const uint8_t* visible = seen + place * slots;
      for (int64_t h = 0; h < heads; ++h) {
        const float *q = query + place * row + h * size, *g = grad + place * row + h * size;
        const float* p = weights + (place * heads + h) * slots;
        const float null = null_weights[place * heads + h], d_null = grad_null[place * heads + h];
        float mean = null * d_null;
        for (int64_t s = 0; s < slots; ++s)
          if (visible[s]) {
            scratch[s] = dot(g, values + (first + item[s]) * row + h * size, size);
            mean += p[s] * scratch[s];
          }
        grad_null_logits[place * heads + h] = null * (d_null - mean);
        float* dq = grad_query + place * row + h * size;
        std::memset(dq, 0, size * sizeof(float));
        for (int64_t s = 0; s < slots; ++s)
          if (visible[s]) {
            const int64_t entry = (first + item[s]) * row + h * size;
            const float d = p[s] * (scratch[s] - mean);
            grad_bias[first + item[s]] += d;
            add_scaled(dq, keys + entry, d * scale, size);
            add_scaled(grad_keys + entry, q, d * scale, size);
            add_scaled(grad_values + entry, g, p[s], size);
          }
      }
    }
  }
}
