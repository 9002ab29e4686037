//! Build script: says whether the x86 kernels are part of this build.
//!
//! `RKSC_PORTABLE_ONLY=1` leaves them out on x86 too. What compiles then is what any other architecture compiles.

fn main() {
    println!("cargo::rerun-if-env-changed=RKSC_PORTABLE_ONLY");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(x86_kernels)");
    let is_x86 = std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "x86_64");
    if is_x86 && std::env::var_os("RKSC_PORTABLE_ONLY").is_none() {
        println!("cargo::rustc-cfg=x86_kernels");
    }
}
