// Kernels of a Mamba-2 layer over a sequence: short convolution, state-space recurrence, gated norm. See kernels.cpp for the rules that
// all kernels keep.
//
// The step stride of an input is the number of floats from one step to the next; its rows are `steps` such strides apart.

#include "kernels.h"
#include "thunk.h"
#include "vectors.h"

// A block of channels is inlined twice, for whole vectors and for the rest: then whole vectors are loaded without a test.
#define ALWAYS_INLINE __attribute__((always_inline))

// --- convolution ---------------------------------------------------------------------------------------------------------

namespace {

// The inputs of a causal convolution of one row: those of the sequence, and before them those of the state.
struct ConvInputs {
  const float* x;
  const float* state;
  int64_t step, past, channels;
  const float* operator[](int64_t t) const { return t < 0 ? state + (past + t) * channels : x + t * step; }
};

// Steps since the last reset, the reset included; grows without a bound if there was none.
inline int64_t steps_since(int64_t since, const uint8_t* keep, int64_t t) { return keep && !keep[t] ? 0 : since + 1; }

// Inputs n of the convolution at step t for VL channels from c on: the sum over the visible lags.
inline vec convolve(const ConvInputs& inputs, const float* weight, const float* bias, int64_t t, int64_t lags, int64_t c,
                    int64_t left) {
  vec total = load_n(bias + c, left);
  for (int64_t lag = 0; lag <= lags; ++lag)
    total += load_n(inputs[t - lag] + c, left) * load_n(weight + (inputs.past - lag) * inputs.channels + c, left);
  return total;
}

}  // namespace

// A causal depthwise convolution over a sequence, see causal_conv.py. x (B, T, C) with a step stride; state (B, W - 1, C): the inputs
// before, newest last; weight (W, C): the last tap is that of the current step; bias (C); keep (B, T) or null. y (B, T, C), after a
// SiLU if `silu`. last (B, W - 1, C): the last inputs, zeros where they belong to an earlier episode.
EXPORT void KERNEL(conv_forward)(const float* x, int64_t step, const float* state, const float* weight, const float* bias,
                                 const uint8_t* keep, float* y, float* last, int64_t batch, int64_t steps, int64_t channels,
                                 int64_t past, int32_t silu) {
  for (int64_t b = 0; b < batch; ++b) {
    const ConvInputs inputs = {x + b * steps * step, state + b * past * channels, step, past, channels};
    int64_t since = past;
    for (int64_t t = 0; t < steps; ++t) {
      since = steps_since(since, keep ? keep + b * steps : nullptr, t);
      const auto block = [&](int64_t c, int64_t left) ALWAYS_INLINE {
        const vec total = convolve(inputs, weight, bias, t, least(since, past), c, left);
        store_n(y + (b * steps + t) * channels + c, silu ? activate<SILU>(total) : total, left);
      };
      int64_t c = 0;
      for (; c + VL <= channels; c += VL) block(c, VL);
      if (c < channels) block(c, channels - c);
    }
    for (int64_t i = 0; i < past; ++i) {
      float* to = last + (b * past + i) * channels;
      if (past - 1 - i <= since) std::memcpy(to, inputs[steps - past + i], channels * sizeof(float));
      else std::memset(to, 0, channels * sizeof(float));
    }
  }
}

