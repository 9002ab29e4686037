//! Build script: which kernels are part of this build, and the objects they are made of.
//!
//! - x86 kernels of the CPU backend: on x86-64, unless `RKSC_PORTABLE_ONLY` is set. What compiles then is what any other
//!   architecture compiles.
//! - `emulated-kernels`: cuda/*.cu and cuda/host as C++20 for the host, always at -O2.
//! - `cuda`: cuda/*.cu through nvcc. `RKSC_CUDA_ARCH` narrows the architectures, `RKSC_SKIP_NVCC` leaves the objects out.
//! - `regen-bindings`: src/backend/cuda/bindings.rs from include/rksc_kernels.h.
//!
//! An object is compiled again when its source, any header or the flags changed: editing one kernel costs one object.
//! clippy links nothing and gets no objects.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::exit;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What a fat build holds. Within a major version a GPU runs code of a lower minor; `a` marks code for that GPU alone.
const DEFAULT_ARCHITECTURES: &str = "80,86,89,90a,100,120";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=RKSC_PORTABLE_ONLY");
    println!("cargo::rustc-check-cfg=cfg(x86_kernels)");
    if target("ARCH") == "x86_64" && env::var_os("RKSC_PORTABLE_ONLY").is_none() {
        println!("cargo::rustc-cfg=x86_kernels");
    }
    if !(feature("emulated-kernels") || feature("cuda") || feature("regen-bindings")) {
        return;
    }
    println!("cargo::rerun-if-changed=cuda");
    println!("cargo::rerun-if-changed=include");
    #[cfg(feature = "regen-bindings")]
    bindings::write();
    // clippy links nothing, and does not share objects with the builds that do.
    println!("cargo::rerun-if-env-changed=CLIPPY_ARGS");
    println!("cargo::rerun-if-env-changed=RKSC_SKIP_NVCC");
    if env::var_os("CLIPPY_ARGS").is_some() {
        return;
    }
    if feature("emulated-kernels") {
        emulated();
    }
    if feature("cuda") && env::var_os("RKSC_SKIP_NVCC").is_none() {
        nvcc::kernels();
    }
}

fn feature(name: &str) -> bool {
    env::var_os(format!("CARGO_FEATURE_{}", name.to_uppercase().replace('-', "_"))).is_some()
}

fn target(what: &str) -> String {
    env::var(format!("CARGO_CFG_TARGET_{what}")).unwrap_or_default()
}

/// Ends the build with one line.
fn fail(why: &str) -> ! {
    println!("cargo::error={why}");
    exit(1)
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|e| fail(&format!("{}: {e}", path.display())))
}

/// Files of `dir` with one of `extensions`, sorted.
fn files(dir: &str, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x)))
        .collect();
    found.sort();
    found
}

/// The kernels for the host.
fn emulated() {
    let mut sources = files("cuda", &["cu"]);
    sources.extend(files("cuda/host", &["cpp", "cu"]));
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .debug(false)
        .warnings(true)
        .extra_warnings(true)
        .define("RKSC_EMULATED", None)
        // The same bits on every machine: no multiply and add joined unless the kernel says fmaf.
        .flag("-ffp-contract=off")
        .flag("-Wno-unknown-pragmas") // #pragma unroll
        .flag("-g1") // lines for fault reports
        .flag("-x")
        .flag("c++");
    objects(&build, &sources, "rksc_emulated", &format!("emulated {:?}", env::var_os("CXXFLAGS")));
}

