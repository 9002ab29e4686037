// views.h -- gptr and smem: what T* is under nvcc, with every access checked.
//
// Elements of a mutable view are proxies (Ref): they read when converted, write when assigned. Elements of a const view are
// values. Memory is accessed by memcpy, so one region may be looked at through views of several types.
#pragma once

#include <cstddef>
#include <type_traits>

#include "core.h"

template <typename T, int N>
struct vec;

namespace simt {

// What may index a view: integers, plain enumerators, elements of views.
template <typename I>
concept Offset = std::is_convertible_v<I, ptrdiff_t>;

// ---- global memory ----------------------------------------------------------------------------------------------

struct GlobalAccess {
  template <typename T>
  static SIMT_INLINE int64_t check_bounds(Access access, const void* p, const Range* range) {
    const int64_t at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) - range->begin);
    if (__builtin_expect(at < 0 || at > range->bytes - static_cast<int64_t>(sizeof(T)), 0))
      global_fault(access, p, range, sizeof(T));
    return at;
  }
  template <typename T>
  static SIMT_INLINE T read(const void* p, const Range* range) {
    const int64_t at = check_bounds<T>(Access::kRead, p, range);
    if (range->shadow) global_read_shadow(range, at, sizeof(T));
    T value;
    __builtin_memcpy(&value, p, sizeof(T));
    return value;
  }
  template <typename T>
  static SIMT_INLINE void write(void* p, Range* range, const T& value) {
    const int64_t at = check_bounds<T>(Access::kWrite, p, range);
    global_write_shadow(range, at, sizeof(T));
    __builtin_memcpy(p, &value, sizeof(T));
  }
};

// ---- shared memory ----------------------------------------------------------------------------------------------

// The shadow of [at, at + 2 n): in order at a glance, or looked at closely.
template <uint32_t n>
SIMT_INLINE void check_shared_read(uint32_t at) {
  const uint32_t* w = cur.shared_write + at / 2;
  uint32_t* r = cur.shared_read + at / 2;
  const uint32_t start = cur.start, barrier = cur.barrier, me = cur.me;
  bool plain = true;
#pragma GCC unroll 16
  for (uint32_t i = 0; i < n; ++i) plain &= (w[i] - start < barrier - start) & (r[i] < barrier);
  if (__builtin_expect(!plain, 0)) return shared_read_slow(at, 2 * n);
#pragma GCC unroll 16
  for (uint32_t i = 0; i < n; ++i) r[i] = me;
}
template <uint32_t n>
SIMT_INLINE void check_shared_write(uint32_t at) {
  uint32_t* w = cur.shared_write + at / 2;
  const uint32_t* r = cur.shared_read + at / 2;
  const uint32_t barrier = cur.barrier, me = cur.me;
  bool plain = true;
#pragma GCC unroll 16
  for (uint32_t i = 0; i < n; ++i) plain &= (w[i] < barrier) & (r[i] < barrier);
  if (__builtin_expect(!plain, 0)) return shared_write_slow(at, 2 * n);
#pragma GCC unroll 16
  for (uint32_t i = 0; i < n; ++i) w[i] = me;
}
// Vectors: out of line, since kernels are large enough without.
template <uint32_t n>
__attribute__((noinline)) void check_shared_read_vector(uint32_t at) {
  check_shared_read<n>(at);
}
template <uint32_t n>
__attribute__((noinline)) void check_shared_write_vector(uint32_t at) {
  check_shared_write<n>(at);
}

struct SharedAccess {
  template <typename T>
  static SIMT_INLINE T read(uint32_t at) {
    constexpr uint32_t n = (sizeof(T) + 1) / 2;
    if constexpr (sizeof(T) == 1) {
      shared_byte(at, false);
    } else if constexpr (sizeof(T) <= 4) {
      check_shared_read<n>(at);
    } else {
      check_shared_read_vector<n>(at);
    }
    T value;
    __builtin_memcpy(&value, cur.shared + at, sizeof(T));
    return value;
  }
  template <typename T>
  static SIMT_INLINE void write(uint32_t at, const T& value) {
    constexpr uint32_t n = (sizeof(T) + 1) / 2;
    if constexpr (sizeof(T) == 1) {
      shared_byte(at, true);
    } else if constexpr (sizeof(T) <= 4) {
      check_shared_write<n>(at);
    } else {
      check_shared_write_vector<n>(at);
    }
    __builtin_memcpy(cur.shared + at, &value, sizeof(T));
  }
};

// ---- elements ---------------------------------------------------------------------------------------------------

