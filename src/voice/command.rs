//! A voice that is a program: text on its standard input, sound on its standard output. No shell is involved.

use super::{Config, VoiceError};
use bytes::Bytes;
use std::process::Stdio;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    process::{Child, ChildStderr, ChildStdout, Command},
    task::JoinHandle,
};

/// Of a complaint, so much is told.
const COMPLAINT: u64 = 400;

/// A program at work; dropping it kills it.
pub(super) struct Running {
    name: String,
    child: Child,
    sound: ChildStdout,
    /// Reads what it complains about, so that a full pipe does not stop it.
    complaint: JoinHandle<String>,
}

impl Running {
    pub(super) fn start(config: &Config, text: &str) -> Result<Running, VoiceError> {
        let name = config.command.first().cloned().unwrap_or_default();
        let failed = |e: std::io::Error| VoiceError::Failed(format!("`{name}` cannot be started: {e}"));
        let mut child = Command::new(&name)
            .args(config.command.iter().skip(1))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(failed)?;
        let (Some(mut input), Some(sound), Some(errors)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(VoiceError::Failed(format!("`{name}` has no pipes")));
        };
        // A line, because some programs wait for its end. A program that does not read at all ends the write by ending.
        let line = format!("{text}\n");
        tokio::spawn(async move {
            let _ = input.write_all(line.as_bytes()).await;
            let _ = input.shutdown().await;
        });
        Ok(Running { name, child, sound, complaint: tokio::spawn(complaint(errors)) })
    }

    pub(super) async fn bytes(&mut self) -> Result<Option<Bytes>, VoiceError> {
        let mut piece = vec![0; 8192];
        let failed = |e: std::io::Error| VoiceError::Failed(format!("`{}` cannot be read: {e}", self.name));
        let n = self.sound.read(&mut piece).await.map_err(failed)?;
        if n > 0 {
            piece.truncate(n);
            return Ok(Some(piece.into()));
        }
        let status = self.child.wait().await.map_err(failed)?;
        if status.success() {
            return Ok(None);
        }
        let said = (&mut self.complaint).await.unwrap_or_default();
        let name = &self.name;
        let said = if said.is_empty() { String::new() } else { format!(" and says: {said}") };
        Err(VoiceError::Failed(format!("`{name}` ended with {status}{said}")))
    }
}

async fn complaint(errors: ChildStderr) -> String {
    let mut said = Vec::new();
    let mut errors = errors.take(COMPLAINT);
    let _ = errors.read_to_end(&mut said).await;
    let mut rest = errors.into_inner();
    let _ = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await;
    String::from_utf8_lossy(&said).split_whitespace().collect::<Vec<_>>().join(" ")
}
