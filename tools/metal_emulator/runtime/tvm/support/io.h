// TVM's wheel ships the header of FunctionInfo but not the two that it includes; this is the
// part that reading a module needs. Wire format: little endian, 64-bit lengths and counts.
#pragma once
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>

#include <cstdint>
#include <string>
#include <type_traits>

namespace tvm {
namespace support {

template <class T, class = void> struct Serializer;

class Stream {
 public:
  virtual ~Stream() = default;
  virtual size_t Read(void*, size_t) = 0;
  virtual size_t Write(const void*, size_t) = 0;
  template <class T> void Write(const T& v) { Serializer<T>::Write(this, v); }
  template <class T> bool Read(T* v) { return Serializer<T>::Read(this, v); }
  template <class T> void WriteArray(const T* v, size_t n) {
    while (n--) Write(*v++);
  }
  template <class T> bool ReadArray(T* v, size_t n) {
    while (n--)
      if (!Read(v++)) return false;
    return true;
  }
};

template <class T>
struct Serializer<T, std::enable_if_t<std::is_arithmetic_v<T> || std::is_enum_v<T>>> {
  static constexpr bool enabled = true;
  static void Write(Stream* s, const T& v) { s->Write(static_cast<const void*>(&v), sizeof v); }
  static bool Read(Stream* s, T* v) { return s->Read(static_cast<void*>(v), sizeof *v) == sizeof *v; }
};

template <class B> struct BlobSerializer {
  static constexpr bool enabled = true;
  static void Write(Stream* s, const B& v) {
    uint64_t n = v.size();
    s->Write(n);
    if (n) s->Write(static_cast<const void*>(v.data()), n);
  }
  static bool Read(Stream* s, B* v) {
    uint64_t n;
    if (!s->Read(&n)) return false;
    std::string text(n, 0);
    if (s->Read(static_cast<void*>(&text[0]), n) != n) return false;
    *v = B(std::move(text));
    return true;
  }
};
template <> struct Serializer<ffi::String> : BlobSerializer<ffi::String> {};
template <> struct Serializer<ffi::Bytes> : BlobSerializer<ffi::Bytes> {};

template <> struct Serializer<DLDataType> {
  static constexpr bool enabled = true;
  static void Write(Stream* s, const DLDataType& t) {
    s->Write(t.code);
    s->Write(t.bits);
    s->Write(t.lanes);
  }
  static bool Read(Stream* s, DLDataType* t) {
    return s->Read(&t->code) && s->Read(&t->bits) && s->Read(&t->lanes);
  }
};

template <> struct Serializer<DLDevice> {
  static constexpr bool enabled = true;
  static void Write(Stream* s, const DLDevice& d) {
    s->Write(static_cast<int32_t>(d.device_type));
    s->Write(d.device_id);
  }
  static bool Read(Stream* s, DLDevice* d) {
    int32_t type;
    if (!s->Read(&type)) return false;
    d->device_type = static_cast<DLDeviceType>(type);
    return s->Read(&d->device_id);
  }
};

template <class T> struct Serializer<ffi::Array<T>> {
  static constexpr bool enabled = true;
  static void Write(Stream* s, const ffi::Array<T>& a) {
    s->Write(static_cast<uint64_t>(a.size()));
    for (size_t i = 0; i < a.size(); ++i) s->Write(T(a[i]));
  }
  static bool Read(Stream* s, ffi::Array<T>* a) {
    uint64_t n;
    if (!s->Read(&n)) return false;
    *a = ffi::Array<T>();
    while (n--) {
      T v;
      if (!s->Read(&v)) return false;
      a->push_back(v);
    }
    return true;
  }
};

template <class K, class V> struct Serializer<ffi::Map<K, V>> {
  static constexpr bool enabled = true;
  static void Write(Stream* s, const ffi::Map<K, V>& m) {
    s->Write(static_cast<uint64_t>(m.size()));
    for (const auto& kv : m) {
      s->Write(K(kv.first));
      s->Write(V(kv.second));
    }
  }
  static V Empty() {
    if constexpr (std::is_constructible_v<V, std::nullptr_t> && !std::is_default_constructible_v<V>)
      return V(nullptr);
    else
      return V();
  }
  static bool Read(Stream* s, ffi::Map<K, V>* m) {
    uint64_t n;
    if (!s->Read(&n)) return false;
    *m = ffi::Map<K, V>();
    while (n--) {
      K k;
      V v = Empty();
      if (!s->Read(&k) || !s->Read(&v)) return false;
      m->Set(k, v);
    }
    return true;
  }
};

}  // namespace support
}  // namespace tvm
