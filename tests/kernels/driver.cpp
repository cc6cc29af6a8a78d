// Calls every kernel with many sizes, for the sanitizers. Buffers have exactly the size that the kernel may touch, and are not
// aligned to vectors. `driver overrun`, `driver leak` and
// `driver undefined` plant a fault instead.
//
// It includes the sources, so no declaration is repeated here. A new kernel or operation gets a function and a row in CASES.
#include "kernels.cpp"
#include "mamba.cpp"
#include "operations.cpp"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <vector>

namespace {

// A heap buffer of n values in [-1, 1) whose first byte is 4 bytes after an aligned address.
class Buffer {
  public:
    explicit Buffer(int64_t n) : memory_(n + 1) {
        for (float& value : memory_) value = static_cast<float>(std::rand()) / static_cast<float>(RAND_MAX) * 2 - 1;
    }
    float* data() { return memory_.data() + 1; }
    float& operator[](int64_t i) { return memory_[i + 1]; }

  private:
    std::vector<float> memory_;
};

void check(bool condition, const char* kernel, int64_t n, int64_t i) {
    if (condition) return;
    std::fprintf(stderr, "%s: size %ld, element %ld is wrong\n", kernel, static_cast<long>(n), static_cast<long>(i));
    std::exit(1);
}

// Sizes that vary with n in different ways, so that remainders of vectors and of blocks of rows come together.
int64_t rows_of(int64_t n) { return n % 15 + 1; }
int64_t size_of(int64_t n) { return n % 41 + 1; }

float* null_or(Buffer& buffer, int64_t n) { return n % 2 ? buffer.data() : nullptr; }

std::vector<uint8_t> mask_of(int64_t n) {
    std::vector<uint8_t> mask(n);
    for (uint8_t& value : mask) value = std::rand() % 4 != 0;
    return mask;
}

void affine_case(int64_t n) {
    const int64_t rows = rows_of(n), depth = size_of(n), columns = size_of(3 * n);
    Buffer x(rows * depth), weight(columns * depth), bias(columns), y(rows * columns);
    Buffer packed(KERNEL(packed_size)(columns, depth));
    KERNEL(pack)(weight.data(), depth, 1, columns, depth, packed.data());
    for (int32_t activation = 0; activation < 4; ++activation) {
        KERNEL(affine)(x.data(), depth, packed.data(), null_or(bias, n), y.data(), columns, rows, depth, columns, activation);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) {
                double want = n % 2 ? bias[c] : 0;
                for (int64_t k = 0; k < depth; ++k) want += double(x[r * depth + k]) * weight[c * depth + k];
                if (activation == 1) want = std::tanh(want);
                if (activation == 2) want = want < 0 ? 0 : want;
                if (activation == 3) want /= 1 + std::exp(-want);
                check(std::abs(y[r * columns + c] - want) < 1e-5, "affine", n, r * columns + c);
            }
    }
}

void norms_case(int64_t n) {
    const int64_t rows = rows_of(n), size = size_of(n);
    Buffer x(rows * size), weight(size), bias(size), y(rows * size);
    KERNEL(layer_norm)(x.data(), weight.data(), bias.data(), y.data(), rows, size, 1e-5F, n % 2);
    KERNEL(rms_norm)(x.data(), y.data(), rows, size, 1e-6F);
    for (int64_t r = 0; r < rows; ++r) {
        double square = 0, before = 0;
        for (int64_t c = 0; c < size; ++c) square += double(y[r * size + c]) * y[r * size + c], before += double(x[r * size + c]) * x[r * size + c];
        check(before / size < 1e-3 || std::abs(square / size - 1) < 1e-2, "rms_norm", n, r);
    }
}

