// From tensors to addresses, upon PyTorch's stable ABI. One function per operator follows, generated
// by cpp_library.py: it hands what an operator is called with to its function.

#include <optional>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace {

using torch::stable::Tensor;

// The address of a tensor that a function can read as it is; becomes the pointer it asks for.
struct Address {
  void *address;
  template <typename T> operator T *() const { return static_cast<T *>(address); }
};

using torch::headeronly::ScalarType;
constexpr ScalarType REAL = sizeof(Real) == 8 ? ScalarType::Double : ScalarType::Float;
#if defined(FOR_BFLOAT16)
constexpr ScalarType ELEMENT = ScalarType::BFloat16;
#else
constexpr ScalarType ELEMENT = REAL;
#endif

Address unwrapped(const Tensor &tensor) {
  ScalarType type = tensor.scalar_type();
  bool fits = tensor.is_contiguous() && (type == ELEMENT || type == REAL);
  STD_TORCH_CHECK(fits, "the C++ library was handed a tensor that is not contiguous, or not of the "
                        "dtype of the stream or its sums; this is a bug of attnres-compile");
  return {tensor.data_ptr()};
}
Address unwrapped(const std::optional<Tensor> &tensor) { return tensor ? unwrapped(*tensor) : Address{nullptr}; }

// The addresses of several.
struct Addresses {
  std::vector<void *> addresses;
  template <typename T> operator T **() { return (T **)addresses.data(); }
};
Addresses unwrapped(const std::vector<Tensor> &tensors) {
  Addresses all;
  for (const Tensor &tensor : tensors) all.addresses.push_back(unwrapped(tensor).address);
  return all;
}
template <typename T> const T &unwrapped(const T &numbers) { return numbers; }

struct Sizes {
  int64_t tokens, width;

  Sizes(int64_t tokens, int64_t width) : tokens(tokens), width(width) {}
  // Those of a source, [*tokens, width].
  explicit Sizes(const Tensor &like) : tokens(0), width(like.size(like.dim() - 1)) {
    if (width) tokens = like.numel() / width;
  }
  int64_t threads() const {
    return std::clamp<int64_t>(torch::stable::get_num_threads(), 1, std::max<int64_t>(tokens, 1));
  }
};

}  // namespace

