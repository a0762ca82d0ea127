// A network's training step and its evaluation on the CPU, in float32: what models/kernels.py has computed here.
//
// Activations are [groups, height, channels, width, lanes]: the images of a group lie side by side, one in each lane of
// the vector registers. So every number of channels fills the registers, a convolution is one multiplication by a
// weight for each of them, and nothing is ever shuffled. A group is computed by one thread, some rows at a time, so
// that what is done with its activations besides a convolution finds them in a cache, and costs little. The lanes that
// a last group has no images for are zero wherever a convolution reads or writes, and so add nothing to any sum.

#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
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
constexpr int64_t PART = 4;    // groups of an evaluation that go through the layers together
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
        Vec *start = row(y, c), *end = start + width;
        const bool all = y < border || y >= height - border;
        std::fill(start, all ? end : start + border, Vec{});
        std::fill(end - border, end, Vec{});
      }
    }
  }
};

enum Slot { READ, MIXED, SUMS, GRADIENT, SLOTS };

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

// Calls f(first, std::integral_constant of how many) for parts of `n` that are at most `most`, and not few at the end:
// 16 = 4 + 4 + 4 + 4, 10 = 4 + 3 + 3.
template <int most, typename F>
void for_blocks(int64_t n, const F& f) {
  for (int64_t first = 0; first < n;) {
    const int64_t left = n - first;
    const int64_t part = left > 2 * most || left % most == 0 ? most : left > most ? (left + 1) / 2 : left;
    [&]<int... less>(std::integer_sequence<int, less...>) {
      ((part == most - less ? f(first, std::integral_constant<int, most - less>()) : void()), ...);
    }(std::make_integer_sequence<int, most>());
    first += part;
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
#pragma GCC unroll 8
      for (int kx = 0; kx < S; kx++) {
#pragma GCC unroll 8
        for (int k = 0; k < channels; k++) {
#pragma GCC unroll 8
          for (int p = 0; p < width; p++) sum[k][p] += weight[k] * pixels[kx + p];
        }
        weight += out.channels;
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < channels; k++) {
#pragma GCC unroll 8
    for (int p = 0; p < width; p++) to[k * out.pitch + p] = sum[k][p];
  }
}

// Row y of out: out[y][o][x] = the sum over i, ky and kx of weight[i][ky][kx][o] * in[y + ky][i][x + kx].
template <int S>
void convolve_row(const Plane& in, int64_t y, const float* weight, const Plane& out) {
  for_blocks<P>(out.width, [&](int64_t x, auto pixels) {
    const Vec* from = in.row(y, 0) + x;
    for_blocks<K>(out.channels, [&](int64_t first, auto block) {
      convolve_tile<S, block(), pixels()>(in, from, weight + first, out, out.row(y, first) + x);
    });
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
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) {
#pragma GCC unroll 8
    for (int k = 0; k < channels; k++) sum[t][k] = sums[t * grad.channels + k];
  }
  for (int64_t y = 0; y < rows; y++) {
    for (int64_t x = 0; x < grad.width; x++) {
#pragma GCC unroll 8
      for (int k = 0; k < channels; k++) {
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) sum[t][k] += g[k * grad.pitch + x] * from[t * step + x];
      }
    }
    from += in.channels * in.pitch;
    g += grad.channels * grad.pitch;
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; t++) {
#pragma GCC unroll 8
    for (int k = 0; k < channels; k++) sums[t * grad.channels + k] = sum[t][k];
  }
}

// sums[i][ky][kx][o] += the sum over `rows` rows from y on and all x of grad[y][o][x] * in[y + ky][i][x + kx].
template <int S>
void correlate(const Plane& in, const Plane& grad, int64_t y, int64_t rows, Vec* sums) {
  for_blocks<K>(grad.channels, [&](int64_t first, auto block) {
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

// settings: of a block padding, p, momentum and eps; of a pooling layer nothing. parameters: the layers' one after the
// other. statistics: those of the blocks, three each. `blocks` tells which layers are blocks.
std::vector<Layer> layers_of(at::TensorList parameters, at::TensorList statistics, at::IntArrayRef blocks,
                             at::ArrayRef<double> settings) {
  std::vector<Layer> layers;
  const Tensor *parameter = parameters.begin(), *of_norm = statistics.begin();
  const double* setting = settings.begin();
  for (const int64_t is_block : blocks) {
    Layer layer = {};
    layer.weight = *parameter++;
    if (is_block) {
      layer.gamma = *parameter++;
      layer.beta = *parameter++;
      for (Tensor* statistic : {&layer.mean, &layer.var, &layer.batches}) *statistic = *of_norm++;
      layer.padding = int64_t(*setting++);
      for (double* number : {&layer.p, &layer.momentum, &layer.eps}) *number = *setting++;
    }
    layers.push_back(layer);
  }
  TORCH_CHECK(parameter == parameters.end() && of_norm == statistics.end() && setting == settings.end(),
              "not what the layers need");
  return layers;
}

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

// [N, channels, height, width] -> one group.
void from_images(const Tensor& images, int64_t group, const Plane& to) {
  const int64_t first = group * LANES, present = std::min(LANES, images.size(0) - first);
  const float* from = images.const_data_ptr<float>() + first * to.size();
  for (int64_t c = 0; c < to.channels; c++) {
    for (int64_t y = 0; y < to.height; y++) {
      for (int64_t x = 0; x < to.width; x++, from++) {
        Vec pixels = {};
        for (int64_t lane = 0; lane < present; lane++) pixels[lane] = from[lane * to.size()];
        to.row(y, c)[x] = pixels;
      }
    }
  }
}

// The mean over all pixels of what the reader reads of one group, to [N, channels].
void to_means(Reader reader, const Plane& x, int64_t group, const Tensor& means) {
  const Plane in = scratch(READ, x.height, x.channels, x.width);
  const int64_t first = group * LANES, present = std::min(LANES, means.size(0) - first);
  float* to = means.data_ptr<float>() + first * x.channels;
  reader.read_until(x.height, in);
  for (int64_t c = 0; c < x.channels; c++) {
    Vec sum = {};
    for (int64_t y = 0; y < x.height; y++) {
      for (int64_t i = 0; i < x.width; i++) sum += in.row(y, c)[i];
    }
    for (int64_t lane = 0; lane < present; lane++) to[lane * x.channels + c] = sum[lane] / (x.height * x.width);
  }
}

// The gradient of every pixel, of that of the means [N, channels].
void from_means(const Tensor& means, int64_t group, const Plane& to) {
  const int64_t first = group * LANES, present = std::min(LANES, means.size(0) - first);
  const float* from = means.const_data_ptr<float>() + first * to.channels;
  for (int64_t c = 0; c < to.channels; c++) {
    Vec pixel = {};
    for (int64_t lane = 0; lane < present; lane++) pixel[lane] = from[lane * to.channels + c] / (to.height * to.width);
    for (int64_t y = 0; y < to.height; y++) std::fill(to.row(y, c), to.row(y, c) + to.width, pixel);
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

// What BatchNorm and dropout make of `n` activations a channel, given their sums and those of their squares; without
// those, what BatchNorm makes of them in evaluation.
void normalize(const Layer& layer, const std::vector<double>& sums, int64_t n, const Stage& to) {
  const int64_t channels = layer.outputs();
  float *running_mean = layer.mean.data_ptr<float>(), *running_var = layer.var.data_ptr<float>();
  if (!sums.empty()) ++*layer.batches.data_ptr<int64_t>();
  for (int64_t c = 0; c < channels; c++) {
    double mean = running_mean[c], var = running_var[c];
    if (!sums.empty()) {
      mean = sums[c] / n;
      var = std::max(sums[channels + c] / n - mean * mean, 0.0);
      running_mean[c] += layer.momentum * (mean - running_mean[c]);
      running_var[c] += layer.momentum * (var * n / (n - 1) - running_var[c]);
    }
    const double inverse_std = 1 / std::sqrt(var + layer.eps), kept = 1 - layer.p;
    const double scale = layer.gamma.const_data_ptr<float>()[c] * inverse_std / kept;
    to.row(0)[c] = scale;
    to.row(1)[c] = layer.beta.const_data_ptr<float>()[c] / kept - mean * scale;
    to.row(2)[c] = mean;
    to.row(3)[c] = inverse_std;
  }
}

// What the layer makes of what the one before it left. Dropout draws from the streams from `stream` on, one a group.
Stage run_layer(const Layer& layer, const Stage& from, int64_t images, bool training, uint64_t seed, uint64_t stream) {
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
  normalize(layer, training ? sum_groups(sums) : std::vector<double>(), images * height * width, to);
  return to;
}

using Made = std::tuple<Tensor, std::vector<Tensor>>;

// The mean over all pixels of what the layers make of images [N, channels, height, width], and what the way back needs
// of them.
Made run(const Tensor& images, const std::vector<Layer>& layers, bool training, uint64_t seed) {
  const int64_t n = images.size(0), groups = (n + LANES - 1) / LANES;
  const Tensor x = empty_activations(groups, images.size(2), images.size(1), images.size(3));
  for_groups(groups, [&](int64_t group) { from_images(images, group, Plane(x, group)); });
  Stage stage(x, at::empty({0}, at::kInt));
  std::vector<Tensor> saved;
  uint64_t stream = 0;
  for (const Layer& layer : layers) {
    if (training) saved.insert(saved.end(), {stage.x, stage.numbers, stage.extra});
    stage = run_layer(layer, stage, n, training, seed, stream);
    stream += groups;
  }
  saved.insert(saved.end(), {stage.x, stage.numbers, stage.extra});
  const Tensor out = at::empty({n, stage.x.size(2)}, at::kFloat);
  for_groups(groups, [&](int64_t group) { to_means(stage.reader(group, n), Plane(stage.x, group), group, out); });
  return {out, saved};
}

// In evaluation a part of the images goes through all layers before the next, by one thread, while the caches have it.
Made forward(const Tensor& images, at::TensorList parameters, at::TensorList statistics, at::IntArrayRef blocks,
             at::ArrayRef<double> settings, bool training, int64_t seed) {
  TORCH_CHECK(images.dim() == 4 && images.scalar_type() == at::kFloat && images.is_contiguous(), "not such images");
  std::vector<Layer> layers = layers_of(parameters, statistics, blocks, settings);
  if (training) return run(images, layers, training, seed);
  for (Layer& layer : layers) layer.p = 0;
  const int64_t size = PART * LANES, parts = std::max<int64_t>(1, (images.size(0) + size - 1) / size);
  std::vector<Tensor> made(parts);
  for_groups(parts, [&](int64_t part) {
    const int64_t first = part * size, n = std::min(size, images.size(0) - first);
    made[part] = std::get<0>(run(images.narrow(0, first, n), layers, training, seed));
  });
  return {at::cat(made), {}};
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

// The parameters' gradients, given that of what `forward` made.
std::vector<Tensor> gradients(const Tensor& grad, at::TensorList saved, at::TensorList parameters,
                              at::TensorList statistics, at::IntArrayRef blocks, at::ArrayRef<double> settings) {
  const std::vector<Layer> layers = layers_of(parameters, statistics, blocks, settings);
  std::vector<Stage> stages;
  for (size_t stage = 0; stage <= layers.size(); stage++) stages.emplace_back(&saved[3 * stage]);
  const Tensor of_means = grad.contiguous();
  Gradient gradient(stages.back());
  for_groups(stages.back().x.size(0), [&](int64_t group) {
    GradientRows rows(stages.back(), gradient, group);
    from_means(of_means, group, rows.out);
    for (int64_t y = 0; y < rows.out.height; y++) rows.take(y);
    rows.end();
  });
  std::vector<Tensor> grads;
  for (const Tensor& parameter : parameters) grads.push_back(at::empty_like(parameter));
  const Tensor* next = grads.data() + grads.size();
  for (size_t l = layers.size(); l-- > 0;) {
    const Layer& layer = layers[l];
    next -= layer.pools() ? 1 : 3;
    const auto& layer_gradients = layer.pools() ? pool_gradients : block_gradients;
    gradient = layer_gradients(layer, stages[l], stages[l + 1], gradient, grad.size(0), l > 0, next);
  }
  return grads;
}

int64_t lanes() { return LANES; }

}  // namespace

TORCH_LIBRARY(small_networks, library) {
  library.def("lanes() -> int", &lanes);
  library.def(
      "forward(Tensor images, Tensor[] parameters, Tensor(a!)[] statistics, int[] blocks, float[] settings,"
      " bool training, int seed) -> (Tensor out, Tensor[] saved)",
      &forward);
  library.def(
      "gradients(Tensor grad, Tensor[] saved, Tensor[] parameters, Tensor[] statistics, int[] blocks,"
      " float[] settings) -> Tensor[]",
      &gradients);
}
