//! Text to sound, by somebody else's voice: a local command, or any speech endpoint that speaks OpenAI's protocol.
//!
//! A text is cut into sentences and fetched one by one, so that the first is heard while the rest is made. [`Speech`] is
//! pulled: nothing is fetched that nobody takes, and dropping it kills the command or ends the request at once.

mod command;
mod endpoint;
mod sentences;
mod sound;

pub use sentences::sentences;

use crate::media::Pcm;
use serde::{Deserialize, Serialize};
use sound::Decoder;
use std::{collections::VecDeque, sync::Arc, time::Duration};

/// Which voice speaks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// None: `say` is refused.
    #[default]
    Off,
    /// A program of this machine.
    Command,
    /// An HTTP service.
    Endpoint,
}

/// `[voice]`: what speaks the text of `say`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub kind: Kind,
    /// The program and its arguments; the text comes on its standard input, the sound goes to its standard output.
    pub command: Vec<String>,
    /// The address that takes `POST` with `{model, voice, input, response_format}`.
    pub url: String,
    /// Name of the environment variable that holds the key; empty = no key is sent.
    pub key_variable: String,
    pub model: String,
    pub voice: String,
    /// What is asked for: `pcm` or `wav`.
    pub format: String,
    /// Samples per second of sound that comes without a WAV header (16 bits, one channel).
    pub raw_rate: u32,
    /// Time a sentence may take until its sound begins, and between two pieces of it.
    pub patience_s: u64,
    /// Characters of one text at most.
    pub longest_text: usize,
    /// Texts of one session that may wait for their turn.
    pub queue: usize,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            kind: Kind::Off,
            command: ["espeak-ng", "--stdin", "--stdout"].map(String::from).to_vec(),
            url: "https://api.openai.com/v1/audio/speech".into(),
            key_variable: "OPENAI_API_KEY".into(),
            model: "gpt-4o-mini-tts".into(),
            voice: "alloy".into(),
            format: "pcm".into(),
            raw_rate: 24_000,
            patience_s: 15,
            longest_text: 10_000,
            queue: 8,
        }
    }
}

impl Config {
    /// Says whether the values are usable.
    ///
    /// # Errors
    /// A sentence that names the key, its value and what is allowed.
    pub fn validate(&self) -> Result<(), String> {
        if self.kind == Kind::Command && self.command.first().is_none_or(String::is_empty) {
            return Err("voice.command is empty: give a program and its arguments, such as [\"espeak-ng\", \
                        \"--stdin\", \"--stdout\"]"
                .into());
        }
        if self.kind == Kind::Endpoint {
            let url = reqwest::Url::parse(&self.url).ok().filter(|u| matches!(u.scheme(), "http" | "https"));
            if url.is_none() {
                return Err(format!("voice.url = \"{}\": allowed is an http:// or https:// address", self.url));
            }
        }
        if !["pcm", "wav"].contains(&self.format.as_str()) {
            return Err(format!("voice.format = \"{}\": allowed are \"pcm\" and \"wav\"", self.format));
        }
        if !(8_000..=96_000).contains(&self.raw_rate) {
            return Err(format!("voice.raw_rate = {}: allowed is 8000 to 96000", self.raw_rate));
        }
        for (key, value, most) in [
            ("patience_s", self.patience_s, 600),
            ("longest_text", self.longest_text as u64, 1_000_000),
            ("queue", self.queue as u64, 1000),
        ] {
            if value == 0 || value > most {
                return Err(format!("voice.{key} = {value}: allowed is 1 to {most}"));
            }
        }
        Ok(())
    }
}

/// Why nothing is heard.
#[derive(Debug, thiserror::Error)]
pub enum VoiceError {
    #[error("no voice is set up; whoever runs the service sets voice.kind to \"command\" or \"endpoint\"")]
    Off,
    #[error("the text has nothing that can be spoken")]
    Empty,
    #[error("the text has {got} characters and at most {most} are taken at once")]
    TooLong { got: usize, most: usize },
    #[error("the environment variable {0}, which voice.key_variable names, is not set")]
    NoKey(String),
    #[error("the voice {0}")]
    Failed(String),
    #[error("the voice sends no sound that can be used: {0}")]
    Sound(String),
    #[error("the voice was silent for {} s", .0.as_secs())]
    TooSlow(Duration),
}

