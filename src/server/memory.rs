//! Whether there is memory for one session more. Asked before admission, so that a session too many is refused instead
//! of the system ending the whole process.

use std::path::{Path, PathBuf};

/// Bytes that this process could still take: what the machine has left, or its control group (container) if that is
/// less. `None` where the system does not tell (not Linux).
pub(super) fn available() -> Option<u64> {
    let machine = meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    let group = std::fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| of_group(&group(&text)?));
    Some(group.map_or(machine, |left| left.min(machine)))
}

/// The folder of this process's control group (version 2).
fn group(text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|l| l.strip_prefix("0::"))?;
    Some(Path::new("/sys/fs/cgroup").join(path.trim_start_matches('/')))
}

fn of_group(folder: &Path) -> Option<u64> {
    let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
    // "max": no limit.
    let most = number("memory.max")?;
    let cache = std::fs::read_to_string(folder.join("memory.stat")).ok();
    let cache = cache.and_then(|text| field(&text, "inactive_file ")).unwrap_or(0);
    Some(most.saturating_sub(number("memory.current")?.saturating_sub(cache)))
}

fn meminfo(text: &str) -> Option<u64> {
    field(text, "MemAvailable:").map(|kib| kib << 10)
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|l| l.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_files_are_understood() {
        assert_eq!(meminfo("MemTotal: 100 kB\nMemAvailable:    2048 kB\n"), Some(2 << 20));
        assert_eq!(meminfo("nothing"), None);
        assert_eq!(
            group("1:cpu:/x\n0::/system.slice/loquent.service\n").unwrap(),
            Path::new("/sys/fs/cgroup/system.slice/loquent.service")
        );
        let folder = std::env::temp_dir().join(format!("loquent-cgroup-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("memory.max"), "max\n").unwrap();
        std::fs::write(folder.join("memory.current"), "700\n").unwrap();
        assert_eq!(of_group(&folder), None);
        std::fs::write(folder.join("memory.max"), "1000\n").unwrap();
        std::fs::write(folder.join("memory.stat"), "anon 5\ninactive_file 200\n").unwrap();
        assert_eq!(of_group(&folder), Some(500), "a page cache can be given up");
        std::fs::remove_dir_all(&folder).unwrap();
        #[cfg(target_os = "linux")]
        assert!(available().unwrap() > 1 << 20);
    }
}