// Its backward. grad (B, T, C); grad_last (B, W - 1, C). grad_x (B, T, C), grad_state (B, W - 1, C), grad_weight (W, C), grad_bias (C): in,
// zeros; out, the gradients. A gradient of zero stays zero, whatever the inputs are.
EXPORT void KERNEL(conv_backward)(const float* x, int64_t step, const float* state, const float* weight, const float* bias,
                                  const uint8_t* keep, const float* grad, const float* grad_last, float* grad_x, float* grad_state,
                                  float* grad_weight, float* grad_bias, int64_t batch, int64_t steps, int64_t channels, int64_t past,
                                  int32_t silu) {
  for (int64_t b = 0; b < batch; ++b) {
    const ConvInputs inputs = {x + b * steps * step, state + b * past * channels, step, past, channels};
    float *to_x = grad_x + b * steps * channels, *to_state = grad_state + b * past * channels;
    int64_t since = past;
    for (int64_t t = 0; t < steps; ++t) {
      since = steps_since(since, keep ? keep + b * steps : nullptr, t);
      const int64_t lags = least(since, past);
      const auto block = [&](int64_t c, int64_t left) ALWAYS_INLINE {
        const vec g = load_n(grad + (b * steps + t) * channels + c, left);
        vec d = g;
        if (silu) {
          const vec total = convolve(inputs, weight, bias, t, lags, c, left), s = sigmoid_v(total);
          d = g == 0.0f ? g : g * s * (1.0f + total * (1.0f - s));
        }
        store_n(grad_bias + c, load_n(grad_bias + c, left) + d, left);
        for (int64_t lag = 0; lag <= lags; ++lag) {
          const int64_t tap = (past - lag) * channels + c;
          const vec input = g == 0.0f ? g : load_n(inputs[t - lag] + c, left);
          store_n(grad_weight + tap, load_n(grad_weight + tap, left) + d * input, left);
          float* to = (t < lag ? to_state + (past + t - lag) * channels : to_x + (t - lag) * channels) + c;
          store_n(to, load_n(to, left) + d * load_n(weight + tap, left), left);
        }
      };
      int64_t c = 0;
      for (; c + VL <= channels; c += VL) block(c, VL);
      if (c < channels) block(c, channels - c);
    }
    for (int64_t i = 0; i < past; ++i) {
      const int64_t t = steps - past + i;
      float* to = t < 0 ? to_state + (past + t) * channels : to_x + t * channels;
      const float* from = grad_last + (b * past + i) * channels;
      if (past - 1 - i <= since)
        for (int64_t c = 0; c < channels; c += VL) store_n(to + c, load_n(to + c, channels - c) + load_n(from + c, channels - c), channels - c);
    }
  }
}

// --- recurrence ----------------------------------------------------------------------------------------------------------
// A state of one head is (N, P) here, P rounded up to whole vectors: then no product needs a sum over the lanes of a vector.

