//! A window into the middle of a forward: what golden tests and ports to new devices look at.

use candle_core::Tensor;

use crate::model::{Result, nn::Residual};

/// Sees intermediate results by name (`blocks.3`, `after_inject.0`, …); off by default and then free.
pub struct Trace<'a> {
    sink: Option<&'a mut dyn FnMut(&str, &Tensor)>,
    prefix: String,
}

impl<'a> Trace<'a> {
    /// Sees nothing.
    pub fn off() -> Self {
        Self { sink: None, prefix: String::new() }
    }

    /// Hands everything to `sink`.
    pub fn to(sink: &'a mut dyn FnMut(&str, &Tensor)) -> Self {
        Self { sink: Some(sink), prefix: String::new() }
    }

    /// Whether somebody looks.
    pub(crate) fn on(&self) -> bool {
        self.sink.is_some()
    }

    /// Names seen from now on start with `prefix.`.
    pub(crate) fn within(&mut self, prefix: impl FnOnce() -> String) {
        if self.sink.is_some() {
            self.prefix = prefix();
        }
    }

    pub(crate) fn see(&mut self, name: &str, x: &Tensor) {
        if let Some(sink) = &mut self.sink {
            if self.prefix.is_empty() {
                sink(name, x);
            } else {
                sink(&format!("{}.{name}", self.prefix), x);
            }
        }
    }

    /// Sees the tokens as they are now.
    pub(crate) fn see_tokens(&mut self, name: impl FnOnce() -> String, x: &mut Residual) -> Result<()> {
        if self.on() {
            self.see(&name(), &x.snapshot()?);
        }
        Ok(())
    }

    /// Names seen from now on have no prefix.
    pub(crate) fn outside(&mut self) {
        self.prefix.clear();
    }
}
