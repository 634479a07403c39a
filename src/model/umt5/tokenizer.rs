//! Prompts to token ids: `google/umt5-xxl`'s SentencePiece model through its `tokenizer.json` (MODEL.md §4.1).

use super::clean::clean;
use crate::model::{Error, Result};

/// Id of the end token `</s>`.
const END: u32 = 1;

/// A tokenizer with the cleaning that the transformer was trained with.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    length: usize,
}

impl Tokenizer {
    /// Reads the text of a `tokenizer.json`; prompts are cut to `length` tokens (512 officially), the end token kept.
    pub fn from_json(json: &[u8], length: usize) -> Result<Self> {
        let mut inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|e| Error::Weights(format!("this tokenizer.json cannot be read: {e}")))?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| Error::Weights(format!("this tokenizer.json cannot be used: {e}")))?;
        Ok(Tokenizer { inner, length: length.max(1) })
    }

    /// Ids of a prompt, cleaned, ending with `</s>`, without padding (padded rows are cut off after encoding anyway).
    pub fn encode(&self, prompt: &str) -> Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode(clean(prompt), true)
            .map_err(|e| Error::Input(format!("the prompt cannot be split into tokens: {e}")))?;
        let mut ids = encoding.get_ids().to_vec();
        if ids.last() != Some(&END) {
            ids.push(END);
        }
        if ids.len() > self.length {
            ids.truncate(self.length - 1);
            ids.push(END);
        }
        Ok(ids)
    }
}
