//! Golden vectors of the official programs.

fn main() {}
