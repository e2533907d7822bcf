// Pointers of the device and threadgroup address spaces: checked, counted, and not convertible
// into each other.
//
// A read is `p[i]` used as a value, a write an assignment to it. Every access is checked for
// bounds and alignment; threadgroup accesses are checked for races, device accesses for races
// between threadgroups while tracing.
#pragma once
#include <type_traits>

#include "msl_fiber.h"

namespace msl {

template <Space S, class T>
struct ref;

template <Space S, class T>
struct ptr {
  typedef std::remove_const_t<T> V;
  T* at = nullptr;
  const char* begin = nullptr;
  const char* end = nullptr;
  int buffer = 0;  // number of the device buffer

  ptr() = default;
  ptr(T* p, const char* b, const char* e, int n) : at(p), begin(b), end(e), buffer(n) {}
  template <class U, std::enable_if_t<std::is_same<U, V>::value && std::is_const<T>::value, int> = 0>
  ptr(const ptr<S, U>& o) : at(o.at), begin(o.begin), end(o.end), buffer(o.buffer) {}
  // A cast to another element type, as in (const device float4*)p.
  template <class U, std::enable_if_t<!std::is_same<std::remove_const_t<U>, V>::value, int> = 0>
  explicit ptr(const ptr<S, U>& o) : at((T*)o.at), begin(o.begin), end(o.end), buffer(o.buffer) {
    static_assert(std::is_const<T>::value || !std::is_const<U>::value, "cast drops const");
  }
  ref<S, T> operator[](long i) const { return {{at + i, begin, end, buffer}}; }
  ref<S, T> operator*() const { return {*this}; }
  ptr operator+(long n) const { return {at + n, begin, end, buffer}; }
  ptr operator-(long n) const { return {at - n, begin, end, buffer}; }
  ptr& operator+=(long n) { at += n; return *this; }
  bool operator==(const ptr& o) const { return at == o.at; }
  bool operator!=(const ptr& o) const { return at != o.at; }

  void check(bool writes) const { access(S, at, sizeof(T), alignof(T), writes, begin, end, buffer); }
  V load() const { check(false); return *at; }
  void store(const V& v) const { check(true); *at = v; }
};

template <Space S, class T>
struct ref {
  typedef std::remove_const_t<T> V;
  ptr<S, T> place;
  operator V() const { return place.load(); }
  template <class U, std::enable_if_t<std::is_arithmetic<U>::value && !std::is_arithmetic<V>::value, int> = 0>
  explicit operator U() const { return (U)place.load(); }
  const ref& operator=(const V& v) const { place.store(v); return *this; }
  const ref& operator=(const ref& o) const { place.store(o.place.load()); return *this; }
  const ref& operator+=(const V& v) const { place.store(V(place.load() + v)); return *this; }
  const ref& operator-=(const V& v) const { place.store(V(place.load() - v)); return *this; }
  const ref& operator*=(const V& v) const { place.store(V(place.load() * v)); return *this; }
  ptr<S, T> operator&() const { return place; }
};

template <class T> using device_ptr = ptr<kDevice, T>;
template <class T> using threadgroup_ptr = ptr<kThreadgroup, T>;

template <class T> threadgroup_ptr<T> threadgroup_array_of(int line, size_t n) {
  char* at = threadgroup_array(line, n * sizeof(T));
  return {(T*)at, at, at + n * sizeof(T), 0};
}

// The part of a buffer that begins at `p` and has `n` elements: accesses outside of it fail even
// when they stay inside the buffer.
template <Space S, class T> ptr<S, T> bound(const ptr<S, T>& p, long n) {
  const char* a = (const char*)p.at;
  if (n < 0 || a < p.begin || a + n * sizeof(T) > p.end) fail("a view does not fit into its buffer");
  return {p.at, a, a + n * sizeof(T), p.buffer};
}

}  // namespace msl
