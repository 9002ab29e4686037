//! From words of codes to registers of numbers, in the type of x; and scales.
#![allow(unsafe_code)]

use std::arch::x86_64::*;

use half::{bf16, f16};

/// One type of x: how nibbles become its numbers, and how these are multiplied.
pub(super) trait Lanes {
    type X: Copy;
    /// Look-ups that a block takes, one nibble of every lane each.
    const LOOK_UPS: usize;
    /// Numbers of a register.
    const LANES: usize;

    /// `f` of the 16 nibbles.
    ///
    /// # Safety
    /// AVX-512 with BW is there.
    unsafe fn table(f: impl Fn(i32) -> f32) -> __m512i;
    /// Nibble i of every lane, looked up.
    ///
    /// # Safety
    /// As [`table`](Self::table).
    unsafe fn look_up(words: __m512i, i: usize, table: __m512i) -> __m512i;
    /// Byte i of every lane, an E4M3 number; `small` are the first 8 codes' numbers, repeated.
    ///
    /// # Safety
    /// As [`table`](Self::table).
    unsafe fn widen_e4m3(words: __m512i, i: usize, small: __m512i) -> __m512i;
    /// # Safety
    /// `LANES` numbers can be read at `x`.
    unsafe fn load(x: *const Self::X) -> __m512i;
    /// # Safety
    /// AVX-512 with bf16 is there.
    unsafe fn mul_add(x: __m512i, w: __m512i, acc: __m512) -> __m512;
}

pub(super) struct LanesBf16;

impl Lanes for LanesBf16 {
    type X = bf16;
    const LOOK_UPS: usize = 4;
    const LANES: usize = 32;

    #[inline(always)]
    unsafe fn table(f: impl Fn(i32) -> f32) -> __m512i {
        let table: [bf16; 32] = std::array::from_fn(|i| bf16::from_f32(f(i as i32 % 16)));
        // SAFETY: the array is as large as the register.
        unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
    }
    #[inline(always)]
    unsafe fn look_up(words: __m512i, i: usize, table: __m512i) -> __m512i {
        // SAFETY: as the trait demands.
        unsafe { _mm512_permutexvar_epi16(_mm512_srl_epi16(words, _mm_cvtsi32_si128(4 * i as i32)), table) }
    }
    #[inline(always)]
    unsafe fn widen_e4m3(words: __m512i, i: usize, small: __m512i) -> __m512i {
        // SAFETY: as the trait demands.
        unsafe {
            let top = _mm512_sll_epi16(words, _mm_cvtsi32_si128(8 - 8 * i as i32));
            let rest = _mm512_and_si512(_mm512_srli_epi16::<4>(top), _mm512_set1_epi16(0x07f0));
            // 120 more in the exponent: biases of 127 and 7.
            let normal = _mm512_add_epi16(rest, _mm512_set1_epi16(120 << 7));
            let is_small = _mm512_cmplt_epu16_mask(rest, _mm512_set1_epi16(1 << 7));
            let size = _mm512_mask_permutexvar_epi16(normal, is_small, _mm512_srli_epi16::<8>(top), small);
            // The sign of `top`, the rest of `size`.
            _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi16(i16::MIN), top, size)
        }
    }
    #[inline(always)]
    unsafe fn load(x: *const bf16) -> __m512i {
        // SAFETY: as the trait demands.
        unsafe { _mm512_loadu_si512(x.cast()) }
    }
    #[inline(always)]
    unsafe fn mul_add(x: __m512i, w: __m512i, acc: __m512) -> __m512 {
        // SAFETY: as the trait demands; both types are 64 plain bytes.
        unsafe {
            let (x, w) = (std::mem::transmute::<__m512i, __m512bh>(x), std::mem::transmute::<__m512i, __m512bh>(w));
            _mm512_dpbf16_ps(acc, x, w)
        }
    }
}

pub(super) struct LanesF32;

