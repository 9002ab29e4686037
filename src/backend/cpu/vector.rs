//! Vectors of f32 lanes, one implementation per instruction set, and the dispatch to them.
//!
//! A kernel is one generic body, a [`Kernel`], written against [`Vector`]; [`dispatch`] compiles it once per level inside a
//! function that has the level's instructions enabled. Everything between the two must be `#[inline(always)]`, and
//! closures are avoided, because neither outlined functions nor closures inherit the instructions.
//!
//! Which lane holds what, and the order of every sum, follow from `LANES` alone, so that a level's bits never depend on
//! the number of rows or threads.
#![allow(unsafe_code)]

use half::{bf16, f16};

use super::simd::SimdLevel;

#[cfg(x86_kernels)]
mod avx2;
#[cfg(x86_kernels)]
mod avx512;
mod portable;

/// Operations on `LANES` f32 lanes. Loads and stores use the first `LANES` elements of their slice.
/// A value of an implementing type is the proof that the machine has its instructions.
pub trait Vector: Copy {
    /// f32 lanes per vector: a power of two, at most 16.
    const LANES: usize;
    /// Queries whose attention accumulators fit the register file at 4 vectors each: 4, 2 or 1.
    const QUERIES: usize;
    /// Whether [`dot_bf16`](Self::dot_bf16) is an instruction.
    const PAIRS: bool;
    /// A vector. Its lanes are f32, or opaque 32-bit words where a method says so.
    type F: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// All lanes the word `x`.
    #[inline(always)]
    fn splat_word(self, x: u32) -> Self::F {
        self.splat(f32::from_bits(x))
    }
    /// Reads f32 lanes.
    fn load(self, src: &[f32]) -> Self::F;
    /// Writes f32 lanes.
    fn store(self, x: Self::F, dst: &mut [f32]);
    /// Reads words.
    #[inline(always)]
    fn load_words(self, src: &[u32]) -> Self::F {
        self.load(bytemuck::cast_slice(src))
    }
    /// Writes words.
    #[inline(always)]
    fn store_words(self, x: Self::F, dst: &mut [u32]) {
        self.store(x, bytemuck::cast_slice_mut(dst));
    }
    /// Reads and widens.
    fn load_bf16(self, src: &[bf16]) -> Self::F;
    /// Rounds and writes.
    fn store_bf16(self, x: Self::F, dst: &mut [bf16]);
    /// Reads and widens.
    fn load_f16(self, src: &[f16]) -> Self::F;
    /// Rounds and writes.
    fn store_f16(self, x: Self::F, dst: &mut [f16]);
    /// Rounds to bf16 and widens again.
    fn round_bf16(self, x: Self::F) -> Self::F;
    /// Rounds to f16 and widens again.
    fn round_f16(self, x: Self::F) -> Self::F;

    /// a + b
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// a - b
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// a * b
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// a / b
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// a * b + c, with one rounding where the level has it.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// The larger; either one when a lane is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; either one when a lane is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// |x|
    fn abs(self, x: Self::F) -> Self::F;
    /// `a` where `sign` is not below zero, else `b`.
    fn select_nonneg(self, sign: Self::F, a: Self::F, b: Self::F) -> Self::F;
    /// `x` in the first `n` lanes, `other` in the rest.
    fn keep_first(self, n: usize, x: Self::F, other: Self::F) -> Self::F;
    /// 2^x for x <= 0: relative error below 2^-22, exactly 0 below -126, NaN for NaN.
    fn exp2(self, x: Self::F) -> Self::F;
    /// Sum of the lanes, as a fixed tree of halves.
    fn reduce_add(self, x: Self::F) -> f32;
    /// Largest lane.
    fn reduce_max(self, x: Self::F) -> f32;

    /// `acc + a.lo * b.lo + a.hi * b.hi` over words that are pairs of bf16.
    fn dot_bf16(self, acc: Self::F, a: Self::F, b: Self::F) -> Self::F;
    /// Rounds 2 x `LANES` values in memory order to bf16 and writes them as `LANES` words of pairs.
    fn pack_bf16(self, a: Self::F, b: Self::F, dst: &mut [u32]);
    /// Words with their high half cleared.
    fn low_half(self, x: Self::F) -> Self::F;
    /// Words with their low half cleared.
    fn high_half(self, x: Self::F) -> Self::F;
    /// Words of pairs `(a[i], b[i])` for `2 * LANES` elements of two rows.
    #[inline(always)]
    fn zip_bf16(self, a: &[bf16], b: &[bf16], dst: &mut [u32]) {
        for ((d, a), b) in dst[..2 * Self::LANES].iter_mut().zip(a).zip(b) {
            *d = u32::from(a.to_bits()) | u32::from(b.to_bits()) << 16;
        }
    }
    /// Writes the `LANES` x `LANES` words at `src` (rows `src_stride` apart) transposed to `dst`.
    #[inline(always)]
    fn transpose(self, src: &[u32], src_stride: usize, dst: &mut [u32], dst_stride: usize) {
        for col in 0..Self::LANES {
            for row in 0..Self::LANES {
                dst[col * dst_stride + row] = src[row * src_stride + col];
            }
        }
    }
}