namespace {

constexpr int64_t SEGMENT = 16;  // steps between two saved states; the backward computes those between them again
constexpr int RETREAT_VECTORS = 2;

inline int64_t padded(int64_t width) { return (width + VL - 1) / VL * VL; }

inline void to_columns(const float* state, float* columns, int64_t width, int64_t size) {  // (P, N) to (N, P), zeros behind
  const int64_t ld = padded(width);
  for (int64_t n = 0; n < size; ++n)
    for (int64_t p = 0; p < ld; ++p) columns[n * ld + p] = p < width ? state[p * size + n] : 0.0f;
}
inline void to_rows(const float* columns, float* state, int64_t width, int64_t size) {
  for (int64_t p = 0; p < width; ++p)
    for (int64_t n = 0; n < size; ++n) state[p * size + n] = columns[n * padded(width) + p];
}

inline float product(const float* b, const float* c, int64_t size) {
  vec total = {};
  for (int64_t n = 0; n < size; n += VL) total += load_n(b + n, size - n) * load_n(c + n, size - n);
  return sum(total);
}

// One step of M vectors of a head: after = decay before + write b^T, y += decay before c. The states may be the same. What the step
// itself writes is read as write (b . c) instead, in y and in the backward: then the rounding of b . c is a factor of all features,
// which the norm behind the recurrence cancels.
template <int M>
inline void ssd_advance(const float* before, float* after, int64_t ld, int64_t size, float decay, const vec (&write)[M],
                        const float* b, const float* c, vec (&y)[M]) {
  for (int64_t n = 0; n < size; ++n)
    for (int v = 0; v < M; ++v) {
      const vec faded = load(before + n * ld + v * VL) * decay;
      store(after + n * ld + v * VL, faded + write[v] * b[n]);
      y[v] += faded * c[n];
    }
}

// One step of a head: x, y (P) or y null.
template <int M>
inline int64_t ssd_advance_from(int64_t p, const float* x, float dt, float decay, const float* b, const float* c, float d,
                                const float* before, float* after, float* y, int64_t width, int64_t size) {
  const int64_t ld = padded(width);
  const float own = d + dt * product(b, c, size);
  for (; p + (M - 1) * VL < width; p += M * VL) {
    vec write[M], out[M];
    for (int v = 0; v < M; ++v) {
      const vec input = load_n(x + p + v * VL, width - p - v * VL);
      write[v] = input * dt;
      out[v] = input * own;
    }
    ssd_advance<M>(before + p, after + p, ld, size, decay, write, b, c, out);
    if (y)
      for (int v = 0; v < M; ++v) store_n(y + p + v * VL, out[v], width - p - v * VL);
  }
  return p;
}
inline void ssd_head(const float* x, float dt, float decay, const float* b, const float* c, float d, const float* before,
                     float* after, float* y, int64_t width, int64_t size) {
  const int64_t p = ssd_advance_from<4>(0, x, dt, decay, b, c, d, before, after, y, width, size);
  ssd_advance_from<1>(p, x, dt, decay, b, c, d, before, after, y, width, size);
}

inline void ssd_decays(const float* dt, const float* a, float* decays, int64_t heads) {
  for (int64_t h = 0; h < heads; h += VL) store_n(decays + h, exp_v(load_n(dt + h, heads - h) * load_n(a + h, heads - h)), heads - h);
}

// Backward of one step of M vectors of a head. carried (N, P): in, gradient of the state after the step, from later steps; out,
// of the state before it. READ: whether the output has a gradient; if not, a `c` or an `after` that is NaN has no effect. grad_b, grad_c (N,
// VL) are added to. read: sum over n of carried b; faded: sum over n of G before, with the gradient G of the state after the step.
template <int M, bool READ>
inline void ssd_retreat(const float* before, const float* after, float* carried, int64_t ld, int64_t size, float decay,
                        const vec (&write)[M], const vec (&grad)[M], const float* b, const float* c, float* grad_b, float* grad_c,
                        vec (&read)[M], vec& faded) {
  for (int64_t n = 0; n < size; ++n) {
    vec of_b = load(grad_b + n * VL), of_c = READ ? load(grad_c + n * VL) : vec{};
    for (int v = 0; v < M; ++v) {
      const int64_t place = n * ld + v * VL;
      vec total = load(carried + place);
      read[v] += total * b[n];
      if (READ) {
        total += grad[v] * c[n];
        of_c += grad[v] * load(after + place);
      }
      faded += total * load(before + place);
      of_b += write[v] * total;
      store(carried + place, total * decay);
    }
    store(grad_b + n * VL, of_b);
    if (READ) store(grad_c + n * VL, of_c);
  }
}

// One step of a head at a time of the backward: its inputs, and sums over its features.
struct HeadStep {
  const float *x, *grad, *b, *c, *before, *after;
  float *carried, *grad_x, *grad_b, *grad_c;
  float dt, decay, d, own;  // own: b . c
  vec by_x, by_decay, by_d;
};

template <int M, bool READ>
inline int64_t ssd_retreat_from(int64_t p, HeadStep& step, int64_t width, int64_t size) {
  for (; p + (M - 1) * VL < width; p += M * VL) {
    vec in[M], out[M], write[M], read[M] = {};
    for (int v = 0; v < M; ++v) {
      in[v] = load_n(step.x + p + v * VL, width - p - v * VL);
      out[v] = load_n(step.grad + p + v * VL, width - p - v * VL);
      write[v] = in[v] * step.dt;
    }
    ssd_retreat<M, READ>(step.before + p, step.after + p, step.carried + p, padded(width), size, step.decay, write, out, step.b, step.c,
                         step.grad_b, step.grad_c, read, step.by_decay);
    for (int v = 0; v < M; ++v) {
      if (READ) read[v] += out[v] * step.own;
      store_n(step.grad_x + p + v * VL, read[v] * step.dt + out[v] * step.d, width - p - v * VL);
      step.by_x += read[v] * in[v];
      step.by_d += out[v] * in[v];
    }
  }
  return p;
}
template <bool READ>
inline void ssd_retreat_head(HeadStep& step, int64_t width, int64_t size) {
  const int64_t p = ssd_retreat_from<RETREAT_VECTORS, READ>(0, step, width, size);
  ssd_retreat_from<1, READ>(p, step, width, size);
}

}  // namespace