// `Place` knows how to read and write one element.
template <typename T, typename Place>
class Ref {
 public:
  explicit SIMT_INLINE Ref(Place place) : place_(place) {}
  SIMT_INLINE Ref(const Ref&) = default;
  SIMT_INLINE operator T() const { return place_.template read<T>(); }
  SIMT_INLINE T operator=(const T& v) const {
    place_.write(v);
    return v;
  }
  SIMT_INLINE T operator=(const Ref& other) const { return *this = static_cast<T>(other); }
#define SIMT_COMPOUND(op)                                      \
  template <typename U>                                        \
  SIMT_INLINE T operator op##=(const U& u) const {             \
    return *this = static_cast<T>(static_cast<T>(*this) op u); \
  }
  SIMT_COMPOUND(+)
  SIMT_COMPOUND(-)
  SIMT_COMPOUND(*)
  SIMT_COMPOUND(/)
  SIMT_COMPOUND(%)
  SIMT_COMPOUND(&)
  SIMT_COMPOUND(|)
  SIMT_COMPOUND(^)
  SIMT_COMPOUND(<<)
  SIMT_COMPOUND(>>)
#undef SIMT_COMPOUND
  SIMT_INLINE T operator++() const { return *this += 1; }
  SIMT_INLINE T operator--() const { return *this -= 1; }
  SIMT_INLINE T operator++(int) const {
    const T old = *this;
    *this = static_cast<T>(old + 1);
    return old;
  }
  SIMT_INLINE T operator--(int) const {
    const T old = *this;
    *this = static_cast<T>(old - 1);
    return old;
  }

 private:
  Place place_;
};

struct GlobalPlace {
  void* p;
  Range* range;
  template <typename T>
  SIMT_INLINE T read() const {
    return GlobalAccess::read<T>(p, range);
  }
  template <typename T>
  SIMT_INLINE void write(const T& v) const {
    GlobalAccess::write<T>(p, range, v);
  }
};

struct SharedPlace {
  uint32_t at, begin;
  int32_t size;
  template <typename T>
  SIMT_INLINE void check(Access access) const {
    const int32_t relative = static_cast<int32_t>(at - begin);
    if (__builtin_expect(relative < 0 || relative > size - static_cast<int32_t>(sizeof(T)), 0)) {
      shared_out_of_bounds(access, relative, begin, size, sizeof(T));
    }
  }
  // 16 bytes, aligned.
  SIMT_INLINE void check_vector(Access access) const {
    check<__uint128_t>(access);
    if (at % 16 != 0) shared_misaligned(access, at, 16);
  }
  template <typename T>
  SIMT_INLINE T read() const {
    check<T>(Access::kRead);
    return SharedAccess::read<T>(at);
  }
  template <typename T>
  SIMT_INLINE void write(const T& v) const {
    check<T>(Access::kWrite);
    SharedAccess::write<T>(at, v);
  }
};

}  // namespace simt

// ---- views ------------------------------------------------------------------------------------------------------

template <typename T>
class gptr {
 public:
  using Value = std::remove_const_t<T>;
  using Element = std::conditional_t<std::is_const_v<T>, Value, simt::Ref<Value, simt::GlobalPlace>>;

  gptr() = default;
  SIMT_INLINE gptr(std::nullptr_t) {}
  SIMT_INLINE gptr(T* p, simt::Range* range) : p_(p), range_(range) {}
  template <typename U>
    requires(std::is_const_v<T> && std::is_same_v<U, Value>)
  SIMT_INLINE gptr(const gptr<U>& other) : p_(other.raw()), range_(other.range()) {}

  SIMT_INLINE Element operator[](simt::Offset auto i) const {
    T* q = p_ + static_cast<ptrdiff_t>(i);
    if constexpr (std::is_const_v<T>) {
      return simt::GlobalAccess::read<Value>(q, range_);
    } else {
      return Element(simt::GlobalPlace{q, range_});
    }
  }
  SIMT_INLINE Element operator*() const { return (*this)[0]; }

