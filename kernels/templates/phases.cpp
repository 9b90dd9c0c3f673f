// The phases of Block Attention Residuals on a CPU. The formulas stand in complete.py, phase1.py
// and phase2.py of this package; names of arguments are those of the schemas in cpp_library.py.
//
// All tensors are contiguous with the channels last: `tokens` rows of `width` elements. Rows stay
// in the first-level cache while a token is worked on, so each is read from memory once. Every
// thread has a contiguous run of tokens, and sums over tokens are formed per thread and added up in
// the order of threads, so that results do not vary from run to run. Null pointers stand for what
// is missing or what nobody wants. Arguments are in the order of these schemas, results last, and
// after them the sizes.

// Sources -----------------------------------------------------------------------------------------

extern "C" void complete(const Element *first, const Element *second, const Element *bias,
                         const Real *queries, int64_t sites, double eps, Element *source,
                         Real *logits, Real *inverse_rms, int64_t tokens, int64_t width,
                         int64_t threads) {
  Turned turned(queries, sites, width);
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<Real> products(sites * TOKENS);
    in_batches(begin, end, TOKENS, [&](int64_t t, int64_t some) {
      Real inverses[TOKENS];
      for (int64_t u = 0; u < some; ++u) {
        int64_t offset = (t + u) * width;
        const Element *row = first + offset;
        Sum squares;
        if (second) {
          const Element *other = second + offset;
          Element *sum = source + offset;
          each(width, EACH {
            auto value = added<KIND>(row, other, bias, d);
            store(sum + d, value);
            squares.add(way, value * value);
          });
        } else {
          each(width, EACH {
            auto value = load<KIND>(row + d);
            squares.add(way, value * value);
          });
        }
        inverses[u] = squares.total();
      }
      for (int64_t u = 0; u < some; ++u)
        inverse_rms[t + u] = inverses[u] = 1 / std::sqrt(inverses[u] / width + Real(eps));
      turned.times((second ? source : first) + t * width, some, products.data());
      for (int64_t j = 0; j < sites; ++j)
        for (int64_t u = 0; u < some; ++u)
          logits[j * tokens + t + u] = turned.at(products.data(), j, u) * inverses[u];
    });
  });
}

extern "C" void complete_backward(const Element *source, const Element *grad_source,
                                  const Real *grad_logits, const Real *queries, int64_t sites,
                                  const Real *logits, const Real *inverse_rms, Element *grad,
                                  Real *grad_queries, int64_t tokens, int64_t width,
                                  int64_t threads) {
  Shares shares(grad_queries ? threads : 0, sites * width);
  over_tokens(tokens, threads, [&](int thread, int64_t begin, int64_t end) {
    auto query_rows = rows_of(queries, sites, width);
    auto sum_rows = rows_of(shares.of(thread), sites, width);
    std::vector<Real> slopes(sites * TOKENS), totals(TOKENS * width);
    auto total_rows = rows_of(totals.data(), TOKENS, width);
    in_batches(begin, end, TOKENS, [&](int64_t t, int64_t some) {
      Real towards_self[TOKENS] = {};
      for (int64_t j = 0; j < sites; ++j)
        for (int64_t u = 0; u < some; ++u) {
          int64_t at = j * tokens + t + u;
          slopes[j * TOKENS + u] = grad_logits[at] * inverse_rms[t + u];
          towards_self[u] += grad_logits[at] * logits[at];
        }
      auto source_rows = rows_of(source + t * width, some, width);
      if (grad_queries)
        combine(source_rows.data(), some, slopes.data(), TOKENS, 1, sum_rows.data(),
                sum_rows.data(), sites, width);
      if (!grad) return;
      auto arriving = rows_of(grad_source ? grad_source + t * width : nullptr, some, width);
      combine(query_rows.data(), sites, slopes.data(), 1, TOKENS,
              grad_source ? arriving.data() : ZEROS, total_rows.data(), some, width);
      for (int64_t u = 0; u < some; ++u) {
        Real inverse = inverse_rms[t + u], along = towards_self[u] * inverse * inverse / width;
        Element *out = grad + (t + u) * width;
        each(width, EACH {
          store(out + d, load<KIND>(total_rows[u] + d) - along * load<KIND>(source_rows[u] + d));
        });
      }
    });
  });
  shares.add_up(grad_queries, 0, sites * width);
}

