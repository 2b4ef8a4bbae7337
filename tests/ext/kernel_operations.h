// Operations with random weights, for the tests of chains and units.
#pragma once

#include <cmath>
#include <deque>
#include <vector>

#include "kernel_reference.h"
#include "operation_source.h"

namespace reference {

// The same numbers whatever C is: all of them are floats.
template <typename C>
class RandomOperations {
 public:
  const C* random(int64_t size, double scale, double offset = 0) {
    std::vector<C>& values = memory_.emplace_back(size);
    for (C& x : values) x = static_cast<float>(offset + scale * normal());
    return values.data();
  }
  const C* weights(int64_t out, int64_t in) {
    return random(out * in, 1 / std::sqrt(static_cast<double>(in)));
  }

  BatchNormSource batch_norm(int64_t channels) {
    std::vector<C>& variance = memory_.emplace_back(channels);
    for (C& x : variance) x = static_cast<float>(0.5 + std::abs(normal()));
    BatchNormSource bn;
    bn.variance = variance.data();
    bn.gamma = random(channels, 0.2, 1);
    bn.beta = random(channels, 0.5);
    bn.mean = random(channels, 0.5);
    bn.eps = 1e-5;
    return bn;
  }

  OperationSource conv(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t activation) {
    OperationSource o;
    o.kind = kConvBn;
    o.in_channels = in;
    o.out_channels = out;
    o.kernel = kernel;
    o.stride = stride;
    o.activation = activation;
    o.project = weights(out, in * kernel * kernel);
    o.batch_norms[kProjectBn] = batch_norm(out);
    return o;
  }

  // Its depthwise convolution has no BatchNorm.
  OperationSource separable(int64_t in, int64_t out, int64_t kernel, int64_t stride) {
    OperationSource o = bottleneck(in, in, out, kernel, stride, kLinear, 0, kHsigmoid);
    o.residual = 0;
    o.unnormalised = int64_t{1} << kDepthwiseBn;
    return o;
  }

  OperationSource pool(int64_t channels, int64_t kernel, int64_t stride, Pooling pooling, bool normalises) {
    OperationSource o;
    o.kind = kPool;
    o.in_channels = o.out_channels = channels;
    o.kernel = kernel;
    o.stride = stride;
    o.pooling = pooling;
    if (normalises) {
      o.batch_norms[kProjectBn] = batch_norm(channels);
    } else {
      o.unnormalised = int64_t{1} << kProjectBn;
    }
    return o;
  }

  OperationSource identity(int64_t channels) {
    OperationSource o;
    o.in_channels = o.out_channels = channels;
    return o;
  }

  OperationSource bottleneck(int64_t in, int64_t hidden, int64_t out, int64_t kernel, int64_t stride,
                             int64_t activation, int64_t se, int64_t gate) {
    OperationSource o;
    o.kind = kInvertedBottleneck;
    o.in_channels = in;
    o.hidden_channels = hidden;
    o.out_channels = out;
    o.kernel = kernel;
    o.stride = stride;
    o.activation = o.depthwise_activation = activation;
    o.se_channels = se;
    o.se_gate = gate;
    o.residual = stride == 1 && in == out;
    if (hidden != in) {
      o.expand = weights(hidden, in);
      o.batch_norms[kExpandBn] = batch_norm(hidden);
    }
    o.depthwise = weights(hidden, kernel * kernel);
    o.batch_norms[kDepthwiseBn] = batch_norm(hidden);
    if (se > 0) {
      o.se_reduce_weight = weights(se, hidden);
      o.se_reduce_bias = random(se, 0.5);
      o.se_expand_weight = weights(hidden, se);
      o.se_expand_bias = random(hidden, 0.5);
    }
    o.project = weights(out, hidden);
    o.batch_norms[kProjectBn] = batch_norm(out);
    return o;
  }

 private:
  std::deque<std::vector<C>> memory_;
};

}  // namespace reference