/// A voice that is set up. Cheap to clone.
#[derive(Clone)]
pub struct Voice(Arc<Inner>);

struct Inner {
    config: Config,
    /// Present for an endpoint.
    client: Option<endpoint::Client>,
}

impl Voice {
    /// `key`: what the environment variable `voice.key_variable` holds.
    ///
    /// # Errors
    /// A key that is named but missing; an HTTP client that cannot be made.
    pub fn new(config: Config, key: Option<String>) -> Result<Voice, VoiceError> {
        let client = match config.kind {
            Kind::Endpoint => Some(endpoint::Client::new(&config, key)?),
            _ => None,
        };
        Ok(Voice(Arc::new(Inner { config, client })))
    }

    pub fn config(&self) -> &Config {
        &self.0.config
    }

    /// Begins a text; nothing is fetched before the first [`Speech::next`].
    ///
    /// # Errors
    /// No voice; a text that is empty or too long.
    pub fn speak(&self, text: &str) -> Result<Speech, VoiceError> {
        let config = &self.0.config;
        if config.kind == Kind::Off {
            return Err(VoiceError::Off);
        }
        let got = text.chars().count();
        if got > config.longest_text {
            return Err(VoiceError::TooLong { got, most: config.longest_text });
        }
        let sentences: VecDeque<String> = sentences(text).into();
        if sentences.is_empty() {
            return Err(VoiceError::Empty);
        }
        Ok(Speech { voice: self.clone(), sentences, now: None })
    }
}

/// A text being spoken.
pub struct Speech {
    voice: Voice,
    sentences: VecDeque<String>,
    now: Option<(Source, Decoder)>,
}

enum Source {
    Command(command::Running),
    Endpoint(endpoint::Response),
}

impl Source {
    /// The next bytes; `None` at the end.
    async fn bytes(&mut self) -> Result<Option<bytes::Bytes>, VoiceError> {
        match self {
            Source::Command(running) => running.bytes().await,
            Source::Endpoint(response) => response.bytes().await,
        }
    }
}

impl Speech {
    /// Sentences that are not begun.
    pub fn left(&self) -> usize {
        self.sentences.len()
    }

    /// The next piece of sound, as it comes; `None` when everything was said. `Pcm::at` is not set. After an error
    /// nothing more comes.
    pub async fn next(&mut self) -> Option<Result<Pcm, VoiceError>> {
        let patience = Duration::from_secs(self.voice.0.config.patience_s);
        let piece = tokio::time::timeout(patience, self.piece()).await;
        let piece = piece.unwrap_or(Err(VoiceError::TooSlow(patience))).transpose()?;
        if piece.is_err() {
            self.now = None;
            self.sentences.clear();
        }
        Some(piece)
    }

    async fn piece(&mut self) -> Result<Option<Pcm>, VoiceError> {
        loop {
            let (source, decoder) = match &mut self.now {
                Some(now) => (&mut now.0, &mut now.1),
                None => {
                    let Some(sentence) = self.sentences.pop_front() else { return Ok(None) };
                    let Inner { config, client } = &*self.voice.0;
                    let source = match client {
                        Some(client) => Source::Endpoint(client.ask(config, &sentence).await?),
                        None => Source::Command(command::Running::start(config, &sentence)?),
                    };
                    let now = self.now.insert((source, Decoder::new(config.raw_rate)));
                    (&mut now.0, &mut now.1)
                }
            };
            match source.bytes().await? {
                Some(bytes) => {
                    if let Some(pcm) = decoder.push(&bytes)? {
                        return Ok(Some(pcm));
                    }
                }
                None if decoder.heard() => self.now = None,
                None => return Err(VoiceError::Sound("it ended without any".into())),
            }
        }
    }
}
