//! Prompts to what the transformer reads. The text encoder passes through the device block by block once for all prompts
//! that are not known yet, and is gone before frames are made.

use std::{collections::VecDeque, sync::Arc};

use candle_core::{DType, Device, Tensor};

use super::parts::{Text, Watcher, watched};
use crate::model::{
    Error, Result,
    dit::{Dit, TextContext},
    umt5::{self, Tokenizer},
    weights::{Source, layout::Part},
};

/// Encoded prompts remembered; each is a few megabytes.
const REMEMBERED: usize = 64;
/// Prompts whose keys and values are kept for all blocks: several hundred megabytes each in the large model.
const AT_HAND: usize = 2;

/// The reader of one model.
pub(in crate::avatar) struct Reader {
    source: Arc<dyn Source>,
    config: umt5::Config,
    tokenizer: Tokenizer,
    device: Device,
    dtype: DType,
    watcher: Watcher,
    states: VecDeque<(String, Tensor)>,
    contexts: VecDeque<(String, Arc<TextContext>)>,
}

impl Reader {
    pub(in crate::avatar) fn new(
        text: &Text,
        text_len: usize,
        device: &Device,
        dtype: DType,
        watcher: &Watcher,
    ) -> Result<Reader> {
        let tokenizer = Tokenizer::from_json(&text.tokenizer, text_len)?;
        Ok(Reader {
            source: text.source.clone(),
            config: text.config.clone(),
            tokenizer,
            device: device.clone(),
            dtype,
            watcher: watcher.clone(),
            states: VecDeque::new(),
            contexts: VecDeque::new(),
        })
    }

    /// Encodes those of the prompts that are not known yet, in one pass.
    pub(in crate::avatar) fn learn(&mut self, prompts: &[&str]) -> Result<()> {
        let mut new: Vec<&str> = Vec::new();
        for prompt in prompts {
            if !new.contains(prompt) && !self.states.iter().any(|(p, _)| p == prompt) {
                new.push(prompt);
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        let ids = new.iter().map(|p| self.tokenizer.encode(p)).collect::<Result<Vec<_>>>()?;
        let weights = watched(&self.source, Part::Text.name(), &self.device, self.dtype, &self.watcher);
        let states = umt5::encode_passing(&weights, &self.config, &ids)?;
        self.states.extend(new.iter().map(|p| p.to_string()).zip(states));
        let surplus = self.states.len().saturating_sub(REMEMBERED.max(new.len()));
        self.states.drain(..surplus);
        Ok(())
    }

    /// The prompt as every block of the transformer reads it.
    pub(in crate::avatar) fn read(&mut self, dit: &Dit, prompt: &str) -> Result<Arc<TextContext>> {
        if let Some((_, context)) = self.contexts.iter().find(|(p, _)| p == prompt) {
            return Ok(context.clone());
        }
        let context = Arc::new(dit.text(&self.states(prompt)?)?);
        self.contexts.push_back((prompt.into(), context.clone()));
        if self.contexts.len() > AT_HAND {
            self.contexts.pop_front();
        }
        Ok(context)
    }

    /// The prompt as the text encoder gives it, `[tokens, width]`.
    pub(in crate::avatar) fn states(&mut self, prompt: &str) -> Result<Tensor> {
        self.learn(&[prompt])?;
        let found = self.states.iter().find(|(p, _)| p == prompt).map(|(_, s)| s.clone());
        found.ok_or_else(|| Error::Input("the prompt could not be encoded".into()))
    }
}
