// The blocks of a training step on the CPU, in float32: how models/kernels.py has them computed.
//
// Activations are [groups, height, channels, width, lanes]: the images of a group lie side by side, one in each lane of
// the vector registers. So every number of channels fills the registers, a convolution is one multiplication by a
// weight for each of them, and nothing is ever shuffled. A group is computed by one thread at one go, so that what is
// done with its activations besides a convolution finds them in a cache, and costs little.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

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

constexpr int K = 4;           // output channels that are computed together, at most
constexpr int P = 3;           // pixels, at most: K * P sums, P inputs and a weight fill the 16 registers of AVX2
constexpr int64_t BAND = 512;  // vectors of K channels that the first-level cache keeps: 16 kB of AVX2

// One group's activations, or what lies inside of a border of them.
struct Plane {
  Vec* data;
  int64_t height, channels, width;
  int64_t pitch;  // from a channel's row to the next one's

  Plane(const Tensor& activations, int64_t group)
      : height(activations.size(1)), channels(activations.size(2)), width(activations.size(3)), pitch(width) {
    data = reinterpret_cast<Vec*>(activations.data_ptr<float>()) + group * height * channels * width;
  }

  Vec* row(int64_t y, int64_t channel) const { return data + (y * channels + channel) * pitch; }

  Plane inside(int64_t border) const {
    Plane inner = *this;
    inner.data = row(border, 0) + border;
    inner.height -= 2 * border;
    inner.width -= 2 * border;
    return inner;
  }
};

// Memory of a thread's own, zero at first.
Tensor scratch(int64_t height, int64_t channels, int64_t width) {
  return at::zeros({1, height, channels, width, LANES}, at::kFloat);
}

// The numbers one after the other, from where a vector may begin: a view of others' memory begins anywhere.
Tensor in_vectors(const Tensor& activations) {
  const Tensor together = activations.contiguous();
  return reinterpret_cast<uintptr_t>(together.data_ptr()) % sizeof(Vec) ? together.clone() : together;
}

float sum_of_lanes(const Vec& v) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += v[lane];
  return sum;
}

// to[group] = the sums of the lanes of `from`, number by number.
void sum_lanes(const Plane& from, const Tensor& to, int64_t group) {
  const int64_t size = to.stride(0);
  float* sums = to.data_ptr<float>() + group * size;
  for (int64_t i = 0; i < size; i++) sums[i] = sum_of_lanes(from.data[i]);
}

// How many of the `left` channels to compute next, such that the last are not few: 16 = 4 + 4 + 4 + 4, 10 = 4 + 3 + 3.
int next_block(int64_t left) { return left > 2 * K || left % K == 0 ? K : left > K ? (left + 1) / 2 : left; }

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

template <int S, int channels>
void convolve_channels(const Plane& in, int64_t y, const float* weight, const Plane& out, int64_t first) {
  const Vec* from = in.row(y, 0);
  Vec* to = out.row(y, first);
  weight += first;
  int64_t x = 0;
  for (; out.width - x > P + 1 || out.width - x == P; x += P) {
    convolve_tile<S, channels, P>(in, from + x, weight, out, to + x);
  }
  for (; out.width - x > 1; x += 2) convolve_tile<S, channels, 2>(in, from + x, weight, out, to + x);
  if (x < out.width) convolve_tile<S, channels, 1>(in, from + x, weight, out, to + x);
}

