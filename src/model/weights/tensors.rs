//! A checkpoint that is already in memory: tests, merged adapters, generated weights.

use std::collections::BTreeMap;

use candle_core::Tensor;

use super::Source;
use crate::model::{Error, Result};

/// Named tensors as a [`Source`].
pub struct Tensors {
    map: BTreeMap<String, Tensor>,
    origin: String,
}

impl Tensors {
    /// `origin` is what error messages call it.
    pub fn new(map: impl IntoIterator<Item = (String, Tensor)>, origin: impl Into<String>) -> Self {
        Self { map: map.into_iter().collect(), origin: origin.into() }
    }
}

impl Source for Tensors {
    fn names(&self) -> Vec<String> {
        self.map.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.map.get(name).map(|t| t.dims().to_vec())
    }

    fn load(&self, name: &str) -> Result<Tensor> {
        self.map.get(name).cloned().ok_or_else(|| Error::Weights(format!("{}: no tensor {name}", self.origin)))
    }

    fn origin(&self) -> String {
        self.origin.clone()
    }
}