void gru_case(int64_t n) {
    const int64_t steps = n % 5 + 1, rows = rows_of(n), size = size_of(n);
    Buffer gates(steps * rows * 3 * size), states((steps + 1) * rows * size), weight(3 * size * size), bias(3 * size);
    Buffer new_h(steps * rows * size), scratch(rows * size), scratch2(2 * rows * size);
    Buffer packed(KERNEL(packed_gates_size)(3, size)), packed_t(KERNEL(packed_size)(size, 3 * size));
    KERNEL(pack_gates)(weight.data(), 3, size, packed.data());
    KERNEL(pack)(weight.data(), 1, size, size, 3 * size, packed_t.data());
    std::vector<uint8_t> keep = mask_of(steps * rows);
    const uint8_t* mask = n % 3 ? keep.data() : nullptr;
    KERNEL(gru_forward)(gates.data(), states.data(), packed.data(), bias.data(), new_h.data(), mask, scratch.data(), steps, rows, size);
    Buffer grad_h((steps + 1) * rows * size), grad_gates(steps * rows * 3 * size), grad_new(steps * rows * size);
    KERNEL(gru_backward)(gates.data(), states.data(), new_h.data(), packed_t.data(), grad_h.data(), grad_gates.data(),
                         grad_new.data(), mask, scratch2.data(), steps, rows, size);
    for (int64_t i = 0; i < rows * size; ++i) check(std::abs(states[steps * rows * size + i]) <= 1.01F, "gru_forward", n, i);
}

void lstm_case(int64_t n) {
    const int64_t steps = n % 5 + 1, rows = rows_of(n), size = size_of(n);
    Buffer gates(steps * rows * 4 * size), states((steps + 1) * rows * size), cells((steps + 1) * rows * size);
    Buffer weight(4 * size * size), bias(4 * size), scratch(2 * rows * size);
    Buffer packed(KERNEL(packed_gates_size)(4, size)), packed_t(KERNEL(packed_size)(size, 4 * size));
    KERNEL(pack_gates)(weight.data(), 4, size, packed.data());
    KERNEL(pack)(weight.data(), 1, size, size, 4 * size, packed_t.data());
    std::vector<uint8_t> keep = mask_of(steps * rows);
    const uint8_t* mask = n % 3 ? keep.data() : nullptr;
    KERNEL(lstm_forward)(gates.data(), states.data(), cells.data(), packed.data(), bias.data(), mask, scratch.data(), steps, rows, size);
    Buffer grad_h((steps + 1) * rows * size), grad_c(rows * size), grad_gates(steps * rows * 4 * size);
    KERNEL(lstm_backward)(gates.data(), cells.data(), packed_t.data(), grad_h.data(), grad_c.data(), grad_gates.data(), mask,
                          scratch.data(), steps, rows, size);
    for (int64_t i = 0; i < rows * size; ++i) check(std::abs(states[steps * rows * size + i]) <= 1.01F, "lstm_forward", n, i);
}

void window_case(int64_t n) {
    const int64_t batch = n % 2 + 1, steps = n % 23 + 1, window = n % 19 + 1, heads = n % 3 + 1, size = size_of(n), extras = n % 4;
    const int64_t block = steps < window ? steps : window, blocks = (steps + block - 1) / block, row = heads * size;
    Buffer query(batch * steps * row), keys(batch * (steps + window) * row), values(batch * (steps + window) * row);
    Buffer reach(batch * steps), extra_keys(batch * blocks * extras * row), extra_values(batch * blocks * extras * row);
    Buffer extra_bias(heads * extras), null_key(row), null_value(row), age_key(heads * window * size), age_bias(heads * window);
    Buffer context(batch * steps * row), weights(batch * heads * steps * (window + extras + 1));
    Buffer scratch(KERNEL(window_scratch)(steps, window, size, extras));
    std::vector<uint8_t> visible = mask_of(batch * steps * extras);
    for (int64_t i = 0; i < batch * steps; ++i) reach[i] = float(std::rand() % (window + 3));
    const bool aged = n % 2;
    const int64_t stride = (steps + window) * row;
    KERNEL(window_forward)(query.data(), keys.data(), values.data(), stride, row, stride, row, reach.data(), extra_keys.data(),
                           extra_values.data(), extra_bias.data(), visible.data(), null_key.data(), null_value.data(),
                           aged ? age_key.data() : nullptr, aged ? age_bias.data() : nullptr, context.data(), weights.data(),
                           scratch.data(), batch, steps, window, heads, size, extras, block);
    const int64_t columns = window + extras + 1;
    for (int64_t i = 0; i < batch * heads * steps; ++i) {
        double total = 0;
        for (int64_t c = 0; c < columns; ++c) total += weights[i * columns + c];
        check(std::abs(total - 1) < 1e-5, "window_forward", n, i);
    }
    Buffer grad(batch * steps * row), grad_query(batch * steps * row), grad_keys(batch * stride), grad_values(batch * stride);
    Buffer grad_extra_keys(batch * blocks * extras * row), grad_extra_values(batch * blocks * extras * row);
    Buffer grad_extra_bias(heads * extras), grad_null_key(row), grad_null_value(row), grad_age_key(heads * window * size);
    Buffer grad_age_bias(heads * window);
    KERNEL(window_backward)(query.data(), keys.data(), values.data(), stride, row, stride, row, reach.data(), extra_keys.data(),
                            extra_values.data(), visible.data(), null_key.data(), null_value.data(),
                            aged ? age_key.data() : nullptr, weights.data(), grad.data(), grad_query.data(), grad_keys.data(),
                            grad_values.data(), grad_extra_keys.data(), grad_extra_values.data(), grad_extra_bias.data(),
                            grad_null_key.data(), grad_null_value.data(), aged ? grad_age_key.data() : nullptr,
                            aged ? grad_age_bias.data() : nullptr, scratch.data(), batch, steps, window, heads, size, extras, block);
}