// Row y of out: out[y][o][x] = the sum over i, ky and kx of weight[i][ky][kx][o] * in[y + ky][i][x + kx].
template <int S>
void convolve_row(const Plane& in, int64_t y, const float* weight, const Plane& out) {
  for (int64_t o = 0; o < out.channels;) {
    int block = next_block(out.channels - o);
    switch (block) {
      case 4:
        convolve_channels<S, 4>(in, y, weight, out, o);
        break;
      case 3:
        convolve_channels<S, 3>(in, y, weight, out, o);
        break;
      case 2:
        convolve_channels<S, 2>(in, y, weight, out, o);
        break;
      default:
        convolve_channels<S, 1>(in, y, weight, out, o);
    }
    o += block;
  }
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

template <int S, int channels>
void correlate_channels(const Plane& in, const Plane& grad, int64_t y, int64_t rows, int64_t first, Vec* sums) {
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
}

// sums[i][ky][kx][o] += the sum over y and x of grad[y][o][x] * in[y + ky][i][x + kx].
template <int S>
void correlate(const Plane& in, const Plane& grad, Vec* sums) {
  const int64_t band = std::max<int64_t>(1, BAND / (K * grad.width));
  for (int64_t y = 0; y < grad.height; y += band) {
    const int64_t rows = std::min(band, grad.height - y);
    for (int64_t o = 0; o < grad.channels;) {
      int block = next_block(grad.channels - o);
      switch (block) {
        case 4:
          correlate_channels<S, 4>(in, grad, y, rows, o, sums);
          break;
        case 3:
          correlate_channels<S, 3>(in, grad, y, rows, o, sums);
          break;
        case 2:
          correlate_channels<S, 2>(in, grad, y, rows, o, sums);
          break;
        default:
          correlate_channels<S, 1>(in, grad, y, rows, o, sums);
      }
      o += block;
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// What a convolution reads: dropout(x * scale + shift)
// ---------------------------------------------------------------------------------------------------------------------

struct Source {
  Tensor x, scale, shift, dropped;  // dropped: ascending positions in x that dropout makes zero

  Source(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& dropped)
      : x(in_vectors(x)), scale(scale.contiguous()), shift(shift.contiguous()), dropped(dropped.contiguous()) {
    TORCH_CHECK(x.dim() == 5 && x.size(4) == LANES, "x must be [groups, height, channels, width, ", LANES, "]");
    TORCH_CHECK(scale.numel() == channels() && shift.numel() == channels(), "not a scale and a shift for each channel");
  }

  int64_t groups() const { return x.size(0); }
  int64_t height() const { return x.size(1); }
  int64_t channels() const { return x.size(2); }
  int64_t width() const { return x.size(3); }

  // Calls `zero` with each dropped position of a group, counted from the group's first number.
  template <typename F>
  void for_dropped(int64_t group, const F& zero) const {
    const int64_t size = height() * channels() * width() * LANES, start = group * size;
    const int64_t *position = dropped.const_data_ptr<int64_t>(), *end = position + dropped.numel();
    position = std::lower_bound(position, end, start);
    for (; position < end && *position < start + size; position++) zero(*position - start);
  }

  // Computes that of a group into `to`.
  void load(int64_t group, const Plane& to) const {
    const Plane from(x, group);
    const float *scales = scale.const_data_ptr<float>(), *shifts = shift.const_data_ptr<float>();
    for (int64_t y = 0; y < from.height; y++) {
      for (int64_t c = 0; c < from.channels; c++) {
        const float a = scales[c], b = shifts[c];
        const Vec* in = from.row(y, c);
        Vec* out = to.row(y, c);
        for (int64_t i = 0; i < from.width; i++) out[i] = in[i] * a + b;
      }
    }
    for_dropped(group, [&](int64_t position) {
      const int64_t lane = position % LANES, pixel = position / LANES, row = pixel / from.width;
      Vec* out = to.row(row / from.channels, row % from.channels) + pixel % from.width;
      reinterpret_cast<float*>(out)[lane] = 0;
    });
  }
};

// The weight as convolve_row reads it.
Tensor packed(const Tensor& weight) { return weight.permute({1, 2, 3, 0}).contiguous(); }

template <int S>
void check(const Source& source, const Tensor& weight, int64_t padding) {
  TORCH_CHECK(weight.dim() == 4 && weight.size(1) == source.channels() && weight.size(2) == S && weight.size(3) == S,
              "weight must be [outputs, ", source.channels(), ", ", S, ", ", S, "]");
  TORCH_CHECK(0 <= padding && padding < S, "a padding of ", padding, " is not supported");
  const int64_t less = S - 1 - 2 * padding;
  TORCH_CHECK(weight.numel() > 0 && source.height() > less && source.width() > less, "there is nothing to compute");
}

// ---------------------------------------------------------------------------------------------------------------------
// The gradients of a convolution of it
// ---------------------------------------------------------------------------------------------------------------------

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // of x, scale, shift and weight

// Turns the gradient of dropout(x * scale + shift) into that of x, in place, and sums those of scale and shift.
void back_to_x(const Source& source, int64_t group, const Plane& grad, float* scale_grads, float* shift_grads) {
  source.for_dropped(group, [&](int64_t position) { reinterpret_cast<float*>(grad.data)[position] = 0; });
  const Plane x(source.x, group);
  const float* scales = source.scale.const_data_ptr<float>();
  for (int64_t c = 0; c < grad.channels; c++) {
    const float scale = scales[c];
    Vec scale_sum = {}, shift_sum = {};
    for (int64_t y = 0; y < grad.height; y++) {
      const Vec* values = x.row(y, c);
      Vec* g = grad.row(y, c);
      for (int64_t i = 0; i < grad.width; i++) {
        scale_sum += g[i] * values[i];
        shift_sum += g[i];
        g[i] *= scale;
      }
    }
    scale_grads[c] = sum_of_lanes(scale_sum);
    shift_grads[c] = sum_of_lanes(shift_sum);
  }
}

// fill(group, plane) writes the gradient of what the convolution made of the group.
template <int S, typename F>
Gradients convolution_gradients(const Source& source, const Tensor& weight, int64_t padding, bool needs_read,
                                const F& fill) {
  const int64_t groups = source.groups(), inputs = source.channels(), outputs = weight.size(0);
  const int64_t height = source.height(), width = source.width(), border = S - 1 - padding;
  check<S>(source, weight, padding);
  // The gradient of what a convolution reads is a convolution of its output's gradient, by the weight turned around.
  const Tensor turned = weight.flip({2, 3}).permute({0, 2, 3, 1}).contiguous();
  const Tensor grad_x = at::empty_like(source.x);
  const Tensor grad_scales = at::zeros({groups, inputs}, at::kFloat), grad_shifts = at::zeros_like(grad_scales);
  const Tensor grad_weights = at::empty({groups, inputs, S, S, outputs}, at::kFloat);
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const Tensor padded = scratch(height + 2 * padding, inputs, width + 2 * padding);
    const Tensor bordered = scratch(height + S - 1, outputs, width + S - 1), sums = scratch(inputs, S * S, outputs);
    const Plane in(padded, 0), grad(bordered, 0), weight_sums(sums, 0);
    for (int64_t group = begin; group < end; group++) {
      source.load(group, in.inside(padding));
      fill(group, grad.inside(border));
      sums.zero_();
      correlate<S>(in, grad.inside(border), weight_sums.data);
      sum_lanes(weight_sums, grad_weights, group);
      if (needs_read) {
        const Plane out(grad_x, group);
        for (int64_t y = 0; y < height; y++) convolve_row<S>(grad, y, turned.const_data_ptr<float>(), out);
        back_to_x(source, group, out, grad_scales.data_ptr<float>() + group * inputs,
                  grad_shifts.data_ptr<float>() + group * inputs);
      }
    }
  });
  const Tensor grad_weight = at::empty_like(weight).copy_(grad_weights.sum(0).permute({3, 0, 1, 2}));
  return {grad_x, grad_scales.sum(0), grad_shifts.sum(0), grad_weight};
}

// ---------------------------------------------------------------------------------------------------------------------
// The operations
// ---------------------------------------------------------------------------------------------------------------------

int64_t lanes() { return LANES; }

std::tuple<Tensor, Tensor> conv_relu(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& dropped,
                                     const Tensor& weight, int64_t padding) {
  const Source source(x, scale, shift, dropped);
  check<3>(source, weight, padding);
  const int64_t groups = source.groups(), inputs = source.channels(), outputs = weight.size(0);
  const int64_t height = source.height() + 2 * padding, width = source.width() + 2 * padding;
  const Tensor out = at::empty({groups, height - 2, outputs, width - 2, LANES}, at::kFloat);
  const Tensor sums = at::empty({groups, 2, outputs}, at::kFloat), by_input = packed(weight);
  at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    const Tensor padded = scratch(height, inputs, width), sum = scratch(2, outputs, 1);
    const Plane in(padded, 0), partial(sum, 0);
    for (int64_t group = begin; group < end; group++) {
      const Plane to(out, group);
      source.load(group, in.inside(padding));
      sum.zero_();
      for (int64_t y = 0; y < to.height; y++) {
        convolve_row<3>(in, y, by_input.const_data_ptr<float>(), to);
        for (int64_t o = 0; o < outputs; o++) {
          Vec* row = to.row(y, o);
          Vec row_sum = {}, squares = {};
          for (int64_t i = 0; i < to.width; i++) {
            const Vec value = row[i] < 0 ? Vec{} : row[i];  // NaN stays NaN
            row[i] = value;
            row_sum += value;
            squares += value * value;
          }
          *partial.row(0, o) += row_sum;
          *partial.row(1, o) += squares;
        }
      }
      sum_lanes(partial, sums, group);
    }
  });
  return {out, sums.sum(0)};
}

