//! Build script: fails early, in plain words, when a system tool that matters is missing.
//!
//! libopus is built with cmake, openh264 with a C++ compiler and, for its fast paths, nasm. Without nasm openh264 builds
//! silently and encodes at 0.4 of its speed, so that is an error here unless it is asked for.
//!
//! Profile `dist` is also told what its linker can do to make the program smaller.

use flate2::{Compression, write::ZlibEncoder};
use std::{
    env, fs,
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    time::SystemTime,
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
        missing.push("a C compiler (cc, gcc or clang), which builds libopus, openh264 and the presenters' renderer");
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
        presenter();
        if let Err(why) = weights() {
            println!("cargo::error=the weights in pocket/ cannot be made part of the program: {why}");
        }
        smaller();
        if env::var_os("CARGO_FEATURE_CUDA").is_some()
            && let Err(why) = cuda()
        {
            println!("cargo::error={why}");
        }
        return;
    }
    for what in &missing {
        println!("cargo::error=missing: {what}");
    }
    println!("cargo::error={INSTALL}");
}

/// Compiles the renderer of drawn presenters (`pocket/render`). Its entries get names of their own, since a program may
/// know others called `render`.
fn presenter() {
    println!("cargo:rerun-if-changed=pocket/render");
    cc::Build::new()
        .file("pocket/render/render.c")
        .define("render", "loquent_draw_presenter")
        .define("render_matte", "loquent_draw_matte")
        .opt_level(3)
        .compile("presenter");
}

/// Deflates the weights that become part of the program (`src/avatar/embedded.rs`). More effort than the least gains
/// nothing: numbers repeat nowhere, only some are more frequent than others.
fn weights() -> std::io::Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default());
    for name in ["pocket-00001-of-00002", "pocket-00002-of-00002"] {
        let file = format!("pocket/{name}.safetensors");
        println!("cargo:rerun-if-changed={file}");
        let mut deflated = ZlibEncoder::new(Vec::new(), Compression::fast());
        deflated.write_all(&fs::read(file)?)?;
        fs::write(out.join(format!("{name}.z")), deflated.finish()?)?;
    }
    Ok(())
}

/// Gives the linker of profile `dist` those of these arguments that it knows: relocations as a bitmap (1.4 MB less; glibc
/// knows it since 2.36), and one copy of functions whose code is the same (0.5 MB less; lld and mold can, GNU's ld cannot).
/// Each is tried with a program that is linked and run, so a linker or a glibc that is too old gives a larger program only.
fn smaller() {
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else { return };
    // `target/PROFILE/build/NAME/out`: cargo tells a build script nothing else of a profile that inherits from another.
    let shipped = out.ancestors().nth(3).and_then(Path::file_name).is_some_and(|name| name == "dist");
    let linux = env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux");
    if !shipped || !linux || env::var("HOST") != env::var("TARGET") {
        return;
    }
    for argument in ["-Wl,-z,pack-relative-relocs", "-Wl,--icf=all"] {
        if links_and_runs(&out, argument) {
            println!("cargo:rustc-link-arg-bins={argument}");
        }
    }
}

