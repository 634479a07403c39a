//! Activations between an operation and the matrix that takes them next.

use candle_core::{DType, Tensor};

use super::fp8;
use crate::model::Result;

/// How a matrix wants its input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Numbers of this type.
    Plain(DType),
    /// e4m3 with a scale per row.
    Scaled,
}

/// Rows `[n, width]` in one of these forms. Operations that end a row give it in the form its reader wants, so that no
/// pass over memory is made for the change.
#[derive(Debug, Clone)]
pub enum Rows {
    /// Numbers as they are.
    Plain(Tensor),
    /// `value = stored · unit` of the row.
    Scaled {
        /// `[n, width]`, element type F8E4M3.
        stored: Tensor,
        /// `[n]`, f32.
        units: Tensor,
    },
}

impl Rows {
    /// Rows and columns.
    pub fn dims(&self) -> &[usize] {
        match self {
            Rows::Plain(x) | Rows::Scaled { stored: x, .. } => x.dims(),
        }
    }

    /// The numbers themselves.
    pub fn plain(&self) -> Result<Tensor> {
        match self {
            Rows::Plain(x) => Ok(x.clone()),
            Rows::Scaled { stored, units } => fp8::restore(stored, units),
        }
    }
}