Gradients conv_relu_gradients(const Tensor& grad_out, const Tensor& grad_sums, const Tensor& out, const Tensor& x,
                              const Tensor& scale, const Tensor& shift, const Tensor& dropped, const Tensor& weight,
                              int64_t padding, bool needs_read) {
  const Tensor grads = in_vectors(grad_out), outputs = in_vectors(out), of_sums = grad_sums.contiguous();
  const float *of_sum = of_sums.const_data_ptr<float>(), *of_squares = of_sum + weight.size(0);
  return convolution_gradients<3>(Source(x, scale, shift, dropped), weight, padding, needs_read,
                                  [&](int64_t group, const Plane& to) {
                                    const Plane grad(grads, group), activations(outputs, group);
                                    for (int64_t y = 0; y < to.height; y++) {
                                      for (int64_t c = 0; c < to.channels; c++) {
                                        const Vec *g = grad.row(y, c), *value = activations.row(y, c);
                                        const float a = of_sum[c], b = 2 * of_squares[c];
                                        Vec* row = to.row(y, c);
                                        for (int64_t i = 0; i < to.width; i++)
                                          row[i] = value[i] > 0 ? g[i] + a + b * value[i] : Vec{};
                                      }
                                    }
                                  });
}

// Pooling takes two rows at a time, and a 1x1 convolution any number. So here a group is but two rows of the images of
// a group, which the caches hold better.
Tensor in_strips(const Tensor& activations, int64_t rows) {
  const Tensor whole = in_vectors(activations);
  TORCH_CHECK(whole.size(1) % rows == 0, whole.size(1), " rows are not pairs");
  return whole.view({whole.size(0) * whole.size(1) / rows, rows, whole.size(2), whole.size(3), whole.size(4)});
}