// All sites of a block over its completed sources -------------------------------------------------

extern "C" void phase1(const Element **sources, const Real **logits, int64_t count,
                       int64_t sites, Element **mixes, Real *statistics, int64_t tokens,
                       int64_t width, int64_t threads) {
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<Real> alphas(sites * count * TOKENS);
    std::vector<const Element *> source_rows(count);
    std::vector<Element *> mix_rows(sites);
    in_batches(begin, end, TOKENS, [&](int64_t t, int64_t some) {
      for (int64_t j = 0; j < sites; ++j) {
        Real *alpha = &alphas[j * count * TOKENS], top[TOKENS], sum[TOKENS] = {};
        std::copy_n(logits[0] + j * tokens + t, some, top);
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
          sum[u] = 1 / sum[u];
        }
        for (int64_t i = 0; i < count; ++i)
#pragma omp simd
          for (int64_t u = 0; u < some; ++u) alpha[i * TOKENS + u] *= sum[u];
      }
      for (int64_t u = 0; u < some; ++u) {
        rows_at(source_rows, sources, (t + u) * width);
        rows_at(mix_rows, mixes, (t + u) * width);
        combine(source_rows.data(), count, &alphas[u], count * TOKENS, TOKENS, ZEROS,
                mix_rows.data(), sites, width);
      }
    });
  });
}

// Gradients have arrived for the sites `mixed` and the sources `arrived`; those of the sources
// `wanted` are wanted.
extern "C" void phase1_backward(const Element **sources, const Real **logits, int64_t count,
                                int64_t sites, const Real *statistics, const Element **grad_mixes,
                                const int64_t *mixed, int64_t mixes, const Real *grad_statistics,
                                const Element **grad_carriers, const int64_t *arrived,
                                int64_t arrivals, Element **grads, const int64_t *wanted,
                                int64_t wants, Real *grad_logits, int64_t tokens, int64_t width,
                                int64_t threads) {
  auto all_mixes = placed(grad_mixes, mixed, mixes, sites);
  auto all_carriers = placed(grad_carriers, arrived, arrivals, count);
  auto all_grads = placed(grads, wanted, wants, count);
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    std::vector<Real> alphas(count * sites * TOKENS), slopes(sites);
    std::vector<Element> zeros(width), unwanted(width);
    std::vector<const Element *> mix_rows(sites), carrier_rows(count);
    std::vector<Element *> grad_rows(count);
    in_batches(begin, end, TOKENS, [&](int64_t t, int64_t some) {
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < sites; ++j)
#pragma omp simd
          for (int64_t u = 0; u < some; ++u)
            alphas[(i * sites + j) * TOKENS + u] = exponential(
                logits[i][j * tokens + t + u] - statistics[2 * j * tokens + t + u]);
      for (int64_t u = 0; u < some; ++u) {
        int64_t offset = (t + u) * width;
        rows_at(mix_rows, all_mixes.data(), offset, (const Element *)zeros.data());
        rows_at(carrier_rows, all_carriers.data(), offset);
        rows_at(grad_rows, all_grads.data(), offset, unwanted.data());
        if (wants)
          combine(mix_rows.data(), sites, &alphas[u], sites * TOKENS, TOKENS, carrier_rows.data(),
                  grad_rows.data(), count, width);
        for (int64_t i = 0; grad_logits && i < count; ++i) {
          dots(sources[i] + offset, mix_rows.data(), sites, width, slopes.data(), 1);
          for (int64_t j = 0; j < sites; ++j) {
            Real constant = grad_statistics[2 * j * tokens + t + u]
                            - grad_statistics[(2 * j + 1) * tokens + t + u];
            grad_logits[(i * sites + j) * tokens + t + u] =
                alphas[(i * sites + j) * TOKENS + u] * (slopes[j] + constant);
          }
        }
      }
    });
  });
}

// One site ----------------------------------------------------------------------------------------