// Floats of the states that ssd_forward saves for the backward.
EXPORT int64_t KERNEL(ssd_saved_size)(int64_t batch, int64_t steps, int64_t heads, int64_t width, int64_t size) {
  return batch * ((steps + SEGMENT - 1) / SEGMENT) * heads * size * padded(width);
}
// Floats of scratch of both.
EXPORT int64_t KERNEL(ssd_scratch_size)(int64_t heads, int64_t width, int64_t size) {
  return (heads + SEGMENT + 2) * size * padded(width) + 2 * SEGMENT * size * VL + (SEGMENT + 1) * heads;
}

// The recurrence of Mamba-2 over a sequence, see ssd.py. x (B, T, H, P), b, c (B, T, G, N), each with a step stride; dt (B, T, H); a, d (H);
// state (B, H, P, N); keep (B, T) or null. y (B, T, H, P); last (B, H, P, N): the state after the last step; saved: see ssd_saved_size.
EXPORT void KERNEL(ssd_forward)(const float* x, int64_t x_step, const float* dt, const float* a, const float* b, int64_t b_step,
                                const float* c, int64_t c_step, const float* d, const float* state, const uint8_t* keep, float* y,
                                float* last, float* saved, float* scratch, int64_t batch, int64_t steps, int64_t heads,
                                int64_t width, int64_t groups, int64_t size) {
  const int64_t one = size * padded(width), all = heads * one;
  float *now = scratch, *decays = scratch + all;
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t h = 0; h < heads; ++h) to_columns(state + (row * heads + h) * width * size, now + h * one, width, size);
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t place = row * steps + t;
      if (keep && !keep[place]) std::memset(now, 0, all * sizeof(float));
      if (t % SEGMENT == 0) {
        std::memcpy(saved, now, all * sizeof(float));
        saved += all;
      }
      ssd_decays(dt + place * heads, a, decays, heads);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t group = h * groups / heads * size;
        ssd_head(x + place * x_step + h * width, dt[place * heads + h], decays[h], b + place * b_step + group,
                 c + place * c_step + group, d[h], now + h * one, now + h * one, y + (place * heads + h) * width, width, size);
      }
    }
    for (int64_t h = 0; h < heads; ++h) to_rows(now + h * one, last + (row * heads + h) * width * size, width, size);
  }
}

