//! The instruction sets the kernels are built for.

/// What a kernel may use; ordered by preference. Each level has its own bits, the same on every run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SimdLevel {
    /// Plain Rust, any architecture.
    Portable,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and BF16.
    Avx512,
    /// The same plus AMX tiles.
    Amx,
}

impl SimdLevel {
    /// The levels this machine can run, lowest first.
    pub fn available() -> Vec<Self> {
        #[allow(unused_mut)]
        let mut levels = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        {
            if super::vector::has_avx2() {
                levels.push(Self::Avx2);
            }
            if super::vector::has_avx512() {
                levels.extend([Self::Avx512, Self::Amx]);
            }
        }
        levels
    }

    /// The best level this machine can run.
    pub fn detect() -> Self {
        Self::available().into_iter().max().unwrap_or(Self::Portable)
    }
}
