// The phases of Block Attention Residuals on a CPU. The formulas stand in complete.py, phase1.py
// and phase2.py of this package; function and argument names are those of plain_phases.py.
//
// All tensors are contiguous with the channels last: `tokens` rows of `width` elements of type
// Element. Rows stay in the first-level cache while a token is worked on, so each is read from
// memory once. Arithmetic is done in Real (double for double, otherwise float) and rounded once.
// Every thread has a contiguous run of tokens, so that results do not vary from run to run; sums
// over tokens are formed per thread in `[threads, ...]` and added up by the caller.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#include <omp.h>

namespace {

struct BFloat16 {
  uint16_t bits;
  BFloat16() = default;
  BFloat16(float value) {  // to nearest, ties to even
    uint32_t word;
    std::memcpy(&word, &value, 4);
    bits = std::isnan(value) ? 0x7fc0 : (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  }
  operator float() const {
    uint32_t word = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
  }
};

template <typename Element> struct Arithmetic { using Real = float; };
template <> struct Arithmetic<double> { using Real = double; };

template <typename Body> void over_tokens(int64_t tokens, int threads, Body body) {
#pragma omp parallel num_threads(threads)
  {
    int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
    body(int(thread), tokens * thread / all, tokens * (thread + 1) / all);
  }
}

template <typename A, typename B, typename Real>
Real dot(const A *left, const B *right, int64_t width) {
  Real total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < width; ++d) total += Real(left[d]) * Real(right[d]);
  return total;
}

template <typename B, typename Real>
void add_scaled(Real *total, Real factor, const B *row, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) total[d] += factor * Real(row[d]);
}

template <typename A, typename B> void copy(A *to, const B *from, int64_t width) {
#pragma omp simd
  for (int64_t d = 0; d < width; ++d) to[d] = A(from[d]);
}

// out = start + sum of factors[k * stride] * rows[k], in chunks that stay in registers. `start` and
// single rows may be null, which stands for zeros.
template <typename A, typename B, typename Real>
void weighted_sum(A *out, const B *start, const B *const *rows, const Real *factors, int64_t stride,
                  int64_t count, int64_t offset, int64_t width) {
  constexpr int64_t CHUNK = 128 / sizeof(Real);
  int64_t d = 0;
  for (; d + CHUNK <= width; d += CHUNK) {
    Real total[CHUNK];
    for (int64_t c = 0; c < CHUNK; ++c) total[c] = start ? Real(start[offset + d + c]) : Real(0);
    for (int64_t k = 0; k < count; ++k) {
      if (!rows[k]) continue;
      const B *row = rows[k] + offset + d;
      Real factor = factors[k * stride];
#pragma omp simd
      for (int64_t c = 0; c < CHUNK; ++c) total[c] += factor * Real(row[c]);
    }
    for (int64_t c = 0; c < CHUNK; ++c) out[d + c] = A(total[c]);
  }
  for (; d < width; ++d) {
    Real total = start ? Real(start[offset + d]) : Real(0);
    for (int64_t k = 0; k < count; ++k)
      if (rows[k]) total += factors[k * stride] * Real(rows[k][offset + d]);
    out[d] = A(total);
  }
}

// e^x to the last bit or two, without a call, so that loops over it can be vectorised.
inline float exponential(float x) {
  x = std::max(x, -87.0f);
  float whole = std::nearbyint(x * 1.44269504f);
  float rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float series = 1.9875691500e-4f;
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                     5.0000001201e-1f})
    series = series * rest + next;
  int32_t power = (int32_t(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, 4);
  return (series * rest * rest + rest + 1) * scale;
}
inline double exponential(double x) { return std::exp(x); }

template <typename Real> void softmax(std::vector<Real> &logits) {
  Real top = *std::max_element(logits.begin(), logits.end()), total = 0;
  for (Real &each : logits) total += each = exponential(each - top);
  for (Real &each : logits) each /= total;
}

// Sources -----------------------------------------------------------------------------------------

