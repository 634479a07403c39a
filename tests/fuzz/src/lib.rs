//! What the fuzz targets share. `README` of all of it: `tests/README.md`, "Fuzzing".
//!
//! Parsers that are nobody's business outside their room are compiled here from the project's own files, once more; so
//! the product needs no doors that only a test would use. What they call `crate::…` is the product itself.
#![allow(dead_code, unused_imports, unreachable_pub)]

pub use loquent::{codec, edge, media, session, telemetry};

pub mod livekit;
pub mod memory;
pub mod net;
pub mod service;
pub mod voice;

use std::{fs::File, io::Write as _, os::fd::FromRawFd as _, path::PathBuf};

/// A file in memory with these bytes, for readers that want a path. Gone when dropped.
pub struct Scratch(File);

impl Scratch {
    pub fn new(bytes: &[u8]) -> Scratch {
        // SAFETY: a name without zero bytes, and the descriptor belongs to nobody else.
        let mut file = unsafe {
            let fd = memfd_create(c"fuzz".as_ptr(), 0);
            assert!(fd >= 0, "memfd_create: {}", std::io::Error::last_os_error());
            File::from_raw_fd(fd)
        };
        file.write_all(bytes).unwrap();
        Scratch(file)
    }

    pub fn path(&self) -> PathBuf {
        use std::os::fd::AsRawFd as _;
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

unsafe extern "C" {
    fn memfd_create(name: *const std::ffi::c_char, flags: std::ffi::c_uint) -> std::ffi::c_int;
}

/// Cuts bytes into numbers and pieces; zeros and nothing when they are used up.
pub struct Cut<'a>(pub &'a [u8]);

impl<'a> Cut<'a> {
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        head
    }
    pub fn u8(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }
    pub fn u16(&mut self) -> u16 {
        u16::from(self.u8()) << 8 | u16::from(self.u8())
    }
    pub fn u32(&mut self) -> u32 {
        u32::from(self.u16()) << 16 | u32::from(self.u16())
    }
    pub fn done(&self) -> bool {
        self.0.is_empty()
    }
}
