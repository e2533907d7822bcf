// From router logits to topk_ids and topk_weights: one SIMD group, which is a threadgroup, a token.
//
// What a router computes is a type S: constants, and functions for what is rounded. The order of
// operations is that of the block's definition; among equal values the lowest expert id wins.
// Ids are always in [0, E), whatever the logits hold.

namespace moec {

// The lowest index of the largest of count values; all lanes get it.
inline int best_of(threadgroup float* values, int count, int lane) {
  const int none = 0x7fffffff;
  float top = LOWEST;
  int at = none;
  for (int i = lane; i < count; i += 32) {
    float v = values[i];
    if (at == none || v > top) {
      top = v;
      at = i;
    }
  }
  float best = simd_max(top);
  int winner = simd_min(at != none && top == best ? at : none);
  return min(winner, count - 1);
}

inline void take(threadgroup float* values, int index, int lane) {
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (lane == 0) values[index] = LOWEST;
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// The score function over all experts, in place.
template <typename S> inline void score_experts(threadgroup float* score, int experts, int lane) {
  if (S::SCORE == S::SOFTMAX) {
    float top = LOWEST, total = 0.0f;
    for (int e = lane; e < experts; e += 32) {
      float v = score[e];
      top = max(top, v);
    }
    top = simd_max(top);
    for (int e = lane; e < experts; e += 32) {
      float v = score[e];
      v = exp(v - top);
      total += v;
      score[e] = v;
    }
    total = simd_sum(total);
    for (int e = lane; e < experts; e += 32) {
      float v = score[e];
      score[e] = v / total;
    }
  } else if (S::SCORE != S::NO_SCORE) {
    for (int e = lane; e < experts; e += 32) {
      float v = score[e];
      score[e] = S::SCORE == S::SIGMOID ? sigmoid(v) : sqrt(softplus(v));
    }
  }
}

// Keep the best groups of experts: the others' choice becomes what masked experts are worth.
template <typename S>
inline void keep_groups(threadgroup float* score, threadgroup float* choice, threadgroup float* worth,
                        int experts, int groups, int kept, int lane) {
  int size = experts / groups;
  threadgroup float* ranked = S::GROUPS_BIASED != 0 ? choice : score;
  for (int g = lane; g < groups; g += 32) {
    float first = LOWEST, second = LOWEST;
    for (int j = 0; j < size; ++j) {
      float v = ranked[g * size + j];
      second = max(second, min(first, v));
      first = max(first, v);
    }
    worth[g] = S::GROUPS_TOP2 != 0 ? first + second : first;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  // A group's worth turns into LOWEST when it is kept: what is left tells the dropped ones.
  for (int k = 0; k < kept; ++k) take(worth, best_of(worth, groups, lane), lane);
  for (int e = lane; e < experts; e += 32) {
    float left = worth[e / size];
    if (left > LOWEST) choice[e] = S::MASKED_ZERO != 0 ? 0.0f : LOWEST;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Two rounds of arXiv 2409.12136 as evaluated at inference: the weight of the largest logit is
// its softmax among those close to it.
template <typename S>
inline void sparsemixer(threadgroup float* logits, threadgroup float* choice, threadgroup int* ids,
                        threadgroup float* weights, int experts, int lane) {
  for (int k = 0; k < 2; ++k) {
    int best = best_of(choice, experts, lane);
    float top = logits[best], total = 0.0f;
    for (int e = lane; e < experts; e += 32) {
      float s = logits[e], left = choice[e];
      float factor = max(fabs(s), top);
      float gap = S::round_logits(top - s);
      // 0 / 0 keeps the expert; written so that no NaN is made.
      bool far = factor != 0.0f && S::round_logits(gap / factor) > S::threshold();
      if (left > LOWEST && !far) total += exp(s - top);
    }
    total = simd_sum(total);
    if (lane == 0) {
      ids[k] = best;
      weights[k] = S::round_logits(1.0f / total);
    }
    take(choice, best, lane);
  }
}

// The weights of the selected experts: source and renormalisation. One lane: K values in a
// fixed order.
template <typename S>
inline void weigh(threadgroup float* score, threadgroup int* ids, threadgroup float* weights, int top_k) {
  float top = LOWEST, total = 0.0f;
  if (S::SOURCE != S::FROM_SPARSEMIXER) {
    for (int k = 0; k < top_k; ++k) {
      int e = ids[k];
      float v = score[e];
      if (S::SOURCE == S::FROM_SIGMOID) v = sigmoid(v);
      top = max(top, v);
      weights[k] = v;
    }
  }
  if (S::SOURCE == S::FROM_SOFTMAX) {
    for (int k = 0; k < top_k; ++k) {
      float v = weights[k];
      v = exp(v - top);
      total += v;
      weights[k] = v;
    }
    for (int k = 0; k < top_k; ++k) {
      float v = weights[k];
      weights[k] = v / total;
    }
  }
  if (S::RENORM == S::NO_RENORM) return;
  total = 0.0f;
  for (int k = 0; k < top_k; ++k) {
    float v = weights[k];
    total += S::RENORM == S::P_NORM ? pow(fabs(v), S::norm_p()) : v;
  }
  if (S::RENORM == S::SUM) total += S::epsilon();
  if (S::RENORM == S::CLAMPED_SUM) total = max(total, S::epsilon());
  if (S::RENORM == S::P_NORM) total = pow(total, 1.0f / S::norm_p());
  for (int k = 0; k < top_k; ++k) {
    float v = weights[k];
    weights[k] = v / total;
  }
}

// logits [T, E] -> topk_ids, topk_weights [T, K]; grid (T), 32 threads. The scratch holds
// 3 E + 128 floats.
template <typename S>
inline void route_token(const device float* logits, const device float* selection_bias,
                        const device float* per_expert_scale, device int* topk_ids, device float* topk_weights,
                        int experts, int top_k, int groups, int kept, threadgroup float4* scratch, int token,
                        int lane) {
  threadgroup float* score = (threadgroup float*)scratch;
  threadgroup float* choice = score + experts;
  threadgroup float* worth = choice + experts;
  threadgroup float* weights = worth + experts;
  threadgroup int* ids = (threadgroup int*)(weights + 64);
  for (int e = lane; e < experts; e += 32) {
    float v = logits[long(token) * experts + e];
    v = S::logit(v);
    score[e] = v;
    choice[e] = v;
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  if (S::SOURCE == S::FROM_SPARSEMIXER) {
    sparsemixer<S>(score, choice, ids, weights, experts, lane);
  } else {
    score_experts<S>(score, experts, lane);
    for (int e = lane; e < experts; e += 32) {
      float v = score[e];
      if (S::SELECTION_BIAS != 0) v += selection_bias[e];
      choice[e] = v;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    if (groups > 0) keep_groups<S>(score, choice, worth, experts, groups, kept, lane);
    for (int k = 0; k < top_k; ++k) {
      int best = best_of(choice, experts, lane);
      if (lane == 0) ids[k] = best;
      take(choice, best, lane);
    }
  }
  if (lane != 0) return;
  weigh<S>(score, ids, weights, top_k);
  for (int k = 0; k < top_k; ++k) {
    int e = ids[k];
    float v = weights[k];
    v = v * S::scale();
    if (S::PER_EXPERT_SCALE != 0) v = v * per_expert_scale[e];
    topk_ids[long(token) * top_k + k] = e;
    topk_weights[long(token) * top_k + k] = S::round_weights(v);
  }
}

}  // namespace moec