// `direct` are the completed sources and, last, the partial sum, if there is one: then `branch` is
// null or is added to it, with `branch_bias`, into `partial`. `saved` holds a row of logits per
// direct source, then
// one of inverse RMS per direct source, then the norm's scale and mean. `wide` says that normed
// rows are of type Real.
extern "C" void phase2(const Element *before, const Element **direct, int64_t count,
                       const Real *statistics, const Element *branch, const Element *branch_bias,
                       const Real *query, double eps, double factor, int64_t norm,
                       const Real *weight, const Real *bias, double norm_eps, int64_t wide,
                       Element *partial, Element *mixed, void *normed, Real *saved,
                       int64_t tokens, int64_t width, int64_t threads) {
  over_tokens(tokens, threads, [&](int, int64_t begin, int64_t end) {
    int64_t first = before != nullptr, members = first + count;
    std::vector<Real> mixes(TOKENS * width), betas(members * TOKENS);
    std::vector<const Element *> tensors(members, before), rows(members);
    std::copy_n(direct, count, tensors.begin() + first);
    if (branch) tensors.back() = partial;
    in_batches(begin, end, batch_of(width), [&](int64_t t, int64_t some) {
      if (before) std::copy_n(statistics + t, some, betas.begin());
      for (int64_t k = 0; k < count; ++k) {
        Real *logits = saved + k * tokens + t, *inverses = saved + (count + k) * tokens + t;
        for (int64_t u = 0; u < some; ++u) {
          int64_t offset = (t + u) * width;
          const Element *source = direct[k] + offset;
          Sum squares, along;
          if (branch && k == count - 1) {
            const Element *more = branch + offset;
            Element *sum = partial + offset;
            each(width, EACH {
              auto value = added<KIND>(source, more, branch_bias, d);
              store(sum + d, value);
              squares.add(way, value * value);
              along.add(way, value * load<KIND>(query + d));
            });
          } else {
            each(width, EACH {
              auto value = load<KIND>(source + d);
              squares.add(way, value * value);
              along.add(way, value * load<KIND>(query + d));
            });
          }
          inverses[u] = squares.total();
          logits[u] = along.total();
        }
        for (int64_t u = 0; u < some; ++u) {
          inverses[u] = 1 / std::sqrt(inverses[u] / width + Real(eps));
          betas[(first + k) * TOKENS + u] = logits[u] *= inverses[u];
        }
      }
      softmax(betas.data(), members, some);
      Real means[TOKENS], scales[TOKENS];
      for (int64_t u = 0; u < some; ++u) {
        rows_at(rows, tensors.data(), (t + u) * width);
        means[u] = mix_row(&mixes[u * width], rows, &betas[u], factor, width) / width;
        if (mixed) copy_row(mixed + (t + u) * width, &mixes[u * width], width);
      }
      if (norm == NONE) return;
      if (norm == RMS) std::fill_n(means, some, Real(0));
      for (int64_t u = 0; u < some; ++u) scales[u] = square_sum(&mixes[u * width], means[u], width);
      for (int64_t u = 0; u < some; ++u) scales[u] = 1 / std::sqrt(scales[u] / width + Real(norm_eps));
      std::copy_n(scales, some, saved + 2 * count * tokens + t);
      if (norm == LAYER) std::copy_n(means, some, saved + (2 * count + 1) * tokens + t);
      for (int64_t u = 0; u < some; ++u) {
        Normed state{scales[u], means[u]};
        int64_t offset = (t + u) * width;
        if (wide)
          write_normed((Real *)normed + offset, &mixes[u * width], state, weight, bias, width);
        else
          write_normed((Element *)normed + offset, &mixes[u * width], state, weight, bias, width);
      }
    });
  });
}