// Its backward. grad (B, T, H, P): of y; grad_last (B, H, P, N): of the last state. grad_x (B, T, H, P), grad_dt (B, T, H), grad_b, grad_c
// (B, T, G, N), grad_state (B, H, P, N): out. grad_a, grad_d (H): in, zeros; out, the gradients. What no gradient reaches has no effect
// on any of them, even if it is NaN.
EXPORT void KERNEL(ssd_backward)(const float* x, int64_t x_step, const float* dt, const float* a, const float* b, int64_t b_step,
                                 const float* c, int64_t c_step, const float* d, const uint8_t* keep, const float* saved,
                                 const float* grad, const float* grad_last, float* grad_x, float* grad_dt, double* grad_a,
                                 float* grad_b, float* grad_c, double* grad_d, float* grad_state, float* scratch, int64_t batch,
                                 int64_t steps, int64_t heads, int64_t width, int64_t groups, int64_t size) {
  const int64_t ld = padded(width), one = size * ld, all = heads * one, segments = (steps + SEGMENT - 1) / SEGMENT;
  float *carried = scratch, *states = carried + all, *zeros = states + (SEGMENT + 1) * one;  // states: of one head, of a segment
  float *sum_b = zeros + one, *sum_c = sum_b + SEGMENT * size * VL, *decays = sum_c + SEGMENT * size * VL;
  float* live = decays + SEGMENT * heads;  // whether any gradient is carried
  std::memset(zeros, 0, one * sizeof(float));
  for (int64_t row = 0; row < batch; ++row) {
    for (int64_t h = 0; h < heads; ++h) {
      to_columns(grad_last + (row * heads + h) * width * size, carried + h * one, width, size);
      live[h] = 0.0f;
      for (int64_t i = 0; i < one; ++i)
        if (carried[h * one + i] != 0.0f) live[h] = 1.0f;
    }
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
      const int64_t first = row * steps + segment * SEGMENT, count = least(SEGMENT, steps - segment * SEGMENT);
      const uint8_t* kept = keep ? keep + first : nullptr;
      for (int64_t i = 0; i < count; ++i) ssd_decays(dt + (first + i) * heads, a, decays + i * heads, heads);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t group = h * groups / heads;
        if (h * groups % heads == 0) std::memset(sum_b, 0, 2 * SEGMENT * size * VL * sizeof(float));
        std::memcpy(states, saved + (row * segments + segment) * all + h * one, one * sizeof(float));
        for (int64_t i = 0; i < count; ++i) {
          const float* before = kept && !kept[i] ? zeros : states + i * one;
          const int64_t place = first + i;
          ssd_head(x + place * x_step + h * width, dt[place * heads + h], decays[i * heads + h], b + place * b_step + group * size,
                   c + place * c_step + group * size, 0.0f, before, states + (i + 1) * one, nullptr, width, size);
        }
        for (int64_t i = count - 1; i >= 0; --i) {
          const int64_t place = first + i;
          const bool reset = kept && !kept[i];
          const float* g = grad + (place * heads + h) * width;
          float* to = grad_x + (place * heads + h) * width;
          bool read = false;
          for (int64_t p = 0; p < width; ++p) read = read || g[p] != 0.0f;
          if (!read && live[h] == 0.0f) {
            std::memset(to, 0, width * sizeof(float));
            grad_dt[place * heads + h] = 0.0f;
            continue;
          }
          HeadStep step = {};
          step.x = x + place * x_step + h * width;
          step.grad = g;
          step.b = b + place * b_step + group * size;
          step.c = c + place * c_step + group * size;
          step.before = reset ? zeros : states + i * one;
          step.after = states + (i + 1) * one;
          step.carried = carried + h * one;
          step.grad_x = to;
          step.grad_b = sum_b + i * size * VL;
          step.grad_c = sum_c + i * size * VL;
          step.dt = dt[place * heads + h];
          step.decay = decays[i * heads + h];
          step.d = d[h];
          step.own = product(step.b, step.c, size);
          if (read) ssd_retreat_head<true>(step, width, size);
          else ssd_retreat_head<false>(step, width, size);
          const float fade = reset ? 0.0f : sum(step.by_decay) * step.decay;
          grad_dt[place * heads + h] = sum(step.by_x) + fade * a[h];
          grad_a[h] += (double)fade * step.dt;
          if (read) grad_d[h] += sum(step.by_d);
          live[h] = 1.0f;
          if (reset) {
            std::memset(carried + h * one, 0, one * sizeof(float));
            live[h] = 0.0f;
          }
        }
        if ((h + 1) * groups % heads == 0)  // the last head of its group
          for (int64_t i = 0; i < count; ++i)
            for (int64_t n = 0; n < size; ++n) {
              const int64_t place = ((first + i) * groups + group) * size + n;
              grad_b[place] = sum(load(sum_b + (i * size + n) * VL));
              grad_c[place] = sum(load(sum_c + (i * size + n) * VL));
            }
      }
    }
    for (int64_t h = 0; h < heads; ++h) to_rows(carried + h * one, grad_state + (row * heads + h) * width * size, width, size);
  }
}