template <typename Element, typename Real = typename Arithmetic<Element>::Real>
void complete(const Element *first, const Element *second, Element *source, const Real *queries,
              Real *logits, Real *inverse_rms, int64_t sites, double eps, int64_t tokens,
              int64_t width, int threads) {
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const Element *row = first + t * width;
      if (second) {
        Element *sum = source + t * width;
        const Element *other = second + t * width;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) sum[d] = Element(Real(row[d]) + Real(other[d]));
        row = sum;
      }
      Real inverse = 1 / std::sqrt(dot<Element, Element, Real>(row, row, width) / width + Real(eps));
      inverse_rms[t] = inverse;
      for (int64_t j = 0; j < sites; ++j)
        logits[j * tokens + t] = inverse * dot<Element, Real, Real>(row, queries + j * width,
                                                                  width);
    }
  });
}

template <typename Element, typename Real = typename Arithmetic<Element>::Real>
void complete_backward(const Element *grad_source, const Real *grad_logits, const Element *source,
                       const Real *queries, const Real *logits, const Real *inverse_rms,
                       Element *grad, Real *grad_queries, int64_t sites, int64_t tokens,
                       int64_t width, int threads) {
  over_tokens(tokens, threads, [&](int thread, int64_t begin, int64_t end) {
    std::vector<Real> total(width);
    Real *sums = grad_queries ? grad_queries + thread * sites * width : nullptr;
    for (int64_t t = begin; t < end; ++t) {
      const Element *row = source + t * width;
      Real inverse = inverse_rms[t], towards_self = 0;
      std::fill(total.begin(), total.end(), Real(0));
      if (grad_source) copy(total.data(), grad_source + t * width, width);
      for (int64_t j = 0; j < sites; ++j) {
        Real slope = grad_logits[j * tokens + t];
        towards_self += slope * logits[j * tokens + t];
        if (grad) add_scaled(total.data(), slope * inverse, queries + j * width, width);
        if (sums) add_scaled(sums + j * width, slope * inverse, row, width);
      }
      if (!grad) continue;
      add_scaled(total.data(), -towards_self * inverse * inverse / width, row, width);
      copy(grad + t * width, total.data(), width);
    }
  });
}

// All sites of a block over its completed sources -------------------------------------------------

constexpr int64_t TOKENS = 16;  // whose weights are computed at once

template <typename Element, typename Real = typename Arithmetic<Element>::Real>
void phase1(const Element **sources, const Real **logits, Element **mixes, Real *statistics,
            int64_t count, int64_t sites, int64_t tokens, int64_t width, int threads) {
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<Real> alphas(count * sites * TOKENS);
    for (int64_t t = begin; t < end; t += TOKENS) {
      int64_t some = std::min(TOKENS, end - t);
      for (int64_t j = 0; j < sites; ++j) {
        Real *alpha = &alphas[j * count * TOKENS], top[TOKENS], sum[TOKENS] = {};
        std::copy(logits[0] + j * tokens + t, logits[0] + j * tokens + t + some, top);
        for (int64_t i = 1; i < count; ++i)
#pragma omp simd
          for (int64_t u = 0; u < some; ++u) top[u] = std::max(top[u], logits[i][j * tokens + t + u]);
        for (int64_t i = 0; i < count; ++i)
#pragma omp simd
          for (int64_t u = 0; u < some; ++u)
            sum[u] += alpha[i * TOKENS + u] = exponential(logits[i][j * tokens + t + u] - top[u]);
        for (int64_t u = 0; u < some; ++u) {
          statistics[2 * j * tokens + t + u] = top[u] + std::log(sum[u]);
          statistics[(2 * j + 1) * tokens + t + u] = 0;
        }
        for (int64_t i = 0; i < count; ++i)
          for (int64_t u = 0; u < some; ++u) alpha[i * TOKENS + u] /= sum[u];
      }
      for (int64_t u = 0; u < some; ++u)
        for (int64_t j = 0; j < sites; ++j)
          weighted_sum(mixes[j] + (t + u) * width, (const Element *)nullptr, sources,
                       &alphas[j * count * TOKENS + u], TOKENS, count, (t + u) * width, width);
    }
  });
}

