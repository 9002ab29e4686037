//! Plain Rust lanes; the compiler vectorises them with whatever the target has.

use half::{bf16, f16};

use super::{Vector, exp2_poly};

/// Eight lanes.
#[derive(Clone, Copy)]
pub(super) struct Portable;

const N: usize = 8;

#[inline(always)]
fn map(f: impl Fn(usize) -> f32) -> [f32; N] {
    let mut out = [0.0; N];
    for (i, o) in out.iter_mut().enumerate() {
        *o = f(i);
    }
    out
}

#[inline(always)]
fn round_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    (if x.is_nan() { bits | 0x40_0000 } else { rounded }) & 0xffff_0000
}

impl Vector for Portable {
    const LANES: usize = N;
    const QUERIES: usize = 1;
    const PAIRS: bool = false;
    type F = [f32; N];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; N]
    }
    #[inline(always)]
    fn load(self, src: &[f32]) -> Self::F {
        let src = &src[..N];
        map(|i| src[i])
    }
    #[inline(always)]
    fn store(self, x: Self::F, dst: &mut [f32]) {
        dst[..N].copy_from_slice(&x);
    }
    #[inline(always)]
    fn load_bf16(self, src: &[bf16]) -> Self::F {
        let src = &src[..N];
        map(|i| f32::from_bits(u32::from(src[i].to_bits()) << 16))
    }
    #[inline(always)]
    fn store_bf16(self, x: Self::F, dst: &mut [bf16]) {
        for (d, x) in dst[..N].iter_mut().zip(x) {
            *d = bf16::from_bits((round_bits(x) >> 16) as u16);
        }
    }
    #[inline(always)]
    fn load_f16(self, src: &[f16]) -> Self::F {
        let src = &src[..N];
        map(|i| src[i].to_f32())
    }
    #[inline(always)]
    fn store_f16(self, x: Self::F, dst: &mut [f16]) {
        for (d, x) in dst[..N].iter_mut().zip(x) {
            *d = f16::from_f32(x);
        }
    }
    #[inline(always)]
    fn round_bf16(self, x: Self::F) -> Self::F {
        map(|i| f32::from_bits(round_bits(x[i])))
    }
    #[inline(always)]
    fn round_f16(self, x: Self::F) -> Self::F {
        map(|i| f16::from_f32(x[i]).to_f32())
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        map(|i| a[i] + b[i])
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        map(|i| a[i] - b[i])
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        map(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        map(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // Without the instruction `mul_add` is a library call.
        if cfg!(any(target_feature = "fma", target_arch = "aarch64")) {
            map(|i| a[i].mul_add(b[i], c[i]))
        } else {
            map(|i| a[i] * b[i] + c[i])
        }
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        map(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        map(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn abs(self, x: Self::F) -> Self::F {
        map(|i| x[i].abs())
    }
    #[inline(always)]
    fn select_nonneg(self, sign: Self::F, a: Self::F, b: Self::F) -> Self::F {
        map(|i| if sign[i] >= 0.0 { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn keep_first(self, n: usize, x: Self::F, other: Self::F) -> Self::F {
        map(|i| if i < n { x[i] } else { other[i] })
    }
    #[inline(always)]
    fn exp2(self, x: Self::F) -> Self::F {
        // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
        const MAGIC: f32 = 12_582_912.0;
        let shifted = map(|i| x[i] + MAGIC);
        let r = map(|i| x[i] - (shifted[i] - MAGIC));
        let p = exp2_poly(self, r);
        map(|i| {
            let scale = f32::from_bits(shifted[i].to_bits().wrapping_add(127) << 23);
            if x[i] < -126.0 { 0.0 } else { p[i] * scale }
        })
    }
    #[inline(always)]
    fn reduce_add(self, x: Self::F) -> f32 {
        let h = [x[0] + x[4], x[1] + x[5], x[2] + x[6], x[3] + x[7]];
        (h[0] + h[2]) + (h[1] + h[3])
    }
    #[inline(always)]
    fn reduce_max(self, x: Self::F) -> f32 {
        let mut m = x[0];
        for &x in &x[1..] {
            m = if m > x { m } else { x };
        }
        m
    }

    #[inline(always)]
    fn dot_bf16(self, acc: Self::F, a: Self::F, b: Self::F) -> Self::F {
        let lo = |x: f32| f32::from_bits(x.to_bits() << 16);
        let hi = |x: f32| f32::from_bits(x.to_bits() & 0xffff_0000);
        map(|i| acc[i] + lo(a[i]) * lo(b[i]) + hi(a[i]) * hi(b[i]))
    }
    #[inline(always)]
    fn pack_bf16(self, a: Self::F, b: Self::F, dst: &mut [u32]) {
        for i in 0..N / 2 {
            dst[i] = round_bits(a[2 * i]) >> 16 | round_bits(a[2 * i + 1]);
            dst[N / 2 + i] = round_bits(b[2 * i]) >> 16 | round_bits(b[2 * i + 1]);
        }
    }
    #[inline(always)]
    fn low_half(self, x: Self::F) -> Self::F {
        map(|i| f32::from_bits(x[i].to_bits() & 0xffff))
    }
    #[inline(always)]
    fn high_half(self, x: Self::F) -> Self::F {
        map(|i| f32::from_bits(x[i].to_bits() & 0xffff_0000))
    }
}
