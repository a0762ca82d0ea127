// A network's training step and its evaluation on the CPU, in float32: what models/kernels.py has computed here.
//
// Activations are [groups, height, channels, width, lanes]: the images of a group lie side by side, one in each lane of
// the vector registers. So every number of channels fills the registers, a convolution is one multiplication by a
// weight for each of them, and nothing is ever shuffled. A group is computed by one thread, some rows at a time, so
// that what is done with its activations besides a convolution finds them in a cache, and costs little. The lanes that
// a last group has no images for are zero wherever a convolution reads or writes, and so add nothing to any sum.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * sizeof(float)), may_alias));
typedef int32_t Mask __attribute__((vector_size(LANES * sizeof(int32_t)), may_alias));

constexpr int K = 4;           // output channels that are computed together, at most
constexpr int P = 3;           // pixels, at most: K * P sums, P inputs and a weight fill the 16 registers of AVX2
constexpr int64_t BAND = 512;  // vectors of K channels that the first-level cache keeps: 16 kB of AVX2

// One group's activations, or what lies inside of a border of them.
struct Plane {
  Vec* data;
  int64_t height, channels, width;
  int64_t pitch;  // from a channel's row to the next one's

  Plane(Vec* data, int64_t height, int64_t channels, int64_t width)
      : data(data), height(height), channels(channels), width(width), pitch(width) {}

  Plane(const Tensor& activations, int64_t group)
      : Plane(nullptr, activations.size(1), activations.size(2), activations.size(3)) {
    data = reinterpret_cast<Vec*>(activations.data_ptr<float>()) + group * size();
  }

  int64_t size() const { return height * channels * width; }
  Vec* row(int64_t y, int64_t channel) const { return data + (y * channels + channel) * pitch; }

  Plane inside(int64_t border) const {
    Plane inner = *this;
    inner.data = row(border, 0) + border;
    inner.height -= 2 * border;
    inner.width -= 2 * border;
    return inner;
  }

  // Makes a border of zeros.
  void clear_border(int64_t border) const {
    if (border == 0) return;
    for (int64_t y = 0; y < height; y++) {
      for (int64_t c = 0; c < channels; c++) {
        Vec* start = row(y, c);
        if (y < border || y >= height - border) {
          std::fill(start, start + width, Vec{});
        } else {
          std::fill(start, start + border, Vec{});
          std::fill(start + width - border, start + width, Vec{});
        }
      }
    }
  }
};

enum Slot { READ, MIXED, SUMS, GRADIENT, EVEN, ODD, PLACES, SLOTS };

// Memory of a thread's own, which it keeps: each of its slots is one plane at a time.
Plane scratch(Slot slot, int64_t height, int64_t channels, int64_t width) {
  static thread_local Tensor memory[SLOTS];
  const int64_t floats = height * channels * width * LANES;
  if (!memory[slot].defined() || memory[slot].numel() < floats) memory[slot] = at::empty({floats}, at::kFloat);
  return Plane(reinterpret_cast<Vec*>(memory[slot].data_ptr<float>()), height, channels, width);
}

Tensor empty_activations(int64_t groups, int64_t height, int64_t channels, int64_t width) {
  return at::empty({groups, height, channels, width, LANES}, at::kFloat);
}

// As many sums, a vector each, that are zero so far.
Vec* zero_sums(int64_t count) {
  const Plane sums = scratch(SUMS, 1, count, 1);
  std::fill(sums.data, sums.data + count, Vec{});
  return sums.data;
}

void sum_lanes(const Vec* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i++) {
    to[i] = 0;
    for (int lane = 0; lane < LANES; lane++) to[i] += from[i][lane];
  }
}

// How many of the `left` channels to compute next, such that the last are not few: 16 = 4 + 4 + 4 + 4, 10 = 4 + 3 + 3.
int next_block(int64_t left) { return left > 2 * K || left % K == 0 ? K : left > K ? (left + 1) / 2 : left; }