// A missing gradient of a mix or carrier is a null pointer, and so is a carrier's that nobody wants.
template <typename Element, typename Real = typename Arithmetic<Element>::Real>
void phase1_backward(const Element **grad_mixes, const Real *grad_statistics,
                     const Element **grad_carriers, const Element **sources, const Real **logits,
                     const Real *statistics, Element **grads, Real *grad_logits, int64_t count,
                     int64_t sites, int64_t tokens, int64_t width, int threads) {
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<Real> alphas(count * sites * TOKENS);
    for (int64_t t = begin; t < end; t += TOKENS) {
      int64_t some = std::min(TOKENS, end - t);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < sites; ++j)
#pragma omp simd
          for (int64_t u = 0; u < some; ++u)
            alphas[(i * sites + j) * TOKENS + u] = exponential(
                logits[i][j * tokens + t + u] - statistics[2 * j * tokens + t + u]);
      for (int64_t u = 0; u < some; ++u)
        for (int64_t i = 0; i < count; ++i) {
          int64_t offset = (t + u) * width;
          const Real *alpha = &alphas[i * sites * TOKENS + u];
          if (grads[i])
            weighted_sum(grads[i] + offset, grad_carriers[i], grad_mixes, alpha, TOKENS, sites,
                         offset, width);
          for (int64_t j = 0; grad_logits && j < sites; ++j) {
            Real slope = grad_statistics[2 * j * tokens + t + u]
                         - grad_statistics[(2 * j + 1) * tokens + t + u];
            if (grad_mixes[j])
              slope += dot<Element, Element, Real>(grad_mixes[j] + offset, sources[i] + offset, width);
            grad_logits[(i * sites + j) * tokens + t + u] = alpha[j * TOKENS] * slope;
          }
        }
    }
  });
}

// One site ----------------------------------------------------------------------------------------

enum Norm { NONE, RMS, LAYER };

template <typename Real> struct Normed {
  Real scale, mean;
};

// The mix of a token, rounded to Element, and what a norm multiplies and subtracts.
template <typename Element, typename Real>
Normed<Real> mix_row(Real *mixed, const std::vector<const Element *> &members,
                     const std::vector<Real> &betas, Real factor, Norm norm, Real eps, int64_t t,
                     int64_t width) {
  weighted_sum(mixed, (const Element *)nullptr, members.data(), betas.data(), 1, members.size(),
               t * width, width);
  Real sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t d = 0; d < width; ++d) sum += mixed[d] = Real(Element(factor * mixed[d]));
  Real mean = norm == LAYER ? sum / width : 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < width; ++d) squares += (mixed[d] - mean) * (mixed[d] - mean);
  return {1 / std::sqrt(squares / width + Real(eps)), mean};
}

// `direct` are the completed sources and, last, the partial sum, if there is one: then `branch` is
// null or is added to it, into `partial`. `saved` holds a row of logits per direct source, then
// one of inverse RMS per direct source, then the norm's scale and mean.
template <typename Element, typename Out, typename Real = typename Arithmetic<Element>::Real>
void phase2(const Element *before, const Real *statistics, const Element **direct, int64_t count,
            const Element *branch, Element *partial, const Real *query, double eps, double factor,
            int norm, const Real *weight, const Real *bias, double norm_eps, Element *mixed,
            Out *normed, Real *saved, int64_t tokens, int64_t width, int threads) {
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<Real> row(width), betas;
    std::vector<const Element *> members;
    if (before) members.push_back(before);
    members.insert(members.end(), direct, direct + count);
    if (branch) members.back() = partial;
    for (int64_t t = begin; t < end; ++t) {
      if (branch) {
        const Element *old = direct[count - 1] + t * width, *more = branch + t * width;
        Element *sum = partial + t * width;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) sum[d] = Element(Real(old[d]) + Real(more[d]));
      }
      betas.clear();
      if (before) betas.push_back(statistics[t]);
      for (int64_t k = 0; k < count; ++k) {
        const Element *source = members[k + (before != nullptr)] + t * width;
        Real squares = dot<Element, Element, Real>(source, source, width);
        Real inverse = 1 / std::sqrt(squares / width + Real(eps));
        saved[(count + k) * tokens + t] = inverse;
        saved[k * tokens + t] = inverse * dot<Element, Real, Real>(source, query, width);
        betas.push_back(saved[k * tokens + t]);
      }
      softmax(betas);
      Normed<Real> state = mix_row<Element, Real>(row.data(), members, betas, factor, Norm(norm),
                                                  norm_eps, t, width);
      if (mixed) copy(mixed + t * width, row.data(), width);
      if (norm == NONE) continue;
      saved[2 * count * tokens + t] = state.scale;
      if (norm == LAYER) saved[(2 * count + 1) * tokens + t] = state.mean;
      Out *out = normed + t * width;
#pragma omp simd
      for (int64_t d = 0; d < width; ++d) {
        Real value = (row[d] - state.mean) * state.scale;
        if (weight) value *= weight[d];
        if (bias) value += bias[d];
        out[d] = Out(value);
      }
    }
  });
}