void step_case(int64_t n) {
    const int64_t batch = n % 3 + 1, heads = n % 4 + 1, size = size_of(n), firsts = n % 4, slots = n % 21 + 1, width = size_of(2 * n);
    const int64_t count = firsts + slots;
    Buffer query(batch * heads * size), first(batch * firsts * width), entries(batch * slots * width);
    Buffer key(heads * KERNEL(packed_size)(width, size)), value(heads * KERNEL(packed_size)(size, width));
    Buffer bias(batch * heads * count), null_logits(batch * heads), context(batch * heads * size);
    Buffer weights(batch * heads * count), null_weights(batch * heads), scratch(2 * batch * heads * width), since(batch);
    Buffer age_key(heads * KERNEL(packed_size)(slots, size)), age_bias(heads * slots), first_key(firsts * heads * size), first_bias(heads * firsts);
    Buffer null_key(heads * size), null_value(heads * size), keys(batch * slots * heads * size), values(batch * slots * heads * size);
    std::vector<uint8_t> visible = mask_of(batch * count), scratch_mask(count);
    for (int64_t b = 0; b < batch; ++b) since[b] = float(std::rand() % (2 * slots + 2));
    auto sums_to_one = [&](const char* kernel, int64_t columns) {
        for (int64_t i = 0; i < batch * heads; ++i) {
            double total = null_weights[i];
            for (int64_t c = 0; c < columns; ++c) total += weights[i * columns + c];
            check(std::abs(total - 1) < 1e-5, kernel, n, i);
        }
    };
    KERNEL(attend_projected)(query.data(), first.data(), entries.data(), key.data(), value.data(), visible.data(), bias.data(),
                             null_logits.data(), context.data(), weights.data(), null_weights.data(), scratch.data(), batch, heads,
                             size, firsts, slots, width);
    sums_to_one("attend_projected", count);
    KERNEL(ring_step)(query.data(), first.data(), entries.data(), since.data(), key.data(), value.data(), age_key.data(),
                      age_bias.data(), first_key.data(), first_bias.data(), null_key.data(), null_value.data(), context.data(),
                      weights.data(), null_weights.data(), scratch.data(), scratch_mask.data(), batch, heads, size, firsts, slots,
                      width);
    sums_to_one("ring_step", count);
    std::vector<uint8_t> keep = mask_of(batch);
    Buffer newest(batch * width), shifted(batch * slots * width);
    KERNEL(shift)(entries.data(), newest.data(), n % 2 ? keep.data() : nullptr, shifted.data(), batch, slots, width);
    for (int64_t b = 0; b < batch; ++b) check(shifted[((b + 1) * slots - 1) * width] == newest[b * width], "shift", n, b);
    KERNEL(kv_step)(query.data(), keys.data(), values.data(), since.data(), null_key.data(), null_value.data(), context.data(),
                    weights.data(), null_weights.data(), scratch_mask.data(), batch, heads, size, slots);
    sums_to_one("kv_step", slots);
}

