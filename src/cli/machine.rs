//! What kind of machine this is, as far as the program can see without asking anybody.

use serde::Serialize;

/// The machine a measurement was made on.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    pub(super) processor: String,
    /// Cores this process may use.
    pub(super) cores: usize,
    pub(super) features: Vec<&'static str>,
    pub(super) memory_mib: Option<u64>,
    pub(super) memory_free_mib: Option<u64>,
    /// Names of NVIDIA devices with a driver.
    pub(super) gpus: Vec<String>,
    /// Work of others while we measured: the load average of the last minute.
    pub(super) load: Option<f64>,
    pub(super) system: String,
    pub(super) version: &'static str,
}

impl Machine {
    pub(super) fn look() -> Machine {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let info = read("/proc/cpuinfo");
        let field = |name: &str| {
            let line = info.lines().find(|l| l.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_string())
        };
        let memory = read("/proc/meminfo");
        let mib = |name: &str| {
            let line = memory.lines().find(|l| l.starts_with(name))?;
            Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? / 1024)
        };
        let release = read("/etc/os-release");
        let system =
            release.lines().find_map(|l| l.strip_prefix("PRETTY_NAME=")).map(|n| n.trim_matches('"').to_string());
        Machine {
            processor: field("model name").unwrap_or_else(|| std::env::consts::ARCH.into()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            features: features(),
            memory_mib: mib("MemTotal"),
            memory_free_mib: mib("MemAvailable"),
            gpus: gpus(),
            load: read("/proc/loadavg").split(' ').next().and_then(|l| l.parse().ok()),
            system: system.unwrap_or_else(|| std::env::consts::OS.into()),
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    let mut out = Vec::new();
    for (name, present) in [
        ("AVX2", is_x86_feature_detected!("avx2")),
        ("FMA", is_x86_feature_detected!("fma")),
        ("AVX-512", is_x86_feature_detected!("avx512f")),
        ("AVX-512 VNNI", is_x86_feature_detected!("avx512vnni")),
    ] {
        if present {
            out.push(name);
        }
    }
    out
}

#[cfg(not(target_arch = "x86_64"))]
fn features() -> Vec<&'static str> {
    if cfg!(target_arch = "aarch64") { vec!["NEON"] } else { vec![] }
}

fn gpus() -> Vec<String> {
    let Ok(folders) = std::fs::read_dir("/proc/driver/nvidia/gpus") else { return vec![] };
    let name = |folder: std::path::PathBuf| {
        let text = std::fs::read_to_string(folder.join("information")).ok()?;
        Some(text.lines().find(|l| l.starts_with("Model"))?.split_once(':')?.1.trim().to_string())
    };
    folders.flatten().map(|f| name(f.path()).unwrap_or_else(|| "an NVIDIA device".into())).collect()
}