/// Whether the compiler of this build links a program with `argument`, and it runs.
fn links_and_runs(out: &Path, argument: &str) -> bool {
    let (source, program) = (out.join("probe.rs"), out.join("probe"));
    if fs::write(&source, "fn main() {}").is_err() {
        return false;
    }
    let mut rustc = Command::new(env::var_os("RUSTC").unwrap_or("rustc".into()));
    let flags = env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    rustc.args(flags.split('\x1f').filter(|flag| !flag.is_empty()));
    if let Some(linker) = env::var_os("RUSTC_LINKER") {
        rustc.args(["-C", &format!("linker={}", linker.to_string_lossy())]);
    }
    rustc.args(["-C", &format!("link-arg={argument}"), "-o"]).arg(&program).arg(&source);
    rustc.output().is_ok_and(|done| done.status.success())
        && Command::new(&program).status().is_ok_and(|ended| ended.success())
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

/// Compiles `src/model/kernels/cuda`: kernels (`*.cu`) and the shim over the cuDNN frontend (`*.cpp`), one static library.
/// No card is needed for this. The toolkit is looked for where `CUDA_HOME` or `CUDA_PATH` say, then beside `nvcc` on the
/// search path, then in `/usr/local/cuda`; cuDNN's headers in the toolkit, `CUDNN_HOME` and `/usr`; the frontend's headers
/// where `CUDNN_FRONTEND_INCLUDE` says, then in the same places.
fn cuda() -> Result<(), String> {
    let sources = Path::new("src/model/kernels/cuda");
    println!("cargo:rerun-if-changed={}", sources.display());
    for variable in ["CUDA_HOME", "CUDA_PATH", "CUDNN_HOME", "CUDNN_FRONTEND_INCLUDE"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let named = |variable: &str| env::var_os(variable).map(PathBuf::from);
    let on_path = env::split_paths(&env::var_os("PATH").unwrap_or_default())
        .find(|folder| folder.join("nvcc").is_file())
        .and_then(|folder| folder.parent().map(Path::to_path_buf));
    let homes = [named("CUDA_HOME"), named("CUDA_PATH"), on_path, Some("/usr/local/cuda".into())];
    let home = homes
        .into_iter()
        .flatten()
        .find(|home| home.join("bin/nvcc").is_file())
        .ok_or("feature `cuda` needs the CUDA 13 toolkit; set CUDA_HOME to the folder that holds bin/nvcc")?;
    let roots: Vec<PathBuf> =
        named("CUDNN_HOME").into_iter().chain([home.clone(), "/usr".into(), "/usr/local".into()]).collect();
    let holding = |header: &str| {
        let near = ["include", "include/x86_64-linux-gnu", "include/aarch64-linux-gnu"];
        roots.iter().flat_map(|r| near.map(|n| r.join(n))).find(|folder| folder.join(header).is_file())
    };
    let cudnn = holding("cudnn.h")
        .ok_or("feature `cuda` needs cuDNN 9; set CUDNN_HOME to the folder that holds include/cudnn.h")?;
    let frontend = named("CUDNN_FRONTEND_INCLUDE")
        .filter(|folder| folder.join("cudnn_frontend.h").is_file())
        .or_else(|| holding("cudnn_frontend.h"))
        .ok_or(
            "feature `cuda` needs the headers of the cuDNN frontend (github.com/NVIDIA/cudnn-frontend); set \
             CUDNN_FRONTEND_INCLUDE to the folder that holds cudnn_frontend.h",
        )?;

    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo names no OUT_DIR")?);
    let changed = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
    let mut files: Vec<PathBuf> =
        fs::read_dir(sources).map_err(|e| format!("{}: {e}", sources.display()))?.flatten().map(|e| e.path()).collect();
    files.sort();
    let ending = |path: &Path, ends: &[&str]| path.extension().is_some_and(|e| ends.iter().any(|end| e == *end));
    let shared = files.iter().filter(|f| ending(f, &["cuh", "hpp"])).map(|f| changed(f)).max();
    let shared = shared.max(Some(changed(Path::new("src/build.rs"))));
    let mut objects = Vec::new();
    for file in files.iter().filter(|f| ending(f, &["cu", "cpp"])) {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let object = out.join(format!("{name}.o"));
        // The frontend's headers take a minute; what has not changed is kept.
        if changed(&object) < changed(file).max(shared.unwrap_or(SystemTime::now())) {
            let mut nvcc = Command::new(home.join("bin/nvcc"));
            nvcc.args(["-c", "-O3", "-std=c++17", "-Xcompiler", "-fPIC", "--expt-relaxed-constexpr"]);
            if ending(file, &["cu"]) {
                // Ampere and Ada run the first, Hopper the second; whatever comes later is compiled by its driver.
                for code in ["compute_80,code=sm_80", "compute_90a,code=sm_90a", "compute_80,code=compute_80"] {
                    nvcc.arg(format!("-gencode=arch={code}"));
                }
            } else {
                nvcc.args(["-Xcompiler", "-w"]);
            }
            nvcc.arg("-I").arg(&cudnn).arg("-I").arg(&frontend).arg("-o").arg(&object).arg(file);
            let done = nvcc.output().map_err(|e| format!("nvcc cannot be run: {e}"))?;
            if !done.status.success() {
                let _ = fs::remove_file(&object);
                let said = String::from_utf8_lossy(&done.stderr).lines().take(12).collect::<Vec<_>>().join(" | ");
                return Err(format!("nvcc cannot compile {name}: {said}"));
            }
        }
        objects.push(object);
    }
    let library = out.join("libloquent_cuda.a");
    let _ = fs::remove_file(&library);
    let done = Command::new(home.join("bin/nvcc")).arg("-lib").arg("-o").arg(&library).args(&objects).status();
    if !done.is_ok_and(|s| s.success()) {
        return Err("nvcc cannot put the library of kernels together".into());
    }
    println!("cargo:rustc-link-search=native={}", out.display());
    for root in &roots {
        for folder in ["lib64", "lib", "targets/x86_64-linux/lib", "lib/x86_64-linux-gnu"] {
            println!("cargo:rustc-link-search=native={}", root.join(folder).display());
        }
    }
    println!("cargo:rustc-link-lib=static=loquent_cuda");
    println!("cargo:rustc-link-lib=static=cudart_static");
    for library in ["cudnn", "stdc++", "dl", "rt", "pthread"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
    Ok(())
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