// Null pointers stand for gradients that did not arrive or that nobody wants. `sums` is
// [threads, 3, width]: towards the query, the norm's weight and its bias.
template <typename Element, typename Out, typename Real = typename Arithmetic<Element>::Real>
void phase2_backward(const Element *grad_partial, const Element *grad_mixed, const Out *grad_normed,
                     const Element *before, const Real *statistics, const Element **direct,
                     int64_t count, const Real *query, double factor, int norm, const Real *weight,
                     const Real *saved, Element *grad_before, Real *grad_statistics,
                     Element **grads, Real *sums, int64_t tokens, int64_t width, int threads) {
  over_tokens(tokens, threads, [&](int thread, int64_t begin, int64_t end) {
    std::vector<Real> row(width), total(width), result(width), betas, slopes;
    std::vector<const Element *> members;
    if (before) members.push_back(before);
    members.insert(members.end(), direct, direct + count);
    Real *to_query = sums + thread * 3 * width, *to_weight = to_query + width,
         *to_bias = to_weight + width;
    int64_t first = before != nullptr;
    for (int64_t t = begin; t < end; ++t) {
      betas.clear();
      if (before) betas.push_back(statistics[t]);
      for (int64_t k = 0; k < count; ++k) betas.push_back(saved[k * tokens + t]);
      softmax(betas);
      std::fill(total.begin(), total.end(), Real(0));
      if (grad_mixed) copy(total.data(), grad_mixed + t * width, width);
      if (grad_normed) {
        mix_row<Element, Real>(row.data(), members, betas, factor, Norm(norm), 0, t, width);
        const Out *arriving = grad_normed + t * width;
        Real scale = saved[2 * count * tokens + t], along = 0, sum = 0;
        Real mean = norm == LAYER ? saved[(2 * count + 1) * tokens + t] : 0;
#pragma omp simd reduction(+ : along, sum)
        for (int64_t d = 0; d < width; ++d) {
          Real unit = (row[d] - mean) * scale, grad = Real(arriving[d]);
          to_weight[d] += grad * unit;
          to_bias[d] += grad;
          if (weight) grad *= weight[d];
          row[d] = unit;
          result[d] = grad;
          along += grad * unit;
          sum += grad;
        }
        along /= width;
        sum = norm == LAYER ? sum / width : 0;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d)
          total[d] += scale * (result[d] - row[d] * along - sum);
      }
      for (int64_t d = 0; d < width; ++d) total[d] *= Real(factor);

      slopes.clear();
      Real expected = 0;
      for (size_t m = 0; m < members.size(); ++m) {
        slopes.push_back(dot<Element, Real, Real>(members[m] + t * width, total.data(), width));
        expected += betas[m] * slopes[m];
      }
      if (grad_before) {
        Element *out = grad_before + t * width;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) out[d] = Element(betas[0] * total[d]);
        grad_statistics[t] = betas[0] * (slopes[0] - expected);
        grad_statistics[tokens + t] = betas[0] * slopes[0];
      }
      for (int64_t k = 0; k < count; ++k) {
        const Element *source = members[first + k] + t * width;
        Real inverse = saved[(count + k) * tokens + t], logit = saved[k * tokens + t];
        Real beta = betas[first + k];
        Real towards_query = beta * (slopes[first + k] - expected) * inverse;
        Real towards_self = towards_query * inverse * logit / width;
        add_scaled(to_query, towards_query, source, width);
        if (!grads[k]) continue;
        const Element *more = k == count - 1 && grad_partial ? grad_partial + t * width : nullptr;
        Element *out = grads[k] + t * width;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) {
          Real value = beta * total[d] + towards_query * query[d] - towards_self * Real(source[d]);
          if (more) value += Real(more[d]);
          out[d] = Element(value);
        }
      }
    }
  });
}

}  // namespace

