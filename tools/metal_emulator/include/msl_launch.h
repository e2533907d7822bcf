// From a kernel function to a launch: appended to the translated texts, after their kernels.
#undef volatile
#undef device
#undef thread
#undef constant
#undef kernel
#include <utility>

namespace msl {

// TVM's order of parameters: buffers, the struct of scalars, then the position of the
// threadgroup and of the thread in it. `get(arguments, n)` is the nth of its kind.
enum Kind { kBuffer, kScalars, kPosition };
template <class T> struct Bind {
  static constexpr Kind kind = kPosition;
  static void set(metal::uint3& o, uvec3 v) { o.x = v.x, o.y = v.y, o.z = v.z; }
  static void set(metal::uint2& o, uvec3 v) { o.x = v.x, o.y = v.y; }
  static void set(unsigned& o, uvec3 v) { o = v.x; }
  static T get(const Arguments& a, int n) {
    T t;
    set(t, n == 0 ? a.group : a.thread);
    return t;
  }
};
template <class T> struct Bind<device_ptr<T>> {
  static constexpr Kind kind = kBuffer;
  static device_ptr<T> get(const Arguments& a, int n) {
    const Buffer& b = (*a.buffers)[n];
    return {(T*)b.data, b.data, b.data + b.size, b.number};
  }
};
template <class T> struct Bind<const T&> {
  static constexpr Kind kind = kScalars;
  static const T& get(const Arguments& a, int) { return *(const T*)a.scalars; }
};
constexpr int before(const Kind* kinds, size_t i) {
  int n = 0;
  for (size_t j = 0; j < i; ++j) n += kinds[j] == kinds[i];
  return n;
}
template <class... A, size_t... I> void call(void (*f)(A...), const Arguments& a, std::index_sequence<I...>) {
  constexpr Kind kinds[] = {Bind<A>::kind...};
  f(Bind<A>::get(a, before(kinds, I))...);
}
template <class... A> void call(void (*f)(A...), const Arguments& a) { call(f, a, std::index_sequence_for<A...>()); }

}  // namespace msl

#define MSL_ENTRY(name, kernel_name)                                                        \
  static void name##_body(const msl::Arguments& a) { msl::call(kernel_name, a); }          \
  extern "C" int name(const msl::Request* r) { return msl::launch(name##_body, *r); }
