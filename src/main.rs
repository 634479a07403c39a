//! The program: parse, run, exit code. Everything else is in the library.

fn main() -> std::process::ExitCode {
    share_memory();
    loquent::cli::main()
}

/// Pictures are made by one thread and freed by another, and glibc gives each thread a heap of its own that keeps what
/// others freed: in fifteen minutes the program grew by a tenth, with two heaps for all by a thirtieth (`tests/soak`).
fn share_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: sets a number of the allocator's, before there is a second thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}