// A tensor (a, b, c) whose dimensions have any order in memory.
struct Shape {
    int64_t dims[3], strides[3];
    explicit Shape(int64_t n) : dims{n % 3 + 1, n % 5 + 1, size_of(n)} {
        const int order = static_cast<int>(n % 3);
        int64_t step = 1;
        for (int i = 0; i < 3; ++i) {
            const int d = (order + 2 - i + 3) % 3;
            strides[d] = step;
            step *= dims[d];
        }
    }
    int64_t size() const { return dims[0] * dims[1] * dims[2]; }
};

void elementwise_case(int64_t n) {
    const Shape shape(n);
    Buffer a(shape.size()), b(shape.dims[2]), c(1), out(shape.size());
    std::vector<uint8_t> flags = mask_of(shape.size());
    for (int64_t operation = COPY; operation <= LERP; ++operation)
        for (int64_t type : {FLOAT, BOOL}) {
            Elementwise e = {};
            e.operation = operation;
            e.dims = 3;
            for (int d = 0; d < 3; ++d) {
                e.shape[d] = shape.dims[d];
                e.out.strides[d] = e.in[0].strides[d] = shape.strides[d];
            }
            e.out.type = FLOAT;
            e.in[0].type = type;
            e.in[1].strides[2] = 1;  // broadcast over the first two dimensions; the third operand is a number
            const void* first = type == FLOAT ? static_cast<const void*>(a.data()) : flags.data();
            KERNEL(elementwise)(&e, out.data(), first, b.data(), c.data());
            if (operation != ADD || type != FLOAT) continue;
            for (int64_t i = 0; i < shape.dims[0]; ++i)
                for (int64_t j = 0; j < shape.dims[1]; ++j)
                    for (int64_t k = 0; k < shape.dims[2]; ++k) {
                        const int64_t place = i * shape.strides[0] + j * shape.strides[1] + k * shape.strides[2];
                        check(out[place] == a[place] + b[k], "elementwise", n, place);
                    }
        }
}

void reduce_case(int64_t n) {
    const Shape shape(n);
    Buffer x(shape.size()), out(2 * shape.size());
    for (int64_t reduction = SUM; reduction <= ARGMAX; ++reduction)
        for (int reduced = 0; reduced < 3; ++reduced) {
            Reduce r = {};
            r.reduction = reduction;
            r.out_type = FLOAT;
            r.kept = 2;
            r.reduced = 1;
            r.reduced_shape[0] = shape.dims[reduced];
            r.reduced_strides[0] = shape.strides[reduced];
            for (int d = 0, to = 0; d < 3; ++d)
                if (d != reduced) {
                    r.kept_shape[to] = shape.dims[d];
                    r.kept_strides[to++] = shape.strides[d];
                }
            KERNEL(reduce)(&r, x.data(), out.data());
            if (reduction != SUM) continue;
            double want = 0;
            for (int64_t i = 0; i < shape.dims[reduced]; ++i) want += x[i * shape.strides[reduced]];
            check(std::abs(out[0] - want) < 1e-5, "reduce", n, 0);
        }
}

void rows_case(int64_t n) {
    const int64_t rows = rows_of(n), size = size_of(n), m = n % 3 + 1;
    Buffer x(rows * size), y(rows * size), taken(rows * m);
    KERNEL(softmax)(x.data(), y.data(), rows, size, 1);
    KERNEL(softmax)(x.data(), y.data(), rows, size, 0);
    for (int64_t r = 0; r < rows; ++r) {
        double total = 0;
        for (int64_t i = 0; i < size; ++i) total += y[r * size + i];
        check(std::abs(total - 1) < 1e-5, "softmax", n, r);
    }
    std::vector<int64_t> index(rows * m);
    for (int64_t& place : index) place = std::rand() % (size + 4) - 2;  // some are out of range
    KERNEL(gather)(reinterpret_cast<const char*>(x.data()), index.data(), reinterpret_cast<char*>(taken.data()), rows, size, m, 4);
    for (int64_t i = 0; i < rows * m; ++i) {
        const bool inside = index[i] >= 0 && index[i] < size;
        check(taken[i] == (inside ? x[i / m * size + index[i]] : 0.0F), "gather", n, i);
    }
}