/// log2(e)
pub const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// Coefficients of (2^r - 1) / r on [-0.5, 0.5], highest power first (Cephes, exp2f).
const EXP2_POLY: [f32; 6] =
    [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1];

/// 2^r for r in [-0.5, 0.5].
#[inline(always)]
fn exp2_poly<V: Vector>(v: V, r: V::F) -> V::F {
    let mut p = v.splat(EXP2_POLY[0]);
    for c in &EXP2_POLY[1..] {
        p = v.fma(p, r, v.splat(*c));
    }
    v.fma(p, r, v.splat(1.0))
}

/// Coefficients of (tanh(x) / x - 1) / x^2 in x^2 on [0, 0.625], highest power first: a minimax fit of the relative error,
/// below 2^-27.
const TANH_POLY: [f32; 5] = [-5.704_934e-3, 2.063_904_2e-2, -5.373_97e-2, 1.333_144_2e-1, -3.333_328e-1];

/// tanh(x): relative error below 2^-21.5 for any x, exactly 1 or -1 from 44 on, NaN for NaN.
#[inline(always)]
pub fn tanh<V: Vector>(v: V, x: V::F) -> V::F {
    // (1 - e^-2|x|) / (1 + e^-2|x|), whose difference loses what a small x has.
    let (one, size) = (v.splat(1.0), v.abs(x));
    let t = v.exp2(v.mul(size, v.splat(-2.0 * LOG2_E)));
    let large = v.div(v.sub(one, t), v.add(one, t));
    let large = v.select_nonneg(x, large, v.sub(v.splat(0.0), large));
    let square = v.mul(x, x);
    let mut p = v.splat(TANH_POLY[0]);
    for c in &TANH_POLY[1..] {
        p = v.fma(p, square, v.splat(*c));
    }
    let small = v.fma(v.mul(x, square), p, x);
    v.select_nonneg(v.sub(size, v.splat(0.625)), large, small)
}

/// A generic kernel body. `run` must be `#[inline(always)]`.
pub trait Kernel {
    /// What it returns.
    type Out;
    /// Runs with the vectors of one level.
    fn run<V: Vector>(self, v: V) -> Self::Out;
}

/// Runs `kernel` with the vectors of `level`, or of the highest level below it that this machine has.
#[inline]
pub fn dispatch<K: Kernel>(level: SimdLevel, kernel: K) -> K::Out {
    #[cfg(x86_kernels)]
    {
        if level >= SimdLevel::Avx512 && has_avx512() {
            // SAFETY: the machine has the instructions, checked just above.
            return unsafe { avx512::run(kernel) };
        }
        if level >= SimdLevel::Avx2 && has_avx2() {
            // SAFETY: the machine has the instructions, checked just above.
            return unsafe { avx2::run(kernel) };
        }
    }
    let _ = level;
    kernel.run(portable::Portable)
}

/// AVX2 with FMA and F16C.
#[cfg(x86_kernels)]
pub(crate) fn has_avx2() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has!("avx2") && has!("fma") && has!("f16c")
}