/// Compiles what changed and archives everything into `lib<name>.a`, linked from here on.
fn objects(build: &cc::Build, sources: &[PathBuf], name: &str, flags: &str) {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join(name);
    let mut shared = DefaultHasher::new();
    flags.hash(&mut shared);
    build.get_compiler().path().hash(&mut shared);
    build.get_compiler().args().hash(&mut shared);
    for dir in ["cuda", "cuda/host", "include"] {
        for header in files(dir, &["cuh", "h"]) {
            read(&header).hash(&mut shared);
        }
    }
    let mut archive = cc::Build::new();
    archive.cpp(true);
    let mut stale = Vec::new();
    for source in sources {
        let mut key = shared.clone();
        read(source).hash(&mut key);
        let (stem, key) = (source.file_stem().unwrap_or_default().to_string_lossy(), key.finish().to_string());
        let stamp = out.join(format!("{stem}.stamp"));
        // The stamp holds the key and the path of the object.
        let known = fs::read_to_string(&stamp).unwrap_or_default();
        match known.split_once('\n') {
            Some((old, object)) if old == key && Path::new(object).exists() => {
                archive.object(object);
            }
            _ => stale.push((source, stamp, key)),
        }
    }
    // One file a compiler run: given several CUDA files at once, cc compiles them for the device linker.
    let compile = |(source, stamp, key): &(&PathBuf, PathBuf, String)| {
        let object = build.clone().out_dir(&out).file(source).compile_intermediates().remove(0);
        if let Err(e) = fs::write(stamp, format!("{key}\n{}", object.display())) {
            fail(&format!("{}: {e}", stamp.display()));
        }
        object
    };
    let next = AtomicUsize::new(0);
    let worker = || {
        let one = || stale.get(next.fetch_add(1, Ordering::Relaxed)).map(compile);
        std::iter::from_fn(one).collect::<Vec<_>>()
    };
    let num_workers = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1).min(stale.len());
    let mut objects: Vec<PathBuf> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..num_workers).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().flat_map(|w| w.join().unwrap_or_else(|_| fail("a compiler thread failed"))).collect()
    });
    objects.sort();
    archive.objects(objects);
    archive.compile(name);
}

/// The kernels for GPUs.
mod nvcc {
    use super::*;

    pub(super) fn kernels() {
        for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "PATH", "RKSC_CUDA_ARCH"] {
            println!("cargo::rerun-if-env-changed={name}");
        }
        let Some(compiler) = find() else {
            fail(
                "feature `cuda` needs nvcc 12.8 or newer, found neither through NVCC, CUDA_HOME or CUDA_PATH nor on PATH: install a CUDA toolkit, \
                 or `pip install nvidia-cuda-nvcc==13.0.* nvidia-cuda-runtime==13.0.* nvidia-cuda-crt==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-cccl==13.0.*` \
                 and set CUDA_HOME to site-packages/nvidia/cu13; RKSC_SKIP_NVCC=1 is enough for check, clippy and doc; \
                 without the feature everything runs on the CPU",
            )
        };
        let architectures = env::var("RKSC_CUDA_ARCH").unwrap_or_else(|_| DEFAULT_ARCHITECTURES.into());
        tell_cc(&compiler);
        let mut build = cc::Build::new();
        build.cuda(true).cudart("none").opt_level(3).debug(false).warnings(false);
        // What cc sets itself goes to the host compiler; these are for nvcc.
        build.flag("-std=c++20").flag("-O3");
        for flag in architecture_flags(&architectures) {
            build.flag(flag);
        }
        objects(&build, &files("cuda", &["cu"]), "rksc_cuda", &architectures);
        // Static, so that the program starts where there is no driver.
        let root = compiler.canonicalize().unwrap_or(compiler);
        let root = root.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
        let triple = format!("targets/{}-linux/lib", if target("ARCH") == "aarch64" { "sbsa" } else { "x86_64" });
        let library = ["lib64", "lib", &triple].map(|dir| root.join(dir));
        let Some(library) = library.iter().find(|dir| dir.join("libcudart_static.a").exists()) else {
            fail(&format!(
                "libcudart_static.a is in neither lib64 nor lib of {} (PyPI: nvidia-cuda-runtime)",
                root.display()
            ))
        };
        println!("cargo::rustc-link-search=native={}", library.display());
        println!("cargo::rustc-link-lib=static=cudart_static");
        for name in ["dl", "rt", "pthread"] {
            println!("cargo::rustc-link-lib=dylib={name}");
        }
    }

    /// cc takes the path of nvcc from the environment alone.
    #[allow(unsafe_code)]
    fn tell_cc(compiler: &Path) {
        // SAFETY: the build script has one thread until cc starts compiling.
        unsafe { env::set_var("NVCC", compiler) };
    }

    fn find() -> Option<PathBuf> {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let executable = |path: &PathBuf| path.is_file();
        if let Some(path) = set("NVCC") {
            return Some(path).filter(executable);
        }
        let roots = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(set).map(|root| root.join("bin/nvcc"));
        let path = env::var_os("PATH").unwrap_or_default();
        roots.chain(env::split_paths(&path).map(|dir| dir.join("nvcc"))).find(executable)
    }

    /// Machine code for each architecture, and PTX of the newest that is not for one GPU alone, for GPUs to come.
    fn architecture_flags(list: &str) -> Vec<String> {
        let names: Vec<&str> = list.split([',', ';', ' ']).filter(|name| !name.is_empty()).collect();
        let number = |name: &str| name.trim_end_matches(|c: char| c.is_ascii_alphabetic()).parse::<u32>().ok();
        if names.is_empty() || names.iter().any(|name| number(name).is_none_or(|n| n < 80)) {
            fail(&format!("RKSC_CUDA_ARCH={list:?}: use numbers from 80 up with commas between, e.g. 80,90a"));
        }
        let newest =
            names.iter().filter(|name| name.ends_with(|c: char| c.is_ascii_digit())).max_by_key(|name| number(name));
        let code = names.iter().map(|name| format!("-gencode=arch=compute_{name},code=sm_{name}"));
        code.chain(newest.map(|name| format!("-gencode=arch=compute_{name},code=compute_{name}"))).collect()
    }
}