impl Lanes for LanesF32 {
    type X = f32;
    const LOOK_UPS: usize = 8;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn table(f: impl Fn(i32) -> f32) -> __m512i {
        let table: [f32; 16] = std::array::from_fn(|i| f(i as i32));
        // SAFETY: the array is as large as the register.
        unsafe { _mm512_loadu_si512(table.as_ptr().cast()) }
    }
    #[inline(always)]
    unsafe fn look_up(words: __m512i, i: usize, table: __m512i) -> __m512i {
        // SAFETY: as the trait demands.
        unsafe { _mm512_permutexvar_epi32(_mm512_srl_epi32(words, _mm_cvtsi32_si128(4 * i as i32)), table) }
    }
    #[inline(always)]
    unsafe fn widen_e4m3(words: __m512i, i: usize, small: __m512i) -> __m512i {
        // SAFETY: as the trait demands.
        unsafe {
            let top = _mm512_sll_epi32(words, _mm_cvtsi32_si128(24 - 8 * i as i32));
            let rest = _mm512_and_si512(_mm512_srli_epi32::<4>(top), _mm512_set1_epi32(0x07f0_0000));
            let normal = _mm512_add_epi32(rest, _mm512_set1_epi32(120 << 23));
            let is_small = _mm512_cmplt_epu32_mask(rest, _mm512_set1_epi32(1 << 23));
            let size = _mm512_mask_permutexvar_epi32(normal, is_small, _mm512_srli_epi32::<24>(top), small);
            _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi32(i32::MIN), top, size)
        }
    }
    #[inline(always)]
    unsafe fn load(x: *const f32) -> __m512i {
        // SAFETY: as the trait demands.
        unsafe { _mm512_loadu_si512(x.cast()) }
    }
    #[inline(always)]
    unsafe fn mul_add(x: __m512i, w: __m512i, acc: __m512) -> __m512 {
        // SAFETY: as the trait demands.
        unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), acc) }
    }
}

/// How the words of a block become numbers, a register at a time.
pub(super) trait Decode<L: Lanes>: Copy {
    /// Registers of numbers that a block gives.
    const STEPS: usize;
    /// As many of them in turn are multiplied by one register of x.
    const PER_X: usize;

    /// Register `step`.
    ///
    /// # Safety
    /// AVX-512 with BW is there.
    unsafe fn decode(self, words: __m512i, step: usize) -> __m512i;
}

/// Tables of a code's nibbles, from the lowest; what these say is in sum the code less its middle.
#[derive(Clone, Copy)]
pub(super) struct Nibbles<const T: usize>(pub(super) [__m512i; T]);

impl<L: Lanes, const T: usize> Decode<L> for Nibbles<T> {
    const STEPS: usize = L::LOOK_UPS;
    const PER_X: usize = T;

    #[inline(always)]
    unsafe fn decode(self, words: __m512i, step: usize) -> __m512i {
        // SAFETY: handed on to the caller.
        unsafe { L::look_up(words, step, self.0[step % T]) }
    }
}

/// The numbers of the first 8 codes, repeated.
#[derive(Clone, Copy)]
pub(super) struct E4m3(pub(super) __m512i);

impl<L: Lanes> Decode<L> for E4m3 {
    const STEPS: usize = L::LOOK_UPS / 2;
    const PER_X: usize = 1;

    #[inline(always)]
    unsafe fn decode(self, words: __m512i, step: usize) -> __m512i {
        // SAFETY: handed on to the caller.
        unsafe { L::widen_e4m3(words, step, self.0) }
    }
}

/// A type of scales.
pub(super) trait Scale: Copy {
    /// 16 scales, zeros where the mask is not.
    ///
    /// # Safety
    /// AVX-512 with BW and VL is there; those in the mask can be read at `p`.
    unsafe fn load(p: *const Self, mask: __mmask16) -> __m512;
}

impl Scale for f16 {
    #[inline(always)]
    unsafe fn load(p: *const f16, mask: __mmask16) -> __m512 {
        // SAFETY: as the trait demands.
        unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p.cast())) }
    }
}

impl Scale for f32 {
    #[inline(always)]
    unsafe fn load(p: *const f32, mask: __mmask16) -> __m512 {
        // SAFETY: as the trait demands.
        unsafe { _mm512_maskz_loadu_ps(mask, p) }
    }
}