  SIMT_INLINE gptr operator+(simt::Offset auto i) const { return gptr(p_ + static_cast<ptrdiff_t>(i), range_); }
  SIMT_INLINE gptr operator-(simt::Offset auto i) const { return gptr(p_ - static_cast<ptrdiff_t>(i), range_); }
  SIMT_INLINE gptr& operator+=(simt::Offset auto i) {
    p_ += static_cast<ptrdiff_t>(i);
    return *this;
  }
  SIMT_INLINE gptr& operator-=(simt::Offset auto i) {
    p_ -= static_cast<ptrdiff_t>(i);
    return *this;
  }
  SIMT_INLINE gptr& operator++() { return *this += 1; }
  SIMT_INLINE gptr& operator--() { return *this -= 1; }
  SIMT_INLINE gptr operator++(int) {
    gptr old = *this;
    p_ += 1;
    return old;
  }
  template <typename U>
    requires std::is_same_v<std::remove_const_t<U>, Value>
  SIMT_INLINE ptrdiff_t operator-(const gptr<U>& other) const {
    return p_ - other.raw();
  }
  template <typename U>
    requires std::is_same_v<std::remove_const_t<U>, Value>
  SIMT_INLINE bool operator==(const gptr<U>& other) const {
    return p_ == other.raw();
  }
  template <typename U>
    requires std::is_same_v<std::remove_const_t<U>, Value>
  SIMT_INLINE bool operator<(const gptr<U>& other) const {
    return p_ < other.raw();
  }
  SIMT_INLINE bool operator==(std::nullptr_t) const { return p_ == nullptr; }
  explicit SIMT_INLINE operator bool() const { return p_ != nullptr; }

  // For the emulation alone.
  SIMT_INLINE T* raw() const { return p_; }
  SIMT_INLINE simt::Range* range() const { return range_; }

 private:
  T* p_ = nullptr;
  simt::Range* range_ = &simt::null_range;
};

template <typename T>
class smem {
 public:
  using Value = std::remove_const_t<T>;
  using Element = std::conditional_t<std::is_const_v<T>, Value, simt::Ref<Value, simt::SharedPlace>>;

  smem() = default;
  // [begin, begin + size) bytes of the CTA's shared memory, pointing at its byte `at`.
  SIMT_INLINE smem(uint32_t at, uint32_t begin, int32_t size) : at_(at), begin_(begin), size_(size) {}
  template <typename U>
    requires(std::is_const_v<T> && std::is_same_v<U, Value>)
  SIMT_INLINE smem(const smem<U>& other) : at_(other.at()), begin_(other.begin()), size_(other.size()) {}

  SIMT_INLINE Element operator[](simt::Offset auto i) const {
    const simt::SharedPlace place = (*this + i).place();
    if constexpr (std::is_const_v<T>) {
      return place.template read<Value>();
    } else {
      return Element(place);
    }
  }
  SIMT_INLINE Element operator*() const { return (*this)[0]; }

  SIMT_INLINE smem operator+(simt::Offset auto i) const {
    return smem(at_ + static_cast<uint32_t>(static_cast<ptrdiff_t>(i)) * static_cast<uint32_t>(sizeof(T)), begin_, size_);
  }
  SIMT_INLINE smem operator-(simt::Offset auto i) const {
    return smem(at_ - static_cast<uint32_t>(static_cast<ptrdiff_t>(i)) * static_cast<uint32_t>(sizeof(T)), begin_, size_);
  }
  SIMT_INLINE smem& operator+=(simt::Offset auto i) { return *this = *this + i; }
  SIMT_INLINE smem& operator-=(simt::Offset auto i) { return *this = *this - i; }
  SIMT_INLINE smem& operator++() { return *this += 1; }
  SIMT_INLINE smem& operator--() { return *this -= 1; }
  SIMT_INLINE bool operator==(const smem& other) const { return at_ == other.at_; }

  // For the emulation alone.
  SIMT_INLINE simt::SharedPlace place() const { return simt::SharedPlace{at_, begin_, size_}; }
  SIMT_INLINE uint32_t at() const { return at_; }
  SIMT_INLINE uint32_t begin() const { return begin_; }
  SIMT_INLINE int32_t size() const { return size_; }

 private:
  uint32_t at_ = 0, begin_ = 0;
  int32_t size_ = 0;
};

template <typename T, typename P>
SIMT_INLINE gptr<T> global(P* p) {
  T* q = reinterpret_cast<T*>(p);
  return gptr<T>(q, simt::find_range(q, alignof(T)));
}
template <typename T, typename P>
SIMT_INLINE gptr<T> global(const gptr<P>& p) {
  return global<T>(p.raw());
}