#[cfg(feature = "regen-bindings")]
mod bindings {
    use std::panic::AssertUnwindSafe;

    use super::*;

    const HEAD: &str = "//! Made by bindgen from include/rksc_kernels.h: `cargo check --features regen-bindings`. Not edited by hand.\n\n";

    /// What is copied to and from a device as it is; the params structs hold pointers and stay on the host.
    #[derive(Debug)]
    struct PlainData;

    impl bindgen::callbacks::ParseCallbacks for PlainData {
        fn add_derives(&self, info: &bindgen::callbacks::DeriveInfo<'_>) -> Vec<String> {
            if info.kind != bindgen::callbacks::TypeKind::Struct || info.name.ends_with("_params") {
                return Vec::new();
            }
            ["PartialEq", "::bytemuck::Zeroable", "::bytemuck::Pod"].map(String::from).to_vec()
        }
    }

    /// Writes the file in place: structs, constants and both sets of launchers.
    pub(super) fn write() {
        let common = || {
            bindgen::Builder::default()
                .use_core()
                .layout_tests(true)
                .merge_extern_blocks(true)
                .formatter(bindgen::Formatter::Rustfmt)
                .rustfmt_configuration_file(Some(fs::canonicalize("rustfmt.toml").unwrap_or_default()))
                .disable_header_comment()
        };
        let native = common()
            .header("include/rksc_kernels.h")
            .allowlist_file(".*/rksc_kernels.h")
            .default_enum_style(bindgen::EnumVariation::Consts)
            .prepend_enum_name(false)
            .derive_default(true)
            .parse_callbacks(Box::new(PlainData));
        let emulated = common()
            .header("include/rksc_kernels.h")
            .headers(
                files("cuda/host", &["h"]).iter().filter(|h| h.ends_with("control.h")).map(|h| h.display().to_string()),
            )
            .clang_arg("-DRKSC_EMULATED")
            .allowlist_function("rksc_emu_.*")
            .allowlist_recursively(false);
        // bindgen panics where there is no libclang.
        let text = |builder: bindgen::Builder| match std::panic::catch_unwind(AssertUnwindSafe(|| builder.generate())) {
            Ok(Ok(bindings)) => bindings.to_string(),
            Ok(Err(e)) => fail(&format!("bindgen: {e}")),
            Err(_) => {
                fail("feature `regen-bindings` needs libclang: set LIBCLANG_PATH to its folder (see .ci/bindings)")
            }
        };
        let path = Path::new("src/backend/cuda/bindings.rs");
        println!("cargo::rerun-if-changed={}", path.display());
        let all = format!("{HEAD}{}\n{}", text(native), text(emulated));
        // Written only when it changes, or every build would see a newer file.
        if fs::read_to_string(path).unwrap_or_default() != all
            && let Err(e) = fs::write(path, all)
        {
            fail(&format!("{}: {e}", path.display()));
        }
    }
}
