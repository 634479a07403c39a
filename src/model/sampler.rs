//! From noise to a latent.