// Plain C functions for the element type that this is compiled for; `wide` says that normed rows are of type Real.
#define EXPORT(NAME, Element, Real)                                                               \
  extern "C" void complete_##NAME(                                                                \
      const Element *first, const Element *second, Element *source, const Real *queries,          \
      Real *logits, Real *inverse_rms, int64_t sites, double eps, int64_t tokens, int64_t width,  \
      int threads) {                                                                              \
    complete<Element>(first, second, source, queries, logits, inverse_rms, sites, eps, tokens,    \
                      width, threads);                                                            \
  }                                                                                               \
  extern "C" void complete_backward_##NAME(                                                       \
      const Element *grad_source, const Real *grad_logits, const Element *source,                 \
      const Real *queries, const Real *logits, const Real *inverse_rms, Element *grad,            \
      Real *grad_queries, int64_t sites, int64_t tokens, int64_t width, int threads) {            \
    complete_backward<Element>(grad_source, grad_logits, source, queries, logits, inverse_rms,    \
                               grad, grad_queries, sites, tokens, width, threads);                \
  }                                                                                               \
  extern "C" void phase1_##NAME(                                                                  \
      const Element **sources, const Real **logits, Element **mixes, Real *statistics,            \
      int64_t count, int64_t sites, int64_t tokens, int64_t width, int threads) {                 \
    phase1<Element>(sources, logits, mixes, statistics, count, sites, tokens, width, threads);    \
  }                                                                                               \
  extern "C" void phase1_backward_##NAME(                                                         \
      const Element **grad_mixes, const Real *grad_statistics, const Element **grad_carriers,     \
      const Element **sources, const Real **logits, const Real *statistics, Element **grads,      \
      Real *grad_logits, int64_t count, int64_t sites, int64_t tokens, int64_t width,             \
      int threads) {                                                                              \
    phase1_backward<Element>(grad_mixes, grad_statistics, grad_carriers, sources, logits,         \
                             statistics, grads, grad_logits, count, sites, tokens, width,         \
                             threads);                                                            \
  }                                                                                               \
  extern "C" void phase2_##NAME(                                                                  \
      const Element *before, const Real *statistics, const Element **direct, int64_t count,       \
      const Element *branch, Element *partial, const Real *query, double eps, double factor,      \
      int norm, const Real *weight, const Real *bias, double norm_eps, Element *mixed,            \
      void *normed, int wide, Real *saved, int64_t tokens, int64_t width, int threads) {          \
    if (wide)                                                                                     \
      phase2<Element, Real>(before, statistics, direct, count, branch, partial, query, eps,       \
                            factor, norm, weight, bias, norm_eps, mixed, (Real *)normed, saved,   \
                            tokens, width, threads);                                              \
    else                                                                                          \
      phase2<Element, Element>(before, statistics, direct, count, branch, partial, query, eps,    \
                               factor, norm, weight, bias, norm_eps, mixed, (Element *)normed,    \
                               saved, tokens, width, threads);                                    \
  }                                                                                               \
  extern "C" void phase2_backward_##NAME(                                                         \
      const Element *grad_partial, const Element *grad_mixed, const void *grad_normed, int wide,  \
      const Element *before, const Real *statistics, const Element **direct, int64_t count,       \
      const Real *query, double factor, int norm, const Real *weight, const Real *saved,          \
      Element *grad_before, Real *grad_statistics, Element **grads, Real *sums, int64_t tokens,   \
      int64_t width, int threads) {                                                               \
    if (wide)                                                                                     \
      phase2_backward<Element, Real>(grad_partial, grad_mixed, (const Real *)grad_normed, before, \
                                     statistics, direct, count, query, factor, norm, weight,      \
                                     saved, grad_before, grad_statistics, grads, sums, tokens,    \
                                     width, threads);                                             \
    else                                                                                          \
      phase2_backward<Element, Element>(grad_partial, grad_mixed, (const Element *)grad_normed,   \
                                        before, statistics, direct, count, query, factor, norm,   \
                                        weight, saved, grad_before, grad_statistics, grads, sums, \
                                        tokens, width, threads);                                  \
  }

#if defined(FOR_FLOAT32)
EXPORT(float32, float, float)
#elif defined(FOR_FLOAT64)
EXPORT(float64, double, double)
#elif defined(FOR_BFLOAT16)
EXPORT(bfloat16, BFloat16, float)
#endif
