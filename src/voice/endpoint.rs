//! A voice that is an HTTP service: `POST {model, voice, input, response_format}`, the answer's body is sound.
//!
//! The protocol is OpenAI's `audio/speech`, which many local servers speak too.

use super::{Config, VoiceError};
use bytes::Bytes;
use std::time::Duration;

/// Of an error's body, so much is told.
const COMPLAINT: usize = 400;

pub(super) struct Client {
    http: reqwest::Client,
    key: Option<String>,
}

/// Sound on its way; dropping it ends the request.
pub(super) struct Response(reqwest::Response);

fn failed(error: reqwest::Error) -> VoiceError {
    // The innermost cause says what happened; the outer ones repeat the address.
    let mut cause: &dyn std::error::Error = &error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    VoiceError::Failed(format!("cannot be reached: {cause}"))
}

impl Client {
    pub(super) fn new(config: &Config, key: Option<String>) -> Result<Client, VoiceError> {
        let key = key.filter(|k| !k.is_empty());
        if key.is_none() && !config.key_variable.is_empty() {
            return Err(VoiceError::NoKey(config.key_variable.clone()));
        }
        let http = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(Duration::from_secs(config.patience_s))
            .user_agent(concat!("loquent/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(failed)?;
        Ok(Client { http, key })
    }

    pub(super) async fn ask(&self, config: &Config, text: &str) -> Result<Response, VoiceError> {
        let body = serde_json::json!({
            "model": config.model, "voice": config.voice, "input": text, "response_format": config.format,
        });
        let mut request = self.http.post(&config.url).json(&body);
        if let Some(key) = &self.key {
            request = request.bearer_auth(key);
        }
        let response = request.send().await.map_err(failed)?;
        let status = response.status();
        if status.is_success() {
            return Ok(Response(response));
        }
        let said = complaint(response).await;
        Err(VoiceError::Failed(format!(
            "answers {}{}",
            status.as_u16(),
            said.map(|s| format!(": {s}")).unwrap_or_default()
        )))
    }
}

/// What an error says: the usual JSON, or the beginning of a text.
async fn complaint(mut response: reqwest::Response) -> Option<String> {
    let mut body = Vec::new();
    while let Ok(Some(part)) = response.chunk().await {
        body.extend_from_slice(&part);
        if body.len() > 16 * COMPLAINT {
            break;
        }
    }
    let json: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
    let told = json.as_ref().and_then(|j| j["error"]["message"].as_str()).map(String::from);
    let text = told.unwrap_or_else(|| String::from_utf8_lossy(&body).into());
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    (!text.is_empty()).then(|| text.chars().take(COMPLAINT).collect())
}

impl Response {
    pub(super) async fn bytes(&mut self) -> Result<Option<Bytes>, VoiceError> {
        self.0.chunk().await.map_err(failed)
    }
}