extern "C" void phase2_backward(const Element *before, const Element **direct, int64_t count,
                                const Real *statistics, const Element *grad_partial,
                                const Element *grad_mixed, const void *grad_normed, int64_t wide,
                                const Real *query, double factor, int64_t norm,
                                const Real *weight, const Real *saved, Element *grad_before,
                                Real *grad_statistics, Element **grads, const int64_t *wanted,
                                int64_t wants, Real *grad_query, Real *grad_weight,
                                Real *grad_bias, Real *grad_branch_bias, int64_t tokens,
                                int64_t width, int64_t threads) {
  auto all_grads = placed(grads, wanted, wants, count);
  Shares shares(threads, 4 * width);
  over_tokens(tokens, threads, [&](int thread, int64_t begin, int64_t end) {
    int64_t first = before != nullptr, members = first + count;
    std::vector<Real> row(width), total(width), scratch(width);
    std::vector<Real> betas(members * TOKENS), slopes(members);
    std::vector<const Element *> tensors(members, before), rows(members);
    std::copy_n(direct, count, tensors.begin() + first);
    Real *to_query = shares.of(thread), *to_weight = to_query + width,
         *to_bias = to_weight + width, *to_branch_bias = to_bias + width;
    in_batches(begin, end, TOKENS, [&](int64_t start, int64_t some) {
      if (before) std::copy_n(statistics + start, some, betas.begin());
      for (int64_t k = 0; k < count; ++k)
        std::copy_n(saved + k * tokens + start, some, &betas[(first + k) * TOKENS]);
      softmax(betas.data(), members, some);
      for (int64_t u = 0; u < some; ++u) {
        int64_t t = start + u;
        rows_at(rows, tensors.data(), t * width);
        if (grad_mixed)
          copy_row(total.data(), grad_mixed + t * width, width);
        else
          std::fill(total.begin(), total.end(), Real(0));
        if (grad_normed) {
          mix_row(row.data(), rows, &betas[u], factor, width);
          Normed state{saved[2 * count * tokens + t],
                       norm == LAYER ? saved[(2 * count + 1) * tokens + t] : 0};
          if (wide)
            normed_backward(total.data(), (const Real *)grad_normed + t * width, row.data(),
                            scratch.data(), state, Norm(norm), weight, to_weight, to_bias, width);
          else
            normed_backward(total.data(), (const Element *)grad_normed + t * width, row.data(),
                            scratch.data(), state, Norm(norm), weight, to_weight, to_bias, width);
        }
        Real expected = 0;
        for (int64_t m = 0; m < members; ++m) {
          slopes[m] = Real(factor) * dot(rows[m], (const Real *)total.data(), width);
          expected += betas[m * TOKENS + u] * slopes[m];
        }
        if (grad_before) {
          Element *out = grad_before + t * width;
          Real share = betas[u] * Real(factor);
          each(width, EACH { store(out + d, share * load<KIND>(total.data() + d)); });
          grad_statistics[t] = betas[u] * (slopes[0] - expected);
          grad_statistics[tokens + t] = betas[u] * slopes[0];
        }
        for (int64_t k = 0; k < count; ++k) {
          bool is_last = k == count - 1, sums_grad = is_last && grad_branch_bias;
          const Element *source = rows[first + k];
          const Element *more = is_last && grad_partial ? grad_partial + t * width : nullptr;
          Element *out = all_grads[k] ? all_grads[k] + t * width : nullptr;
          Real beta = betas[(first + k) * TOKENS + u], share = beta * Real(factor);
          Real inverse = saved[(count + k) * tokens + t], logit = saved[k * tokens + t];
          Real towards_query = beta * (slopes[first + k] - expected) * inverse;
          Real towards_self = towards_query * inverse * logit / width;
          each(width, EACH {
            auto value = load<KIND>(source + d);
            store(to_query + d, load<KIND>(to_query + d) + towards_query * value);
            if (!out) return;
            auto grad = share * load<KIND>(total.data() + d)
                        + towards_query * load<KIND>(query + d) - towards_self * value;
            if (more) grad += load<KIND>(more + d);
            store(out + d, grad);
            if (sums_grad) store(to_branch_bias + d, load<KIND>(to_branch_bias + d) + grad);
          });
        }
      }
    });
  });
  shares.add_up(grad_query, 0, width);
  shares.add_up(grad_weight, width, width);
  shares.add_up(grad_bias, 2 * width, width);
  shares.add_up(grad_branch_bias, 3 * width, width);
}
