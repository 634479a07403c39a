//! One thread per device: slots, admission, health, warm-up.