void products_case(int64_t n) {
    const int64_t batch = n % 3 + 1, rows = rows_of(n), columns = size_of(2 * n), depth = size_of(n);
    Buffer a(batch * rows * depth), b(batch * depth * columns), bias(columns), c(batch * rows * columns);
    for (bool transposed : {false, true}) {
        const Products p = {batch, rows, columns, depth, {rows * depth, depth, 1},
                            {depth * columns, transposed ? 1 : columns, transposed ? depth : 1}};
        KERNEL(products)(&p, a.data(), b.data(), null_or(bias, n), c.data());
        double want = n % 2 ? bias[columns - 1] : 0;
        for (int64_t k = 0; k < depth; ++k) want += double(a[k]) * b[k * p.b[1] + (columns - 1) * p.b[2]];
        check(std::abs(c[columns - 1] - want) < 1e-4, "products", n, columns - 1);
    }
}

void replay_case(int64_t n) {
    const int64_t rows = rows_of(n), size = size_of(n);
    Buffer x(rows * size), y(rows * size), z(rows * size);
    float eps = 1e-6F;
    int32_t bits;
    std::memcpy(&bits, &eps, 4);
    // The address of the input is written into the first call, that of the output into the second.
    int64_t words[2][5] = {{0, reinterpret_cast<int64_t>(y.data()), rows, size, bits},
                           {reinterpret_cast<int64_t>(y.data()), 0, rows, size, bits}};
    const Call calls[] = {{KERNEL(rms_norm_thunk), words[0]}, {KERNEL(rms_norm_thunk), words[1]}};
    const Patch patches[] = {{&words[0][0], 0, 0}, {&words[1][1], 1, 0}};
    const int64_t bases[] = {reinterpret_cast<int64_t>(x.data()), reinterpret_cast<int64_t>(z.data())};
    KERNEL(replay)(calls, 2, patches, 2, bases);
    for (int64_t i = 0; i < rows * size; ++i) check(std::abs(z[i] - y[i]) < 1e-3, "replay", n, i);
}

void pmm_case(int64_t n) {
    const int64_t batch = n % 2 + 1, steps = n % 23 + 1, heads = n % 3 + 1, size = size_of(n), slots = n % 19 + 1, row = heads * size;
    Buffer query(batch * steps * row), keys(batch * (slots + steps) * row), values(batch * (slots + steps) * row);
    Buffer bias(batch * (slots + steps)), null_logits(batch * steps * heads), usage(batch * slots), age(batch * slots);
    Buffer context(batch * steps * row), weights(batch * steps * heads * slots), null_weights(batch * steps * heads);
    std::vector<uint8_t> open = mask_of(batch * steps), keep = mask_of(batch * steps), occupied = mask_of(batch * slots);
    std::vector<uint8_t> seen(batch * steps * slots), dominant(slots);
    std::vector<int64_t> item(batch * slots), items(batch * steps * slots);
    for (int64_t i = 0; i < batch * slots; ++i) item[i] = i % slots;
    KERNEL(pmm_forward)(query.data(), keys.data(), values.data(), bias.data(), null_logits.data(), open.data(), n % 3 ? keep.data() : nullptr,
                        item.data(), occupied.data(), usage.data(), age.data(), context.data(), weights.data(), null_weights.data(),
                        items.data(), seen.data(), dominant.data(), batch, steps, heads, size, slots, 0.99F);
    for (int64_t i = 0; i < batch * steps * heads; ++i) {
        double total = null_weights[i];
        for (int64_t s = 0; s < slots; ++s) total += weights[i * slots + s];
        check(std::abs(total - 1) < 1e-5, "pmm_forward", n, i);
    }
    Buffer grad(batch * steps * row), grad_null(batch * steps * heads), grad_query(batch * steps * row), grad_null_logits(batch * steps * heads);
    Buffer grad_keys(batch * (slots + steps) * row), grad_values(batch * (slots + steps) * row), grad_bias(batch * (slots + steps));
    Buffer scratch(slots);
    KERNEL(pmm_backward)(query.data(), keys.data(), values.data(), weights.data(), null_weights.data(), items.data(), seen.data(),
                         grad.data(), grad_null.data(), grad_query.data(), grad_keys.data(), grad_values.data(), grad_bias.data(),
                         grad_null_logits.data(), scratch.data(), batch, steps, heads, size, slots);
}

