//! Build script: fails early, in plain words, when a system tool that matters is missing.
//!
//! libopus is built with cmake, openh264 with a C++ compiler and, for its fast paths, nasm. Without nasm openh264 builds
//! silently and encodes at 0.4 of its speed, so that is an error here unless it is asked for.

use std::{
    env,
    path::{Path, PathBuf},
};

const ALLOW_SLOW: &str = "LOQUENT_ALLOW_SLOW_H264";
const INSTALL: &str = "on Debian or Ubuntu: apt-get install -y build-essential cmake nasm pkg-config";

fn main() {
    println!("cargo:rerun-if-changed=src/build.rs");
    for variable in ["CC", "CXX", "CMAKE", "OPENH264_NO_ASM", ALLOW_SLOW] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let mut missing = Vec::new();
    if !tool("CC", &["cc", "gcc", "clang"]) {
        missing.push("a C compiler (cc, gcc or clang), which builds libopus and openh264");
    }
    if !tool("CXX", &["c++", "g++", "clang++"]) {
        missing.push("a C++ compiler (c++, g++ or clang++), which builds openh264");
    }
    if !tool("CMAKE", &["cmake"]) {
        missing.push("cmake, which builds libopus");
    }
    let x86 = env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|a| a == "x86_64" || a == "x86");
    let no_assembler = !tool("NASM", &["nasm"]) || env::var_os("OPENH264_NO_ASM").is_some();
    let slow = x86 && no_assembler;
    let slow_is_fine = env::var_os(ALLOW_SLOW).is_some_and(|v| v == "1");
    if slow && !slow_is_fine {
        missing.push(
            "nasm, without which the H.264 encoder needs 2.6 times the processor time (LOQUENT_ALLOW_SLOW_H264=1 builds \
             it so all the same)",
        );
    }
    if x86 && !slow && built_without_assembler() {
        missing.push(
            "the fast paths of openh264, which was built here before nasm was installed: run \
             `cargo clean --release -p openh264-sys2` and build again",
        );
    }
    if slow && slow_is_fine {
        println!("cargo:warning=nasm is missing: the H.264 encoder needs 2.6 times the processor time ({INSTALL})");
    }
    // `loquent doctor` tells it later.
    println!(
        "cargo:rustc-env=LOQUENT_H264_ASSEMBLER={}",
        if x86 && !no_assembler {
            "yes"
        } else if x86 {
            "no"
        } else {
            "n/a"
        }
    );
    if missing.is_empty() {
        return;
    }
    for what in &missing {
        println!("cargo::error=missing: {what}");
    }
    println!("cargo::error={INSTALL}");
}

/// Whether a finished build of openh264 lies beside this one without a single assembled file: cargo keeps it, and would
/// link the slow encoder for ever. Its assembler writes `dct.o`; the C++ compiler's files have a hash in their names.
fn built_without_assembler() -> bool {
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else { return false };
    let Some(builds) = out.parent().and_then(Path::parent).and_then(|p| p.read_dir().ok()) else { return false };
    builds.flatten().filter(|e| e.file_name().to_string_lossy().starts_with("openh264-sys2-")).any(|e| {
        let build = e.path();
        build.join("output").exists() && !build.join("out/dct.o").exists()
    })
}

/// Whether the program named by `variable`, or one of `names`, can be found on the search path.
fn tool(variable: &str, names: &[&str]) -> bool {
    let named = env::var(variable).ok().and_then(|v| v.split_whitespace().next().map(str::to_string));
    named.iter().map(String::as_str).chain(names.iter().copied()).any(|name| {
        if Path::new(name).components().count() > 1 {
            return Path::new(name).exists();
        }
        let folders = env::var_os("PATH").unwrap_or_default();
        env::split_paths(&folders).any(|folder: PathBuf| {
            let file = folder.join(name);
            file.is_file() || file.with_extension("exe").is_file()
        })
    })
}