// --- norm ----------------------------------------------------------------------------------------------------------------

namespace {

// The input of the norm: y, or y silu(z).
inline vec gated(const float* y, const float* z, int64_t i, int64_t left) {
  const vec value = load_n(y + i, left);
  return z ? value * activate<SILU>(load_n(z + i, left)) : value;
}

}  // namespace

// Root-mean-square norm by group, with an optional gate: u = y silu(z), out = u / sqrt(mean(u^2) + eps) weight. y, out (rows, groups *
// size); z the same with a step stride, or null; weight (groups * size). scale (rows, groups): the factor of each group.
EXPORT void KERNEL(gated_norm)(const float* y, const float* z, int64_t z_step, const float* weight, float* out, float* scale,
                               int64_t rows, int64_t groups, int64_t size, float eps) {
  const int64_t width = groups * size;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const float *from = y + r * width + g * size, *gate = z ? z + r * z_step + g * size : nullptr;
      float* to = out + r * width + g * size;
      vec squares = {};
      for (int64_t i = 0; i < size; i += VL) {
        const vec u = gated(from, gate, i, size - i);
        squares += u * u;
        store_n(to + i, u, size - i);
      }
      const float factor = 1.0f / std::sqrt(sum(squares) / size + eps);
      for (int64_t i = 0; i < size; i += VL)
        store_n(to + i, load_n(to + i, size - i) * factor * load_n(weight + g * size + i, size - i), size - i);
      scale[r * groups + g] = factor;
    }
}
RECORDABLE(gated_norm)

// Its backward. grad (rows, groups * size): of out. grad_y, grad_z (the same; null if z is): out. grad_weight (groups * size): in, zeros;
// out, the gradient.
EXPORT void KERNEL(gated_norm_backward)(const float* y, const float* z, int64_t z_step, const float* weight, const float* scale,
                                        const float* grad, float* grad_y, float* grad_z, float* grad_weight, int64_t rows,
                                        int64_t groups, int64_t size) {
  const int64_t width = groups * size;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t place = r * width + g * size;
      const float *from = y + place, *gate = z ? z + r * z_step + g * size : nullptr, *w = weight + g * size;
      float* to_weight = grad_weight + g * size;
      const float factor = scale[r * groups + g];
      vec products = {};
      for (int64_t i = 0; i < size; i += VL) {
        const int64_t left = size - i;
        vec normed = load_n(from + i, left) * factor;
        if (gate) {
          const vec x = load_n(gate + i, left), s = sigmoid_v(x);
          store_n(grad_z + place + i, s, left);  // for the next loop
          normed *= x * s;
        }
        const vec d = load_n(grad + place + i, left);
        store_n(to_weight + i, load_n(to_weight + i, left) + d * normed, left);
        products += d * load_n(w + i, left) * normed;
      }
      const float mean = sum(products) / size;
      for (int64_t i = 0; i < size; i += VL) {
        const int64_t left = size - i;
        const vec value = load_n(from + i, left), of_normed = load_n(grad + place + i, left) * load_n(w + i, left);
        if (gate) {
          const vec x = load_n(gate + i, left), s = load_n(grad_z + place + i, left);
          const vec d = (of_normed - value * x * s * factor * mean) * factor;
          store_n(grad_y + place + i, d * x * s, left);
          store_n(grad_z + place + i, d * value * s * (1.0f + x * (1.0f - s)), left);
        } else {
          store_n(grad_y + place + i, (of_normed - value * factor * mean) * factor, left);
        }
      }
    }
}
