//! One file per golden kind; each has `check(golden, check)`.

pub mod rope_tables;