void conv_case(int64_t n) {
    const int64_t batch = n % 2 + 1, steps = n % 7 + 1, channels = size_of(n), past = n % 5, step = channels + n % 3;
    Buffer x(batch * steps * step), state(batch * past * channels), weight((past + 1) * channels), bias(channels);
    Buffer y(batch * steps * channels), last(batch * past * channels);
    std::vector<uint8_t> keep = mask_of(batch * steps);
    const uint8_t* mask = n % 3 ? keep.data() : nullptr;
    for (int32_t silu = 0; silu < 2; ++silu) {
        KERNEL(conv_forward)(x.data(), step, state.data(), weight.data(), bias.data(), mask, y.data(), last.data(), batch, steps, channels,
                             past, silu);
        for (int64_t c = 0; c < channels; ++c) {  // the first step of the first row
            double want = bias[c];
            for (int64_t i = 0; i <= past; ++i)
                if (i == past || !mask || mask[0]) want += double(i == past ? x[c] : state[i * channels + c]) * weight[i * channels + c];
            if (silu) want /= 1 + std::exp(-want);
            check(std::abs(y[c] - want) < 1e-5, "conv_forward", n, c);
        }
        Buffer grad_x(batch * steps * channels), grad_state(batch * past * channels), grad_weight((past + 1) * channels), grad_bias(channels);
        KERNEL(conv_backward)(x.data(), step, state.data(), weight.data(), bias.data(), mask, y.data(), last.data(), grad_x.data(),
                              grad_state.data(), grad_weight.data(), grad_bias.data(), batch, steps, channels, past, silu);
    }
}

void ssd_case(int64_t n) {
    const int64_t batch = n % 2 + 1, steps = n % 37 + 1, groups = n % 2 + 1, heads = groups * (n % 3 + 1), width = size_of(n), size = n % 17 + 1;
    const int64_t x_step = heads * width + n % 3, b_step = groups * size + n % 2;
    Buffer x(batch * steps * x_step), dt(batch * steps * heads), a(heads), b(batch * steps * b_step), c(batch * steps * b_step), d(heads);
    Buffer state(batch * heads * width * size), y(batch * steps * heads * width), last(batch * heads * width * size);
    Buffer saved(KERNEL(ssd_saved_size)(batch, steps, heads, width, size)), scratch(KERNEL(ssd_scratch_size)(heads, width, size));
    for (int64_t i = 0; i < batch * steps * heads; ++i) dt[i] = std::abs(dt[i]);
    for (int64_t h = 0; h < heads; ++h) a[h] = -std::abs(a[h]);
    std::vector<uint8_t> keep = mask_of(batch * steps);
    const uint8_t* mask = n % 3 ? keep.data() : nullptr;
    KERNEL(ssd_forward)(x.data(), x_step, dt.data(), a.data(), b.data(), b_step, c.data(), b_step, d.data(), state.data(), mask, y.data(),
                        last.data(), saved.data(), scratch.data(), batch, steps, heads, width, groups, size);
    for (int64_t p = 0; p < width; ++p) {  // the first step of the first head
        double want = double(d[0]) * x[p];
        for (int64_t i = 0; i < size; ++i) {
            const double before = !mask || mask[0] ? state[p * size + i] : 0;
            want += (before * std::exp(double(dt[0]) * a[0]) + double(dt[0]) * x[p] * b[i]) * c[i];
        }
        check(std::abs(y[p] - want) < 1e-5, "ssd_forward", n, p);
    }
    Buffer grad_x(batch * steps * heads * width), grad_dt(batch * steps * heads), grad_b(batch * steps * groups * size);
    Buffer grad_c(batch * steps * groups * size), grad_state(batch * heads * width * size);
    std::vector<double> grad_a(heads), grad_d(heads);
    KERNEL(ssd_backward)(x.data(), x_step, dt.data(), a.data(), b.data(), b_step, c.data(), b_step, d.data(), mask, saved.data(), y.data(),
                         last.data(), grad_x.data(), grad_dt.data(), grad_a.data(), grad_b.data(), grad_c.data(), grad_d.data(),
                         grad_state.data(), scratch.data(), batch, steps, heads, width, groups, size);
}