// Calls f(first channel, std::integral_constant of how many) for all `channels`.
template <typename F>
void for_blocks(int64_t channels, const F& f) {
  for (int64_t first = 0; first < channels;) {
    const int block = next_block(channels - first);
    switch (block) {
      case 4:
        f(first, std::integral_constant<int, 4>());
        break;
      case 3:
        f(first, std::integral_constant<int, 3>());
        break;
      case 2:
        f(first, std::integral_constant<int, 2>());
        break;
      default:
        f(first, std::integral_constant<int, 1>());
    }
    first += block;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Convolution
// ---------------------------------------------------------------------------------------------------------------------

// `width` pixels of `channels` outputs; `weight` is [inputs, S, S, outputs], from the first of these outputs on.
template <int S, int channels, int width>
void convolve_tile(const Plane& in, const Vec* from, const float* weight, const Plane& out, Vec* to) {
  Vec sum[channels][width] = {};
  for (int64_t i = 0; i < in.channels; i++) {
    for (int ky = 0; ky < S; ky++) {
      const Vec* pixels = from + (ky * in.channels + i) * in.pitch;
#pragma GCC unroll 3
      for (int kx = 0; kx < S; kx++) {
#pragma GCC unroll 4
        for (int k = 0; k < channels; k++) {
#pragma GCC unroll 3
          for (int p = 0; p < width; p++) sum[k][p] += weight[k] * pixels[kx + p];
        }
        weight += out.channels;
      }
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < channels; k++) {
#pragma GCC unroll 3
    for (int p = 0; p < width; p++) to[k * out.pitch + p] = sum[k][p];
  }
}

// Row y of out: out[y][o][x] = the sum over i, ky and kx of weight[i][ky][kx][o] * in[y + ky][i][x + kx].
template <int S>
void convolve_row(const Plane& in, int64_t y, const float* weight, const Plane& out) {
  for_blocks(out.channels, [&](int64_t first, auto block) {
    constexpr int channels = block();
    const Vec* from = in.row(y, 0);
    Vec* to = out.row(y, first);
    const float* weights = weight + first;
    int64_t x = 0;
    for (; out.width - x > P + 1 || out.width - x == P; x += P) {
      convolve_tile<S, channels, P>(in, from + x, weights, out, to + x);
    }
    for (; out.width - x > 1; x += 2) convolve_tile<S, channels, 2>(in, from + x, weights, out, to + x);
    if (x < out.width) convolve_tile<S, channels, 1>(in, from + x, weights, out, to + x);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// The gradient of its weight
// ---------------------------------------------------------------------------------------------------------------------

// sums[t][k] += the sum over `rows` rows y and all x of g[y][k][x] * from[y][x + t * step].
template <int T, int channels>
void correlate_tile(const Plane& in, const Vec* from, int64_t step, const Plane& grad, const Vec* g, int64_t rows,
                    Vec* sums) {
  Vec sum[T][channels];
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
    for (int k = 0; k < channels; k++) sum[t][k] = sums[t * grad.channels + k];
  }
  for (int64_t y = 0; y < rows; y++) {
    for (int64_t x = 0; x < grad.width; x++) {
#pragma GCC unroll 4
      for (int k = 0; k < channels; k++) {
#pragma GCC unroll 4
        for (int t = 0; t < T; t++) sum[t][k] += g[k * grad.pitch + x] * from[t * step + x];
      }
    }
    from += in.channels * in.pitch;
    g += grad.channels * grad.pitch;
  }
#pragma GCC unroll 4
  for (int t = 0; t < T; t++) {
#pragma GCC unroll 4
    for (int k = 0; k < channels; k++) sums[t * grad.channels + k] = sum[t][k];
  }
}

// sums[i][ky][kx][o] += the sum over `rows` rows from y on and all x of grad[y][o][x] * in[y + ky][i][x + kx].
template <int S>
void correlate(const Plane& in, const Plane& grad, int64_t y, int64_t rows, Vec* sums) {
  for_blocks(grad.channels, [&](int64_t first, auto block) {
    constexpr int channels = block();
    const Vec* g = grad.row(y, first);
    for (int64_t i = 0; i < in.channels;) {
      Vec* to = sums + i * S * S * grad.channels + first;
      if constexpr (S > 1) {
        for (int ky = 0; ky < S; ky++, to += S * grad.channels) {
          correlate_tile<S, channels>(in, in.row(y + ky, i), 1, grad, g, rows, to);
        }
        i++;
      } else if (i + 1 < in.channels) {  // two inputs at once: with the sums of one, each would wait for the one before
        correlate_tile<2, channels>(in, in.row(y, i), in.pitch, grad, g, rows, to);
        i += 2;
      } else {
        correlate_tile<1, channels>(in, in.row(y, i), in.pitch, grad, g, rows, to);
        i++;
      }
    }
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// What is read: dropout(x * scale + shift)
// ---------------------------------------------------------------------------------------------------------------------

// Calls zero(number in the row) for each dropped position of row after row, which must be asked for in their order.
class Dropped {
 public:
  Dropped(const int32_t* positions, int64_t row_size) : next_(positions), row_size_(row_size) {}

  template <typename F>
  void row(int64_t y, const F& zero) {
    if (next_ == nullptr) return;
    const int64_t start = y * row_size_;
    for (; *next_ < start + row_size_; next_++) zero(*next_ - start);
  }

 private:
  const int32_t* next_;  // ascending; the last is beyond all rows. None: nothing is dropped
  int64_t row_size_;
};

// Reads one group's activations row by row.
class Reader {
 public:
  Reader(const Plane& x, const float* scale, const float* shift, const int32_t* dropped, int64_t images)
      : x_(x), scale_(scale), shift_(shift), dropped_(dropped, x.channels * x.width * LANES) {
    for (int lane = 0; lane < LANES; lane++) present_[lane] = lane < images ? -1 : 0;
  }

  // Computes the rows up to `end` that are still missing into `to`.
  void read_until(int64_t end, const Plane& to) {
    for (; y_ < std::min(end, x_.height); y_++) {
      for (int64_t c = 0; c < x_.channels; c++) {
        const float a = scale_[c], b = shift_[c];
        const Vec* in = x_.row(y_, c);
        Vec* out = to.row(y_, c);
        for (int64_t i = 0; i < x_.width; i++) out[i] = (Vec)((Mask)(in[i] * a + b) & present_);
      }
      dropped_.row(y_, [&](int64_t number) {
        const int64_t pixel = number / LANES;
        Vec* out = to.row(y_, pixel / x_.width) + pixel % x_.width;
        reinterpret_cast<float*>(out)[number % LANES] = 0;
      });
    }
  }

 private:
  Plane x_;
  const float *scale_, *shift_;
  Dropped dropped_;
  Mask present_;  // all bits of the lanes that have an image
  int64_t y_ = 0;
};

// What a layer leaves to the next one and to the way back.
struct Stage {
  Tensor x;        // what it computed, before BatchNorm
  Tensor numbers;  // [4, channels]: scale and shift, of BatchNorm and dropout; mean and 1 / standard deviation
  Tensor extra;    // int32 [groups, most]: dropped positions; or what was pooled, 0 to 3, float as x; or empty

  Stage(const Tensor& x, const Tensor& extra) : x(x), numbers(at::empty({4, x.size(2)}, at::kFloat)), extra(extra) {
    std::fill(row(0), row(1), 1.0f);
    std::fill(row(1), row(4), 0.0f);
  }
  explicit Stage(const Tensor* saved) : x(saved[0]), numbers(saved[1]), extra(saved[2]) {}

  float* row(int64_t number) const { return numbers.data_ptr<float>() + number * numbers.size(1); }

  const int32_t* dropped(int64_t group) const {
    const bool any = extra.scalar_type() == at::kInt && extra.numel() > 0;
    return any ? extra.const_data_ptr<int32_t>() + group * extra.size(1) : nullptr;
  }

  Reader reader(int64_t group, int64_t images) const {
    return Reader(Plane(x, group), row(0), row(1), dropped(group), images - group * LANES);
  }
};

// Numbers that a seed and a stream's number decide: SplitMix64 (Steele et al. 2014, doi:10.1145/2660193.2660195).
class Random {
 public:
  Random(uint64_t seed, uint64_t stream) : state_(seed + stream) { state_ = bits(); }

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return z ^ (z >> 31);
  }

  float uniform() { return float((bits() >> 40) + 1) * 0x1p-24f; }  // above 0, at most 1

 private:
  uint64_t state_;
};

// How many of `n` positions are dropped, at most: eight standard deviations more than expected, a chance below 1e-14.
int64_t most_dropped(int64_t n, double p) { return std::min<int64_t>(n, n * p + 8 * std::sqrt(n * p) + 20); }

// Draws which of `n` are dropped. The distances between successes in a row of independent trials are independent and
// geometrically distributed, and floor(log U / log(1 - p)) + 1 is so for uniform U (Devroye 1986, ch. X.2).
void draw_dropped(int64_t n, double p, Random random, int32_t* positions) {
  const float factor = 1 / std::log1p(-p);
  const int32_t* end = positions + most_dropped(n, p);
  int64_t position = -1;
  while (positions < end) {
    position += int64_t(std::log(random.uniform()) * factor) + 1;
    if (position >= n) break;
    *positions++ = position;
  }
  *positions = n;
}

// ---------------------------------------------------------------------------------------------------------------------
// A network's layers
// ---------------------------------------------------------------------------------------------------------------------

// A block, which is a 3x3 convolution -> ReLU -> BatchNorm -> dropout, or a 1x1 convolution -> 2x2 max pooling.
struct Layer {
  int64_t padding;  // of a block's convolution
  double p, momentum, eps;
  Tensor weight, gamma, beta;  // of the convolution, of BatchNorm
  Tensor mean, var, batches;   // BatchNorm's running statistics

  bool pools() const { return !gamma.defined(); }
  int64_t inputs() const { return weight.size(1); }
  int64_t outputs() const { return weight.size(0); }
  int64_t side_after(int64_t side) const { return pools() ? side / 2 : side + 2 * padding - 2; }
};

// The layers, the mean over all pixels, and a linear layer.
struct Network {
  std::vector<Layer> layers;
  Tensor weight, bias;  // of the linear layer [classes, features] and [classes]; the bias may be missing

  // settings: of a block padding, p, momentum and eps; of a pooling layer nothing. parameters: the layers' one after
  // the other, then the linear layer's. statistics: those of the blocks, three each. `blocks` tells which layers are
  // blocks.
  Network(at::TensorList parameters, at::TensorList statistics, at::IntArrayRef blocks, at::ArrayRef<double> settings) {
    size_t next = 0, block = 0;
    for (const int64_t is_block : blocks) {
      Layer layer = {};
      TORCH_CHECK(next + (is_block ? 3 : 1) < parameters.size(), "parameters are missing");
      layer.weight = parameters[next++];
      if (is_block) {
        TORCH_CHECK(4 * block + 3 < settings.size() && 3 * block + 2 < statistics.size(), "a block lacks its numbers");
        layer.gamma = parameters[next++];
        layer.beta = parameters[next++];
        const double* numbers = settings.data() + 4 * block;
        layer.padding = int64_t(numbers[0]);
        std::tie(layer.p, layer.momentum, layer.eps) = std::tie(numbers[1], numbers[2], numbers[3]);
        const Tensor* of_norm = statistics.data() + 3 * block++;
        std::tie(layer.mean, layer.var, layer.batches) = std::tie(of_norm[0], of_norm[1], of_norm[2]);
      }
      layers.push_back(layer);
    }
    weight = parameters[next++];
    if (next < parameters.size()) bias = parameters[next];
  }

  // What the kernels take for granted.
  void check(const Tensor& images) const {
    TORCH_CHECK(images.dim() == 4 && images.scalar_type() == at::kFloat && images.is_contiguous(), "not such images");
    int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
    for (const Layer& layer : layers) {
      const int64_t size = layer.pools() ? 1 : 3;
      TORCH_CHECK(layer.weight.dim() == 4 && layer.inputs() == channels && layer.weight.size(2) == size &&
                      layer.weight.size(3) == size && 0 <= layer.padding && layer.padding < size,
                  "not such a convolution");
      TORCH_CHECK(!layer.pools() || (height % 2 == 0 && width % 2 == 0), height, "x", width, " pixels are not pairs");
      channels = layer.outputs(), height = layer.side_after(height), width = layer.side_after(width);
      TORCH_CHECK(channels > 0 && height > 0 && width > 0, "there is nothing to compute");
    }
    TORCH_CHECK(weight.is_contiguous() && weight.numel() == classes() * channels, "not such a linear layer");
  }

  int64_t classes() const { return weight.size(0); }
  int64_t features() const { return weight.size(1); }

  float weight_of(int64_t k, int64_t c) const { return weight.const_data_ptr<float>()[k * features() + c]; }

  // Writes the log-probabilities of one group, whose mean over all pixels is `pooled` [features], to `out` [N,
  // classes].
  void classify(const Vec* pooled, int64_t group, const Tensor& out) const {
    const int64_t present = std::min(LANES, out.size(0) - group * LANES);
    std::vector<float> logits(classes());
    float* to = out.data_ptr<float>() + group * LANES * classes();
    for (int64_t lane = 0; lane < present; lane++, to += classes()) {
      for (int64_t k = 0; k < classes(); k++) {
        logits[k] = bias.defined() ? bias.const_data_ptr<float>()[k] : 0;
        for (int64_t c = 0; c < features(); c++) logits[k] += weight_of(k, c) * pooled[c][lane];
      }
      const float highest = *std::max_element(logits.begin(), logits.end());
      float sum = 0;
      for (const float logit : logits) sum += std::exp(logit - highest);
      for (int64_t k = 0; k < classes(); k++) to[k] = logits[k] - highest - std::log(sum);
    }
  }
};

// Numbers of a convolution's weight, in the order in which a kernel reads them.
using Packed = std::vector<float>;

// [inputs, S, S, outputs], as a convolution reads it; turned around, and [outputs, S, S, inputs], as its gradient does.
Packed packed(const Tensor& weight, bool turned = false) {
  const auto numbers = weight.accessor<float, 4>();
  const int64_t outputs = weight.size(0), inputs = weight.size(1), size = weight.size(2);
  Packed out;
  out.reserve(weight.numel());
  for (int64_t from = 0; from < (turned ? outputs : inputs); from++) {
    for (int64_t y = 0; y < size; y++) {
      for (int64_t x = 0; x < size; x++) {
        for (int64_t to = 0; to < (turned ? inputs : outputs); to++) {
          out.push_back(turned ? numbers[from][to][size - 1 - y][size - 1 - x] : numbers[to][from][y][x]);
        }
      }
    }
  }
  return out;
}

// Makes one row what is over of it after the ReLU, and adds to the sums [2, channels] of that and of its square.
void relu_row(const Plane& out, int64_t y, Vec* sums) {
  for (int64_t c = 0; c < out.channels; c++) {
    Vec* row = out.row(y, c);
    Vec sum = {}, squares = {};
    for (int64_t i = 0; i < out.width; i++) {
      const Vec value = row[i] < 0 ? Vec{} : row[i];  // NaN stays NaN
      row[i] = value;
      sum += value;
      squares += value * value;
    }
    sums[c] += sum;
    sums[out.channels + c] += squares;
  }
}

// The ReLU of one group's 3x3 convolution of what `reader` reads, and the sums of `relu_row`.
void conv_relu(Reader reader, int64_t padding, const Packed& weight, int64_t inputs, const Plane& out, Vec* sums) {
  const Plane in = scratch(READ, out.height + 2, inputs, out.width + 2);
  in.clear_border(padding);
  for (int64_t y = 0; y < out.height; y++) {
    reader.read_until(y + 3 - padding, in.inside(padding));
    convolve_row<3>(in, y, weight.data(), out);
    relu_row(out, y, sums);
  }
}

// The highest of each 2x2 pixels of one group's 1x1 convolution of what `reader` reads; `places`: which, row by row.
void mix_pool(Reader reader, const Packed& weight, int64_t inputs, const Plane& out, const Plane& places) {
  const Plane in = scratch(READ, 2 * out.height, inputs, 2 * out.width);
  const Plane mixed = scratch(MIXED, 2, out.channels, in.width);
  for (int64_t y = 0; y < out.height; y++) {
    reader.read_until(2 * y + 2, in);
    Plane pair = in;
    pair.data = in.row(2 * y, 0);
    for (int64_t row = 0; row < 2; row++) convolve_row<1>(pair, row, weight.data(), mixed);
    for (int64_t c = 0; c < out.channels; c++) {
      const Vec *upper = mixed.row(0, c), *lower = mixed.row(1, c);
      Vec *to = out.row(y, c), *chosen = places.row(y, c);
      for (int64_t i = 0; i < out.width; i++) {
        const Vec window[4] = {upper[2 * i], upper[2 * i + 1], lower[2 * i], lower[2 * i + 1]};
        Vec highest = window[0], place = {};
        for (int k = 1; k < 4; k++) {
          place = window[k] > highest ? Vec{} + float(k) : place;
          highest = window[k] > highest ? window[k] : highest;
        }
        to[i] = highest;
        chosen[i] = place;
      }
    }
  }
}

// One group's mean over all pixels, a channel each.
void mean_of_pixels(Reader reader, const Plane& x, Vec* pooled) {
  const Plane in = scratch(READ, x.height, x.channels, x.width);
  reader.read_until(x.height, in);
  for (int64_t c = 0; c < x.channels; c++) {
    pooled[c] = Vec{};
    for (int64_t y = 0; y < x.height; y++) {
      for (int64_t i = 0; i < x.width; i++) pooled[c] += in.row(y, c)[i];
    }
    pooled[c] *= 1.0f / (x.height * x.width);
  }
}

// images [N, channels, height, width] -> one group.
void lay_out(const Tensor& images, int64_t group, const Plane& to) {
  const int64_t size = images.numel() / std::max<int64_t>(images.size(0), 1), rows = to.height, width = to.width;
  const float* from = images.const_data_ptr<float>() + group * LANES * size;
  const int64_t present = std::min(LANES, images.size(0) - group * LANES);
  for (int64_t c = 0; c < to.channels; c++) {
    for (int64_t y = 0; y < rows; y++) {
      for (int64_t x = 0; x < width; x++, from++) {
        Vec pixels = {};
        for (int64_t lane = 0; lane < present; lane++) pixels[lane] = from[lane * size];
        to.row(y, c)[x] = pixels;
      }
    }
  }
}

// f(group) for all groups, which the threads share.
template <typename F>
void for_groups(int64_t groups, const F& f) {
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; group++) f(group);
  });
}

// Of [groups, n], the sums over the groups.
std::vector<double> sum_groups(const Tensor& of_groups) {
  const int64_t n = of_groups.size(1);
  std::vector<double> sums(n);
  const float* numbers = of_groups.const_data_ptr<float>();
  for (int64_t group = 0; group < of_groups.size(0); group++) {
    for (int64_t i = 0; i < n; i++) sums[i] += numbers[group * n + i];
  }
  return sums;
}

// ---------------------------------------------------------------------------------------------------------------------
// Forward
// ---------------------------------------------------------------------------------------------------------------------

// What BatchNorm and dropout make of the sums of `n` activations a channel and of their squares, in training.
void normalize(const Layer& layer, const std::vector<double>& sums, int64_t n, const Stage& to) {
  const int64_t channels = layer.outputs();
  float *running_mean = layer.mean.data_ptr<float>(), *running_var = layer.var.data_ptr<float>();
  for (int64_t c = 0; c < channels; c++) {
    const double mean = sums[c] / n, var = std::max(sums[channels + c] / n - mean * mean, 0.0);
    const double inverse_std = 1 / std::sqrt(var + layer.eps), kept = 1 - layer.p;
    const double scale = layer.gamma.const_data_ptr<float>()[c] * inverse_std / kept;
    to.row(0)[c] = scale;
    to.row(1)[c] = layer.beta.const_data_ptr<float>()[c] / kept - mean * scale;
    to.row(2)[c] = mean;
    to.row(3)[c] = inverse_std;
    running_mean[c] += layer.momentum * (mean - running_mean[c]);
    running_var[c] += layer.momentum * (var * n / (n - 1) - running_var[c]);
  }
  ++*layer.batches.data_ptr<int64_t>();
}

// What the layer makes of what the one before it left. Dropout draws from the streams from `stream` on, one a group.
Stage train_layer(const Layer& layer, const Stage& from, int64_t images, uint64_t seed, uint64_t stream) {
  const int64_t groups = from.x.size(0), inputs = layer.inputs(), outputs = layer.outputs();
  const int64_t height = layer.side_after(from.x.size(1)), width = layer.side_after(from.x.size(3));
  const Packed weight = packed(layer.weight);
  const Tensor x = empty_activations(groups, height, outputs, width);
  if (layer.pools()) {
    const Stage to(x, at::empty_like(x));
    for_groups(groups, [&](int64_t group) {
      mix_pool(from.reader(group, images), weight, inputs, Plane(x, group), Plane(to.extra, group));
    });
    return to;
  }
  const int64_t size = height * width * outputs * LANES, most = layer.p > 0 ? most_dropped(size, layer.p) + 1 : 0;
  TORCH_CHECK(size < INT32_MAX, "a group of images is too large");
  const Stage to(x, at::empty({groups, most}, at::kInt));
  const Tensor sums = at::empty({groups, 2 * outputs}, at::kFloat);
  for_groups(groups, [&](int64_t group) {
    Vec* of_lanes = zero_sums(2 * outputs);
    conv_relu(from.reader(group, images), layer.padding, weight, inputs, Plane(x, group), of_lanes);
    sum_lanes(of_lanes, 2 * outputs, sums.data_ptr<float>() + group * 2 * outputs);
    int32_t* dropped = to.extra.data_ptr<int32_t>() + group * most;
    if (most) draw_dropped(size, layer.p, Random(seed, stream + group), dropped);
  });
  normalize(layer, sum_groups(sums), images * height * width, to);
  return to;
}

std::tuple<Tensor, std::vector<Tensor>> train(const Tensor& images, at::TensorList parameters,
                                              at::TensorList statistics, at::IntArrayRef blocks,
                                              at::ArrayRef<double> settings, int64_t seed) {
  const Network network(parameters, statistics, blocks, settings);
  network.check(images);
  const int64_t n = images.size(0), groups = (n + LANES - 1) / LANES;
  const Tensor x = empty_activations(groups, images.size(2), images.size(1), images.size(3));
  for_groups(groups, [&](int64_t group) { lay_out(images, group, Plane(x, group)); });
  std::vector<Stage> stages = {Stage(x, at::empty({0}, at::kInt))};
  for (const Layer& layer : network.layers) {
    stages.push_back(train_layer(layer, stages.back(), n, seed, stages.size() * groups));
  }
  const Stage& last = stages.back();
  const Tensor out = at::empty({n, network.classes()}, at::kFloat);
  const Tensor pooled = empty_activations(groups, 1, network.features(), 1);
  for_groups(groups, [&](int64_t group) {
    Vec* features = Plane(pooled, group).data;
    mean_of_pixels(last.reader(group, n), Plane(last.x, group), features);
    network.classify(features, group, out);
  });
  std::vector<Tensor> saved = {pooled};
  for (const Stage& stage : stages) saved.insert(saved.end(), {stage.x, stage.numbers, stage.extra});
  return {out, saved};
}

// Scale and shift [2 * channels] that change nothing, and those that BatchNorm has in evaluation.
std::vector<float> unchanged(int64_t channels) {
  std::vector<float> numbers(2 * channels, 1.0f);
  std::fill(numbers.begin() + channels, numbers.end(), 0.0f);
  return numbers;
}

std::vector<float> of_running_statistics(const Layer& layer) {
  const int64_t channels = layer.outputs();
  std::vector<float> numbers(2 * channels);
  for (int64_t c = 0; c < channels; c++) {
    numbers[c] = layer.gamma.const_data_ptr<float>()[c] / std::sqrt(layer.var.const_data_ptr<float>()[c] + layer.eps);
    numbers[channels + c] = layer.beta.const_data_ptr<float>()[c] - layer.mean.const_data_ptr<float>()[c] * numbers[c];
  }
  return numbers;
}

// Log-probabilities in evaluation: a group goes through all layers at one go.
Tensor evaluate(const Tensor& images, at::TensorList parameters, at::TensorList statistics, at::IntArrayRef blocks,
                at::ArrayRef<double> settings) {
  const Network network(parameters, statistics, blocks, settings);
  network.check(images);
  const int64_t n = images.size(0);
  const Tensor out = at::empty({n, network.classes()}, at::kFloat);
  std::vector<Packed> weights;
  std::vector<std::vector<float>> numbers = {unchanged(images.size(1))};
  for (const Layer& layer : network.layers) {
    weights.push_back(packed(layer.weight));
    numbers.push_back(layer.pools() ? unchanged(layer.outputs()) : of_running_statistics(layer));
  }
  for_groups((n + LANES - 1) / LANES, [&](int64_t group) {
    Plane x = scratch(EVEN, images.size(2), images.size(1), images.size(3));
    lay_out(images, group, x);
    const auto reader = [&](size_t layer) {
      return Reader(x, numbers[layer].data(), numbers[layer].data() + x.channels, nullptr, LANES);
    };
    for (size_t l = 0; l < network.layers.size(); l++) {
      const Layer& layer = network.layers[l];
      const int64_t height = layer.side_after(x.height), width = layer.side_after(x.width), outputs = layer.outputs();
      const Plane to = scratch(l % 2 ? EVEN : ODD, height, outputs, width);
      if (layer.pools()) {
        mix_pool(reader(l), weights[l], x.channels, to, scratch(PLACES, height, outputs, width));
      } else {
        conv_relu(reader(l), layer.padding, weights[l], x.channels, to, zero_sums(2 * outputs));
      }
      x = to;
    }
    Vec* pooled = zero_sums(x.channels);
    mean_of_pixels(reader(network.layers.size()), x, pooled);
    network.classify(pooled, group, out);
  });
  return out;
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward
// ---------------------------------------------------------------------------------------------------------------------

// The gradient of dropout(x * scale + shift), and for each group the sums [groups, 2 * channels] of it and of it times
// x.
struct Gradient {
  Tensor of_read, sums;

  explicit Gradient(const Stage& stage)
      : of_read(at::empty_like(stage.x)), sums(at::empty({stage.x.size(0), 2 * stage.x.size(2)}, at::kFloat)) {}
};

// Takes one group's gradient row by row, as it is computed: leaves out what was dropped, and sums.
class GradientRows {
 public:
  GradientRows(const Stage& stage, const Gradient& gradient, int64_t group)
      : out(gradient.of_read, group),
        x_(stage.x, group),
        dropped_(stage.dropped(group), x_.channels * x_.width * LANES),
        of_lanes_(zero_sums(2 * x_.channels)),
        sums_(gradient.sums.data_ptr<float>() + group * 2 * x_.channels) {}

  void take(int64_t y) {
    dropped_.row(y, [&](int64_t number) { reinterpret_cast<float*>(out.row(y, 0))[number] = 0; });
    for (int64_t c = 0; c < out.channels; c++) {
      const Vec *g = out.row(y, c), *x = x_.row(y, c);
      Vec sum = {}, products = {};
      for (int64_t i = 0; i < out.width; i++) {
        sum += g[i];
        products += g[i] * x[i];
      }
      of_lanes_[c] += sum;
      of_lanes_[out.channels + c] += products;
    }
  }

  void end() { sum_lanes(of_lanes_, 2 * out.channels, sums_); }

  const Plane out;

 private:
  Plane x_;
  Dropped dropped_;
  Vec* of_lanes_;
  float* sums_;
};

// What BatchNorm makes of the gradient of `n` activations a channel: a * gradient + b * x + c, [3 * channels], and
// the gradients of its own parameters (Ioffe and Szegedy 2015, section 3).
std::vector<float> line_of_gradient(const Layer& layer, const Stage& stage, const Gradient& gradient, int64_t n,
                                    const Tensor& gamma_grad, const Tensor& beta_grad) {
  const int64_t channels = layer.outputs();
  const std::vector<double> sums = sum_groups(gradient.sums);
  std::vector<float> line(3 * channels);
  for (int64_t c = 0; c < channels; c++) {
    const double mean = stage.row(2)[c], inverse_std = stage.row(3)[c], kept = 1 - layer.p;
    const double of_beta = sums[c] / kept, of_gamma = (sums[channels + c] - mean * sums[c]) * inverse_std / kept;
    const double slope = layer.gamma.const_data_ptr<float>()[c] * inverse_std, b = -slope * inverse_std * of_gamma / n;
    line[c] = stage.row(0)[c];
    line[channels + c] = b;
    line[2 * channels + c] = -slope * of_beta / n - b * mean;
    gamma_grad.data_ptr<float>()[c] = of_gamma;
    beta_grad.data_ptr<float>()[c] = of_beta;
  }
  return line;
}

// The gradient of what a convolution read, if that is wanted, and of its weight. fill(group, y, rows, plane) writes so
// many rows of the gradient of what it made of the group.
template <int S, typename F>
Gradient convolution_gradients(const Layer& layer, const Stage& from, int64_t images, int64_t band, bool needs_read,
                               const Tensor& weight_grad, const F& fill) {
  const int64_t groups = from.x.size(0), inputs = layer.inputs(), outputs = layer.outputs(), padding = layer.padding;
  const int64_t height = from.x.size(1), width = from.x.size(3), border = S - 1 - padding, size = weight_grad.numel();
  // The gradient of what a convolution reads is a convolution of its output's gradient, by the weight turned around.
  const Packed turned = packed(layer.weight, true);
  const Gradient gradient(from);
  const Tensor sums = at::empty({groups, size}, at::kFloat);
  for_groups(groups, [&](int64_t group) {
    const Plane in = scratch(READ, height + 2 * padding, inputs, width + 2 * padding);
    const Plane bordered = scratch(GRADIENT, height + S - 1, outputs, width + S - 1), grad = bordered.inside(border);
    Vec* of_weight = scratch(MIXED, 1, size, 1).data;
    std::fill(of_weight, of_weight + size, Vec{});
    in.clear_border(padding);
    bordered.clear_border(border);
    Reader reader = from.reader(group, images);
    GradientRows read(from, gradient, group);
    for (int64_t y = 0, done = 0; y < grad.height; y += band) {
      const int64_t rows = std::min(band, grad.height - y);
      fill(group, y, rows, grad);
      reader.read_until(y + rows + S - 1 - padding, in.inside(padding));
      correlate<S>(in, grad, y, rows, of_weight);
      const int64_t end = !needs_read ? 0 : y + rows < grad.height ? y + rows - padding : height;
      for (; done < end; done++) {
        convolve_row<S>(bordered, done, turned.data(), read.out);
        read.take(done);
      }
    }
    read.end();
    sum_lanes(of_weight, size, sums.data_ptr<float>() + group * size);
  });
  const std::vector<double> total = sum_groups(sums);
  auto to = weight_grad.accessor<float, 4>();
  for (int64_t i = 0, next = 0; i < inputs; i++) {
    for (int ky = 0; ky < S; ky++) {
      for (int kx = 0; kx < S; kx++) {
        for (int64_t o = 0; o < outputs; o++) to[o][i][ky][kx] = total[next++];
      }
    }
  }
  return gradient;
}

Gradient block_gradients(const Layer& layer, const Stage& from, const Stage& to, const Gradient& gradient,
                         int64_t images, bool needs_read, const Tensor* grads) {
  const int64_t n = images * to.x.size(1) * to.x.size(3), channels = layer.outputs();
  const std::vector<float> line = line_of_gradient(layer, to, gradient, n, grads[1], grads[2]);
  const int64_t band = std::max<int64_t>(1, BAND / (K * to.x.size(3)));
  return convolution_gradients<3>(layer, from, images, band, needs_read, grads[0],
                                  [&](int64_t group, int64_t y, int64_t rows, const Plane& out) {
                                    const Plane grad(gradient.of_read, group), x(to.x, group);
                                    for (const int64_t end = y + rows; y < end; y++) {
                                      for (int64_t k = 0; k < channels; k++) {
                                        const float a = line[k], b = line[channels + k], c = line[2 * channels + k];
                                        const Vec *g = grad.row(y, k), *value = x.row(y, k);
                                        Vec* row = out.row(y, k);
                                        for (int64_t i = 0; i < out.width; i++)
                                          row[i] = value[i] > 0 ? a * g[i] + b * value[i] + c : Vec{};
                                      }
                                    }
                                  });
}

Gradient pool_gradients(const Layer& layer, const Stage& from, const Stage& to, const Gradient& gradient,
                        int64_t images, bool needs_read, const Tensor* grads) {
  return convolution_gradients<1>(layer, from, images, 2, needs_read, grads[0],
                                  [&](int64_t group, int64_t y, int64_t, const Plane& out) {
                                    const Plane grad(gradient.of_read, group), places(to.extra, group);
                                    for (int64_t c = 0; c < out.channels; c++) {
                                      const Vec *g = grad.row(y / 2, c), *place = places.row(y / 2, c);
                                      Vec *upper = out.row(y, c), *lower = out.row(y + 1, c);
                                      for (int64_t i = 0; i < grad.width; i++) {
                                        upper[2 * i] = place[i] == 0 ? g[i] : Vec{};
                                        upper[2 * i + 1] = place[i] == 1 ? g[i] : Vec{};
                                        lower[2 * i] = place[i] == 2 ? g[i] : Vec{};
                                        lower[2 * i + 1] = place[i] == 3 ? g[i] : Vec{};
                                      }
                                    }
                                  });
}

// The gradients of what the linear layer's mean over all pixels is of, and of the linear layer's parameters.
Gradient head_gradients(const Network& network, const Stage& last, const Tensor& pooled, const Tensor& out,
                        const Tensor& grad, const Tensor* grads) {
  const int64_t groups = pooled.size(0), images = out.size(0), classes = network.classes();
  const int64_t features = network.features(), numbers = classes * (features + 1);
  const float over_pixels = 1.0f / (last.x.size(1) * last.x.size(3));
  const Gradient gradient(last);
  const Tensor sums = at::empty({groups, numbers}, at::kFloat);
  for_groups(groups, [&](int64_t group) {
    const Plane of_logits = scratch(READ, 1, classes, 1), of_linear = scratch(MIXED, 1, numbers, 1);
    const Vec* read = Plane(pooled, group).data;
    const float *said = out.const_data_ptr<float>(), *of_said = grad.const_data_ptr<float>();
    std::fill(of_logits.data, of_logits.data + classes, Vec{});
    for (int64_t lane = 0, image = group * LANES; lane < LANES && image < images; lane++, image++) {
      float sum = 0;
      for (int64_t k = 0; k < classes; k++) sum += of_said[image * classes + k];
      for (int64_t k = 0; k < classes; k++) {
        of_logits.data[k][lane] = of_said[image * classes + k] - std::exp(said[image * classes + k]) * sum;
      }
    }
    for (int64_t k = 0; k < classes; k++) {
      for (int64_t c = 0; c < features; c++) of_linear.data[k * features + c] = of_logits.data[k] * read[c];
      of_linear.data[classes * features + k] = of_logits.data[k];
    }
    sum_lanes(of_linear.data, numbers, sums.data_ptr<float>() + group * numbers);
    GradientRows rows(last, gradient, group);
    for (int64_t y = 0; y < rows.out.height; y++) {
      for (int64_t c = 0; c < features; c++) {
        Vec of_pixel = {};
        for (int64_t k = 0; k < classes; k++) of_pixel += network.weight_of(k, c) * of_logits.data[k];
        std::fill(rows.out.row(y, c), rows.out.row(y, c) + rows.out.width, of_pixel * over_pixels);
      }
      rows.take(y);
    }
    rows.end();
  });
  const std::vector<double> total = sum_groups(sums);
  std::copy(total.begin(), total.begin() + classes * features, grads[0].data_ptr<float>());
  if (network.bias.defined()) std::copy(total.end() - classes, total.end(), grads[1].data_ptr<float>());
  return gradient;
}

// The parameters' gradients, given that of `out`, which `train` made.
std::vector<Tensor> gradients(const Tensor& grad, const Tensor& out, at::TensorList saved, at::TensorList parameters,
                              at::TensorList statistics, at::IntArrayRef blocks, at::ArrayRef<double> settings) {
  const Network network(parameters, statistics, blocks, settings);
  const size_t layers = network.layers.size();
  TORCH_CHECK(saved.size() == 1 + 3 * (layers + 1) && grad.sizes() == out.sizes(), "not what train made");
  std::vector<Stage> stages;
  for (size_t stage = 0; stage <= layers; stage++) stages.emplace_back(saved.data() + 1 + 3 * stage);
  std::vector<Tensor> grads;
  for (const Tensor& parameter : parameters) grads.push_back(at::empty_like(parameter));
  const Tensor* next = grads.data() + grads.size() - (network.bias.defined() ? 2 : 1);
  Gradient gradient = head_gradients(network, stages.back(), saved[0], out, grad.contiguous(), next);
  for (size_t l = layers; l-- > 0;) {
    const Layer& layer = network.layers[l];
    next -= layer.pools() ? 1 : 3;
    const auto& layer_gradients = layer.pools() ? pool_gradients : block_gradients;
    gradient = layer_gradients(layer, stages[l], stages[l + 1], gradient, out.size(0), l > 0, next);
  }
  return grads;
}

int64_t lanes() { return LANES; }

}  // namespace

TORCH_LIBRARY(small_networks, library) {
  library.def("lanes() -> int", &lanes);
  library.def(
      "train(Tensor images, Tensor[] parameters, Tensor(a!)[] statistics, int[] blocks, float[] settings, int seed)"
      " -> (Tensor out, Tensor[] saved)",
      &train);
  library.def(
      "gradients(Tensor grad, Tensor out, Tensor[] saved, Tensor[] parameters, Tensor[] statistics, int[] blocks,"
      " float[] settings) -> Tensor[]",
      &gradients);
  library.def(
      "evaluate(Tensor images, Tensor[] parameters, Tensor[] statistics, int[] blocks, float[] settings) -> Tensor",
      &evaluate);
}