std::tuple<Tensor, Tensor> mix_pool(const Tensor& x, const Tensor& scale, const Tensor& shift, const Tensor& dropped,
                                    const Tensor& weight) {
  const Source source(in_strips(x, 2), scale, shift, dropped);
  check<1>(source, weight, 0);
  const int64_t outputs = weight.size(0), width = source.width();
  const Tensor out = at::empty({x.size(0), x.size(1) / 2, outputs, width / 2, LANES}, at::kFloat);
  const Tensor places = at::empty_like(out), by_input = packed(weight);
  const Tensor out_strips = in_strips(out, 1), place_strips = in_strips(places, 1);
  at::parallel_for(0, source.groups(), 1, [&](int64_t begin, int64_t end) {
    const Tensor loaded = scratch(2, source.channels(), width), mixed = scratch(2, outputs, width);
    const Plane in(loaded, 0), mix(mixed, 0);
    for (int64_t strip = begin; strip < end; strip++) {
      const Plane to(out_strips, strip), chosen(place_strips, strip);
      source.load(strip, in);
      for (int64_t y = 0; y < 2; y++) convolve_row<1>(in, y, by_input.const_data_ptr<float>(), mix);
      for (int64_t o = 0; o < outputs; o++) {
        const Vec *upper = mix.row(0, o), *lower = mix.row(1, o);
        for (int64_t i = 0; i < to.width; i++) {
          const Vec window[4] = {upper[2 * i], upper[2 * i + 1], lower[2 * i], lower[2 * i + 1]};
          Vec highest = window[0], place = {};
          for (int k = 1; k < 4; k++) {
            place = window[k] > highest ? Vec{} + float(k) : place;
            highest = window[k] > highest ? window[k] : highest;
          }
          to.row(0, o)[i] = highest;
          chosen.row(0, o)[i] = place;
        }
      }
    }
  });
  return {out, places};
}

Gradients mix_pool_gradients(const Tensor& grad_out, const Tensor& places, const Tensor& x, const Tensor& scale,
                             const Tensor& shift, const Tensor& dropped, const Tensor& weight) {
  const Tensor grads = in_strips(grad_out, 1), place_strips = in_strips(places, 1);
  auto [grad_x, grad_scale, grad_shift, grad_weight] = convolution_gradients<1>(
      Source(in_strips(x, 2), scale, shift, dropped), weight, 0, true, [&](int64_t strip, const Plane& to) {
        const Plane grad(grads, strip), chosen(place_strips, strip);
        for (int64_t c = 0; c < to.channels; c++) {
          const Vec *g = grad.row(0, c), *place = chosen.row(0, c);
          Vec *upper = to.row(0, c), *lower = to.row(1, c);
          for (int64_t i = 0; i < grad.width; i++) {
            upper[2 * i] = place[i] == 0 ? g[i] : Vec{};
            upper[2 * i + 1] = place[i] == 1 ? g[i] : Vec{};
            lower[2 * i] = place[i] == 2 ? g[i] : Vec{};
            lower[2 * i + 1] = place[i] == 3 ? g[i] : Vec{};
          }
        }
      });
  return {grad_x.view(x.sizes()), grad_scale, grad_shift, grad_weight};
}

}  // namespace

TORCH_LIBRARY_IMPL(small_networks, CPU, library) {
  library.impl("conv_relu", &conv_relu);
  library.impl("conv_relu_gradients", &conv_relu_gradients);
  library.impl("mix_pool", &mix_pool);
  library.impl("mix_pool_gradients", &mix_pool_gradients);
}

TORCH_LIBRARY_IMPL(small_networks, CompositeExplicitAutograd, library) { library.impl("lanes", &lanes); }
