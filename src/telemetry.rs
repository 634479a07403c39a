//! Tracing set-up and metric names.
