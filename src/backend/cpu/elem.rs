//! The element types of activations and the KV cache, with the one rounding to them.

use half::{bf16, f16};

use super::vector::Vector;
use crate::dtype::DType;

/// A compute type. Rounding is to nearest, ties to even; NaN stays NaN.
pub trait Elem: bytemuck::Pod + Send + Sync + PartialEq + std::fmt::Debug + 'static {
    /// Its name.
    const DTYPE: DType;
    /// Exact.
    fn widen(self) -> f32;
    /// Rounds once.
    fn narrow(x: f32) -> Self;
    /// The first lanes of `src`, widened.
    fn load<V: Vector>(v: V, src: &[Self]) -> V::F;
    /// Rounds the lanes of `x` into the start of `dst`.
    fn store<V: Vector>(v: V, x: V::F, dst: &mut [Self]);
    /// The lanes of `x` rounded to this type and widened again.
    fn round<V: Vector>(v: V, x: V::F) -> V::F;
}

impl Elem for f32 {
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn load<V: Vector>(v: V, src: &[Self]) -> V::F {
        v.load(src)
    }
    #[inline(always)]
    fn store<V: Vector>(v: V, x: V::F, dst: &mut [Self]) {
        v.store(x, dst);
    }
    #[inline(always)]
    fn round<V: Vector>(_v: V, x: V::F) -> V::F {
        x
    }
}

impl Elem for bf16 {
    const DTYPE: DType = DType::Bf16;
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        bf16::from_f32(x)
    }
    #[inline(always)]
    fn load<V: Vector>(v: V, src: &[Self]) -> V::F {
        v.load_bf16(src)
    }
    #[inline(always)]
    fn store<V: Vector>(v: V, x: V::F, dst: &mut [Self]) {
        v.store_bf16(x, dst);
    }
    #[inline(always)]
    fn round<V: Vector>(v: V, x: V::F) -> V::F {
        v.round_bf16(x)
    }
}

impl Elem for f16 {
    const DTYPE: DType = DType::F16;
    #[inline(always)]
    fn widen(self) -> f32 {
        self.to_f32()
    }
    #[inline(always)]
    fn narrow(x: f32) -> Self {
        f16::from_f32(x)
    }
    #[inline(always)]
    fn load<V: Vector>(v: V, src: &[Self]) -> V::F {
        v.load_f16(src)
    }
    #[inline(always)]
    fn store<V: Vector>(v: V, x: V::F, dst: &mut [Self]) {
        v.store_f16(x, dst);
    }
    #[inline(always)]
    fn round<V: Vector>(v: V, x: V::F) -> V::F {
        v.round_f16(x)
    }
}

/// As [`Elem::load`], for a row's last, shorter chunk: the missing lanes are zero.
#[inline(always)]
pub fn load_part<T: Elem, V: Vector>(v: V, src: &[T]) -> V::F {
    let mut buf = [T::zeroed(); MAX_LANES];
    let n = src.len().min(V::LANES);
    buf[..n].copy_from_slice(&src[..n]);
    T::load(v, &buf)
}

/// As [`Elem::store`], for a row's last, shorter chunk: only `dst.len()` lanes are written.
#[inline(always)]
pub fn store_part<T: Elem, V: Vector>(v: V, x: V::F, dst: &mut [T]) {
    let mut buf = [T::zeroed(); MAX_LANES];
    T::store(v, x, &mut buf);
    let n = dst.len().min(V::LANES);
    dst[..n].copy_from_slice(&buf[..n]);
}

/// [`Elem::load`] of a whole chunk, [`load_part`] of a shorter one.
#[inline(always)]
pub fn load_some<T: Elem, V: Vector>(v: V, src: &[T]) -> V::F {
    if src.len() == V::LANES { T::load(v, src) } else { load_part(v, src) }
}

/// [`Elem::store`] of a whole chunk, [`store_part`] of a shorter one.
#[inline(always)]
pub fn store_some<T: Elem, V: Vector>(v: V, x: V::F, dst: &mut [T]) {
    if dst.len() == V::LANES { T::store(v, x, dst) } else { store_part(v, x, dst) }
}

/// Rounds a row.
#[inline(always)]
pub fn narrow_row<T: Elem, V: Vector>(v: V, x: &[f32], y: &mut [T]) {
    let mut xs = x.chunks_exact(V::LANES);
    let mut ys = y.chunks_exact_mut(V::LANES);
    for (x, y) in xs.by_ref().zip(ys.by_ref()) {
        T::store(v, v.load(x), y);
    }
    let rest = ys.into_remainder();
    if !rest.is_empty() {
        store_part(v, load_part(v, xs.remainder()), rest);
    }
}

/// Lanes of the widest level.
pub const MAX_LANES: usize = 16;
