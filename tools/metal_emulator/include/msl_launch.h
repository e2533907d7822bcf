// From a kernel function to a launch: appended to the translated texts, after their kernels.
#undef volatile
#undef device
#undef thread
#undef constant
#undef kernel
#include <tuple>

namespace msl {

// TVM's order of parameters: buffers, the struct of scalars, then the position of the
// threadgroup and of the thread in it.
template <class T> struct Bind {
  static void set(metal::uint3& o, uvec3 v) { o.x = v.x, o.y = v.y, o.z = v.z; }
  static void set(metal::uint2& o, uvec3 v) { o.x = v.x, o.y = v.y; }
  static void set(unsigned& o, uvec3 v) { o = v.x; }
  static T get(const Arguments& a, int&, int& positions) {
    T t;
    set(t, positions++ == 0 ? a.group : a.thread);
    return t;
  }
};
template <class T> struct Bind<device_ptr<T>> {
  static device_ptr<T> get(const Arguments& a, int& buffers, int&) {
    const Buffer& b = (*a.buffers)[buffers++];
    return {(T*)b.data, b.data, b.data + b.size, b.number};
  }
};
template <class T> struct Bind<const T&> {
  static const T& get(const Arguments& a, int&, int&) { return *(const T*)a.scalars; }
};
template <class... A> void call(void (*f)(A...), const Arguments& a) {
  int buffers = 0, positions = 0;
  std::tuple<A...> t{Bind<A>::get(a, buffers, positions)...};
  std::apply(f, t);
}

}  // namespace msl

#define MSL_ENTRY(name, kernel_name)                                                        \
  static void name##_body(const msl::Arguments& a) { msl::call(kernel_name, a); }          \
  extern "C" int name(const msl::Request* r) { return msl::launch(name##_body, *r); }