// The tag is one object per kernel instantiation, as the array is on a GPU.
#define RKSC_SHARED(T, name, count) \
  static char name##_site;          \
  smem<T> name = simt::make_static_shared<T>(&name##_site, #name, count)

namespace simt {
template <typename T>
SIMT_INLINE smem<T> make_static_shared(const void* site, const char* name, uint32_t count) {
  static_assert(alignof(T) <= 16);
  const uint32_t at = static_shared(site, name, count * static_cast<uint32_t>(sizeof(T)));
  return smem<T>(at, at, static_cast<int32_t>(count * sizeof(T)));
}
}  // namespace simt

// Its end is that of the launch's dynamic memory: where one region of it ends and the next begins only the kernel knows.
template <typename T>
SIMT_INLINE smem<T> dynamic_shared(uint32_t byte_offset) {
  if (byte_offset % alignof(T) != 0) simt::shared_misaligned(simt::Access::kRead, byte_offset, alignof(T));
  return smem<T>(byte_offset, byte_offset, static_cast<int32_t>(simt::cur.dynamic_bytes) - static_cast<int32_t>(byte_offset));
}

// ---- vectors ----------------------------------------------------------------------------------------------------

template <int N, typename T>
SIMT_INLINE vec<std::remove_const_t<T>, N> load_vec(const gptr<T>& p) {
  static_assert(N * sizeof(T) <= 16);
  if (__builtin_expect(reinterpret_cast<uintptr_t>(p.raw()) % (N * sizeof(T)) != 0, 0)) {
    simt::global_misaligned(simt::Access::kRead, p.raw(), N * sizeof(T));
  }
  return simt::GlobalAccess::read<vec<std::remove_const_t<T>, N>>(p.raw(), p.range());
}
template <int N, typename T>
SIMT_INLINE vec<std::remove_const_t<T>, N> load_vec(const smem<T>& p) {
  static_assert(N * sizeof(T) <= 16);
  if (__builtin_expect(p.at() % (N * sizeof(T)) != 0, 0)) simt::shared_misaligned(simt::Access::kRead, p.at(), N * sizeof(T));
  return p.place().template read<vec<std::remove_const_t<T>, N>>();
}
template <typename T, int N>
SIMT_INLINE void store_vec(const gptr<T>& p, const vec<T, N>& v) {
  static_assert(N * sizeof(T) <= 16);
  if (__builtin_expect(reinterpret_cast<uintptr_t>(p.raw()) % (N * sizeof(T)) != 0, 0)) {
    simt::global_misaligned(simt::Access::kWrite, p.raw(), N * sizeof(T));
  }
  simt::GlobalAccess::write<vec<T, N>>(p.raw(), p.range(), v);
}
template <typename T, int N>
SIMT_INLINE void store_vec(const smem<T>& p, const vec<T, N>& v) {
  static_assert(N * sizeof(T) <= 16);
  if (__builtin_expect(p.at() % (N * sizeof(T)) != 0, 0)) simt::shared_misaligned(simt::Access::kWrite, p.at(), N * sizeof(T));
  p.place().write(v);
}

// ---- atomics ----------------------------------------------------------------------------------------------------

namespace simt {
template <typename T, typename F>
SIMT_INLINE T atomic_update(const gptr<T>& p, F&& f) {
  static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);
  GlobalAccess::check_bounds<T>(Access::kAtomic, p.raw(), p.range());
  global_atomic(p.range(), p.raw());
  const T old = *p.raw();
  *p.raw() = f(old);
  return old;
}
template <typename T, typename F>
SIMT_INLINE T atomic_update(const smem<T>& p, F&& f) {
  static_assert(std::is_same_v<T, uint32_t> || std::is_same_v<T, uint64_t>);
  p.place().template check<T>(Access::kAtomic);
  shared_atomic(p.at(), sizeof(T));
  T old;
  __builtin_memcpy(&old, cur.shared + p.at(), sizeof(T));
  const T now = f(old);
  __builtin_memcpy(cur.shared + p.at(), &now, sizeof(T));
  return old;
}
}  // namespace simt

template <typename T>
SIMT_INLINE T atomic_add(const gptr<T>& p, std::type_identity_t<T> v) {
  return simt::atomic_update(p, [v](T old) { return old + v; });
}
template <typename T>
SIMT_INLINE T atomic_add(const smem<T>& p, std::type_identity_t<T> v) {
  return simt::atomic_update(p, [v](T old) { return old + v; });
}
template <typename T>
SIMT_INLINE T atomic_max(const gptr<T>& p, std::type_identity_t<T> v) {
  return simt::atomic_update(p, [v](T old) { return old > v ? old : v; });
}
template <typename T>
SIMT_INLINE T atomic_max(const smem<T>& p, std::type_identity_t<T> v) {
  return simt::atomic_update(p, [v](T old) { return old > v ? old : v; });
}
