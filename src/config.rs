//! Composes each room's `Config`; load, validate, print.
