//! The commands. The only room with `anyhow`, the environment and exit codes.