/// AVX-512 F, BW, VL, DQ and BF16.
#[cfg(x86_kernels)]
pub(crate) fn has_avx512() -> bool {
    use std::arch::is_x86_feature_detected as has;
    has_avx2() && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") && has!("avx512bf16")
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sweep;
    impl Kernel for Sweep {
        type Out = ();
        #[inline(always)]
        fn run<V: Vector>(self, v: V) {
            let mut buf = [0f32; 16];
            for i in 0..200_000 {
                let x = -(i as f32) * 0.000_7;
                v.store(v.exp2(v.splat(x)), &mut buf);
                let want = if x < -126.0 { 0.0 } else { f64::from(x).exp2() };
                let got = f64::from(buf[0]);
                assert!((got - want).abs() <= want * 2.4e-7, "2^{x}: got {got:e}, want {want:e}");
            }
            for (x, want) in [(0.0, 1.0), (-1.0, 0.5), (f32::NEG_INFINITY, 0.0), (-126.0, f32::MIN_POSITIVE)] {
                v.store(v.exp2(v.splat(x)), &mut buf);
                assert_eq!(buf[V::LANES - 1], want);
            }
            v.store(v.exp2(v.splat(f32::NAN)), &mut buf);
            assert!(buf[0].is_nan());

            for i in -200_000..200_000 {
                let x = i as f32 * 0.000_23 * (i % 7) as f32;
                v.store(tanh(v, v.splat(x)), &mut buf);
                let want = f64::from(x).tanh();
                assert!((f64::from(buf[0]) - want).abs() <= want.abs() * 3.4e-7, "tanh {x}: {:e}, {want:e}", buf[0]);
            }
            for (x, want) in [(0.0f32, 0.0f32), (1e-30, 1e-30), (44.0, 1.0), (f32::NEG_INFINITY, -1.0)] {
                v.store(tanh(v, v.splat(x)), &mut buf);
                assert_eq!(buf[V::LANES - 1].to_bits(), want.to_bits(), "tanh {x}");
            }
            v.store(tanh(v, v.splat(f32::NAN)), &mut buf);
            assert!(buf[0].is_nan());

            let ramp: Vec<f32> = (0..32).map(|i| i as f32 - 4.0).collect();
            let x = v.load(&ramp);
            let n = V::LANES as f32;
            assert_eq!(v.reduce_add(x), n * (n - 1.0) / 2.0 - 4.0 * n);
            assert_eq!(v.reduce_max(x), n - 5.0);
            v.store(v.keep_first(3, x, v.splat(9.0)), &mut buf);
            assert_eq!(buf[..4], [-4.0, -3.0, -2.0, 9.0]);
            v.store(v.select_nonneg(x, v.splat(1.0), v.splat(2.0)), &mut buf);
            assert_eq!(buf[3..6], [2.0, 1.0, 1.0]);

            let a: Vec<bf16> = (0..32).map(|i| bf16::from_f32(i as f32)).collect();
            let b: Vec<bf16> = (0..32).map(|i| bf16::from_f32(100.0 + i as f32)).collect();
            let mut words = [0u32; 32];
            v.zip_bf16(&a, &b, &mut words);
            for i in 0..2 * V::LANES {
                assert_eq!(words[i], u32::from(a[i].to_bits()) | u32::from(b[i].to_bits()) << 16);
            }
            v.pack_bf16(v.load(&ramp), v.load(&ramp[V::LANES..]), &mut words);
            for (word, expected) in bytemuck::cast_slice::<u32, bf16>(&words).iter().zip(&ramp).take(2 * V::LANES) {
                assert_eq!(word.to_f32(), *expected);
            }
            let mut dot = [0f32; 16];
            v.store(v.dot_bf16(v.splat(1.0), v.load_words(&words), v.load_words(&words)), &mut dot);
            assert_eq!(dot[1], 1.0 + 4.0 + 1.0);
            let halves = v.load_words(&[0x3f80_4000; 16]);
            v.store_words(v.low_half(halves), &mut words);
            assert_eq!(words[V::LANES - 1], 0x4000);
            v.store_words(v.high_half(halves), &mut words);
            assert_eq!(words[V::LANES - 1], 0x3f80_0000);
            let src: Vec<u32> = (0..16 * 20).collect();
            let mut dst = vec![0u32; 16 * 64];
            v.transpose(&src, 20, &mut dst, 64);
            for r in 0..V::LANES {
                for c in 0..V::LANES {
                    assert_eq!(dst[c * 64 + r], src[r * 20 + c]);
                }
            }
            for bits in (0..=u32::MAX).step_by(65_521) {
                let x = f32::from_bits(bits);
                let (mut h, mut b) = ([f16::ZERO; 16], [bf16::ZERO; 16]);
                v.store_bf16(v.splat(x), &mut b);
                v.store_f16(v.splat(x), &mut h);
                if x.is_nan() {
                    assert!(b[0].is_nan() && h[0].is_nan());
                } else {
                    assert_eq!(b[0].to_bits(), bf16::from_f32(x).to_bits(), "{x:e}");
                    assert_eq!(h[0].to_bits(), f16::from_f32(x).to_bits(), "{x:e}");
                    v.store(v.load_bf16(&b), &mut buf);
                    assert_eq!(buf[1], b[1].to_f32());
                    v.store(v.round_bf16(v.splat(x)), &mut buf);
                    assert_eq!(buf[1], b[1].to_f32());
                    v.store(v.round_f16(v.splat(x)), &mut buf);
                    assert_eq!(buf[1], h[1].to_f32());
                }
            }
        }
    }

    #[test]
    fn every_level_agrees_with_scalar_code() {
        for level in SimdLevel::available() {
            dispatch(level, Sweep);
        }
    }
}
