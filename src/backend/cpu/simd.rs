//! Which instruction sets the CPU kernels may use. A level is fixed per backend, because bits are promised per level.
#![allow(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// Instruction sets, each containing the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SimdLevel {
    /// Plain Rust.
    Portable,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and BF16 (Zen 4, Cooper Lake, Sapphire Rapids and later).
    Avx512,
    /// The above and AMX tiles with bf16 (Sapphire Rapids and later).
    Amx,
}

impl SimdLevel {
    /// Every level, lowest first.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Amx];

    /// The levels this process may use, lowest first.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|level| level.is_available()).collect()
    }

    /// The highest level that this process may use.
    pub fn detect() -> Self {
        Self::ALL.into_iter().rev().find(|level| level.is_available()).unwrap_or(Self::Portable)
    }

    /// Whether the CPU has it and the system allows it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(x86_kernels)]
            Self::Avx2 => x86::has_avx2(),
            #[cfg(x86_kernels)]
            Self::Avx512 => x86::has_avx2() && x86::has_avx512(),
            #[cfg(x86_kernels)]
            Self::Amx => x86::has_avx2() && x86::has_avx512() && x86::amx_permitted(),
            #[cfg(not(x86_kernels))]
            _ => false,
        }
    }

    /// Itself, or an error that says what to use instead.
    pub fn check_available(self) -> Result<Self> {
        if self.is_available() {
            return Ok(self);
        }
        Err(Error::config("simd", format!("this machine cannot run {self}; use auto, or {} or lower", Self::detect())))
    }
}

impl fmt::Display for SimdLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        })
    }
}

impl FromStr for SimdLevel {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self> {
        match s {
            "auto" => Ok(Self::detect()),
            "portable" => Ok(Self::Portable),
            "avx2" => Self::Avx2.check_available(),
            "avx512" => Self::Avx512.check_available(),
            "amx" => Self::Amx.check_available(),
            other => {
                Err(Error::config("simd", format!("{other:?} is unknown; use auto, amx, avx512, avx2 or portable")))
            }
        }
    }
}

#[cfg(x86_kernels)]
mod x86 {
    use std::arch::is_x86_feature_detected as has;

    pub(super) fn has_avx2() -> bool {
        has!("avx2") && has!("fma") && has!("f16c")
    }

    pub(super) fn has_avx512() -> bool {
        has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512dq") && has!("avx512bf16")
    }

    /// Linux saves the 8 KiB of tile state only for processes that asked for it. The answer belongs to the process, so
    /// it is kept in the one static of this backend.
    #[cfg(target_os = "linux")]
    pub(super) fn amx_permitted() -> bool {
        use std::arch::x86_64::{__cpuid, __cpuid_count};
        use std::sync::OnceLock;

        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        const SYS_ARCH_PRCTL: isize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XFEATURE_XTILE_DATA: usize = 18;
        static PERMITTED: OnceLock<bool> = OnceLock::new();

        *PERMITTED.get_or_init(|| {
            if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) != AMX_BF16 | AMX_TILE {
                return false;
            }
            let status: isize;
            // SAFETY: this system call takes two numbers and touches no memory of ours; the kernel clobbers rcx and r11.
            unsafe {
                std::arch::asm!(
                    "syscall",
                    inlateout("rax") SYS_ARCH_PRCTL => status,
                    in("rdi") ARCH_REQ_XCOMP_PERM,
                    in("rsi") XFEATURE_XTILE_DATA,
                    lateout("rcx") _,
                    lateout("r11") _,
                    options(nostack),
                );
            }
            status == 0
        })
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn amx_permitted() -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_and_unknown_ones_are_explained() {
        for level in SimdLevel::ALL {
            match level.to_string().parse::<SimdLevel>() {
                Ok(parsed) => assert_eq!(parsed, level),
                Err(e) => {
                    assert!(!level.is_available());
                    assert!(e.to_string().contains("use auto"), "{e}");
                }
            }
        }
        assert_eq!("auto".parse::<SimdLevel>().unwrap(), SimdLevel::detect());
        assert!("sse9".parse::<SimdLevel>().unwrap_err().to_string().contains("sse9"));
    }
}