void gated_norm_case(int64_t n) {
    const int64_t rows = rows_of(n), groups = n % 3 + 1, size = size_of(n), width = groups * size, step = width + n % 2;
    Buffer y(rows * width), z(rows * step), weight(width), out(rows * width), scale(rows * groups), grad(rows * width);
    Buffer grad_y(rows * width), grad_z(rows * width), grad_weight(width);
    float* gate = null_or(z, n);
    KERNEL(gated_norm)(y.data(), gate, step, weight.data(), out.data(), scale.data(), rows, groups, size, 1e-3F);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t g = 0; g < groups; ++g) {
            std::vector<double> u(size);
            double square = 0;
            for (int64_t i = 0; i < size; ++i) {
                u[i] = y[r * width + g * size + i];
                if (gate) u[i] *= double(z[r * step + g * size + i]) / (1 + std::exp(-double(z[r * step + g * size + i])));
                square += u[i] * u[i] / size;
            }
            for (int64_t i = 0; i < size; ++i) {
                const double want = u[i] / std::sqrt(square + 1e-3) * weight[g * size + i];
                check(std::abs(out[r * width + g * size + i] - want) < 1e-5, "gated_norm", n, i);
            }
        }
    KERNEL(gated_norm_backward)(y.data(), gate, step, weight.data(), scale.data(), grad.data(), grad_y.data(), gate ? grad_z.data() : nullptr,
                                grad_weight.data(), rows, groups, size);
}

struct Case {
    const char* kernel;
    void (*run)(int64_t n);
};

const Case CASES[] = {
    {"packed_size", affine_case},       {"pack", affine_case},          {"affine", affine_case},
    {"layer_norm", norms_case},         {"rms_norm", norms_case},       {"packed_gates_size", gru_case},
    {"pack_gates", gru_case},           {"gru_forward", gru_case},      {"gru_backward", gru_case},
    {"lstm_forward", lstm_case},        {"lstm_backward", lstm_case},   {"window_scratch", window_case},
    {"window_forward", window_case},    {"window_backward", window_case}, {"attend_projected", step_case},
    {"ring_step", step_case},           {"kv_step", step_case},         {"shift", step_case},
    {"elementwise", elementwise_case},  {"reduce", reduce_case},        {"softmax", rows_case},
    {"gather", rows_case},              {"products", products_case},    {"replay", replay_case},
    {"pmm_forward", pmm_case},          {"pmm_backward", pmm_case},     {"conv_forward", conv_case},
    {"conv_backward", conv_case},       {"ssd_saved_size", ssd_case},   {"ssd_scratch_size", ssd_case},
    {"ssd_forward", ssd_case},          {"ssd_backward", ssd_case},     {"gated_norm", gated_norm_case},
    {"gated_norm_backward", gated_norm_case},
};

const int64_t SIZES[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 1000};

// Faults that the sanitizers must find, so that a pass of the driver says something.
void plant(const char* fault) {
    if (std::strcmp(fault, "overrun") == 0) {
        Buffer x(17), y(16);
        KERNEL(rms_norm)(x.data(), y.data(), 1, 17, 1e-6F);
    } else if (std::strcmp(fault, "leak") == 0) {
        volatile char* lost = static_cast<char*>(std::malloc(64));
        lost[0] = 1;
        lost = nullptr;
    } else if (std::strcmp(fault, "undefined") == 0) {
        volatile int large = std::numeric_limits<int>::max();
        large = large + 1;
    } else {
        std::fprintf(stderr, "unknown fault %s\n", fault);
        std::exit(2);
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 1) {
        plant(argv[1]);
        return 0;
    }
    for (const Case& each : CASES) {
        for (int64_t n : SIZES) each.run(n);
        std::printf("%s\n", each.kernel);
    }
}
