// Calls every kernel with many sizes, for the sanitizers. Buffers have exactly the size that the kernel may touch, and are not
// aligned to vectors. `driver overrun`, `driver leak` and
// `driver undefined` plant a fault instead.
//
// It includes the sources, so no declaration is repeated here. A new kernel gets a function and a row in CASES.
#include "kernels.cpp"

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

void scale_add_case(int64_t n) {
    Buffer x(n), y(n), y_before = y;
    KERNEL(scale_add)(x.data(), 0.5F, y.data(), n);
    for (int64_t i = 0; i < n; ++i) check(std::abs(y[i] - (y_before[i] + 0.5F * x[i])) < 1e-6F, "scale_add", n, i);
}

struct Case {
    const char* kernel;
    void (*run)(int64_t n);
};

const Case CASES[] = {
    {"scale_add", scale_add_case},
};

const int64_t SIZES[] = {0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 65, 127, 128, 129, 1000};

// Faults that the sanitizers must find, so that a pass of the driver says something.
void plant(const char* fault) {
    if (std::strcmp(fault, "overrun") == 0) {
        Buffer x(17), y(16);
        KERNEL(scale_add)(x.data(), 1.0F, y.data(), 17);
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
