//! Bytes of a voice as they come (a pipe, a response) to samples: WAV when it begins like one, else raw PCM.

use super::VoiceError;
use crate::media::{MediaTime, Pcm};

/// A header is shorter than this, or it is no sound.
const LONGEST_HEADER: usize = 64 * 1024;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    S16,
    S24,
    F32,
}

impl Format {
    fn bytes(self) -> usize {
        match self {
            Format::S16 => 2,
            Format::S24 => 3,
            Format::F32 => 4,
        }
    }
}

struct Shape {
    rate: u32,
    channels: usize,
    format: Format,
}

/// Takes bytes, gives samples; see the module.
pub(super) struct Decoder {
    /// Of raw sound: 16 bits, little endian, one channel.
    raw_rate: u32,
    shape: Option<Shape>,
    waiting: Vec<u8>,
    heard: bool,
}

impl Decoder {
    pub(super) fn new(raw_rate: u32) -> Decoder {
        Decoder { raw_rate, shape: None, waiting: Vec::new(), heard: false }
    }

    /// Whether any sound came.
    pub(super) fn heard(&self) -> bool {
        self.heard
    }

    /// Some more bytes; the samples that are complete with them, or `None`: more, please.
    ///
    /// # Errors
    /// [`VoiceError::Sound`] for a header that is none or asks for what is not known.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Option<Pcm>, VoiceError> {
        self.waiting.extend_from_slice(bytes);
        if self.shape.is_none() && !self.begin()? {
            return Ok(None);
        }
        let Some(shape) = &self.shape else { return Ok(None) };
        let frame = shape.format.bytes() * shape.channels;
        let whole = self.waiting.len() / frame * frame;
        if whole == 0 {
            return Ok(None);
        }
        let value = |b: &[u8]| match shape.format {
            Format::S16 => f32::from(i16::from_le_bytes([b[0], b[1]])) / 32_768.0,
            Format::S24 => (i32::from_le_bytes([0, b[0], b[1], b[2]]) >> 8) as f32 / 8_388_608.0,
            Format::F32 => Some(f32::from_le_bytes([b[0], b[1], b[2], b[3]])).filter(|v| v.is_finite()).unwrap_or(0.0),
        };
        let samples = self.waiting[..whole]
            .chunks_exact(frame)
            .map(|f| f.chunks_exact(shape.format.bytes()).map(value).sum::<f32>() / shape.channels as f32)
            .map(|v| v.clamp(-1.0, 1.0))
            .collect();
        let rate = shape.rate;
        self.waiting.drain(..whole);
        self.heard = true;
        Ok(Some(Pcm { at: MediaTime::ZERO, rate, samples }))
    }

    /// Finds out what comes. `false`: too early to say.
    fn begin(&mut self) -> Result<bool, VoiceError> {
        let b = &self.waiting;
        if b.len() < 4 {
            return Ok(false);
        }
        if b[..4] != *b"RIFF" {
            let text = b[..4].iter().all(|c| c.is_ascii_graphic() || c.is_ascii_whitespace());
            let known: [(&[u8], &str); 5] =
                [(b"OggS", "Ogg"), (b"fLaC", "FLAC"), (b"ID3", "MP3"), (&[0xff, 0xfb], "MP3"), (&[0xff, 0xf3], "MP3")];
            if let Some((_, name)) = known.iter().find(|(magic, _)| b.starts_with(magic)) {
                return Err(VoiceError::Sound(format!("it sends {name}; ask it for WAV or raw PCM")));
            }
            if text && (b[0] == b'{' || b[0] == b'<') {
                return Err(VoiceError::Sound("it sends text instead of sound".into()));
            }
            self.shape = Some(Shape { rate: self.raw_rate, channels: 1, format: Format::S16 });
            return Ok(true);
        }
        let word = |at: usize| b.get(at..at + 4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
        let half = |at: usize| b.get(at..at + 2).map(|w| u16::from_le_bytes([w[0], w[1]]));
        let (mut at, mut shape) = (12, None);
        loop {
            if at > LONGEST_HEADER {
                return Err(VoiceError::Sound("its WAV header has no end".into()));
            }
            let (Some(kind), Some(size)) = (b.get(at..at + 4), word(at + 4)) else { return Ok(false) };
            if kind == b"data" {
                // The size is not believed: what is written to a pipe cannot know it.
                let Some(shape) = shape else {
                    return Err(VoiceError::Sound("its WAV header names no format".into()));
                };
                self.shape = Some(shape);
                self.waiting.drain(..at + 8);
                return Ok(true);
            }
            if kind == b"fmt " {
                let fields = (half(at + 8), half(at + 10), word(at + 12), half(at + 22), half(at + 32));
                let (Some(tag), Some(channels), Some(rate), Some(bits)) = (fields.0, fields.1, fields.2, fields.3)
                else {
                    return Ok(false);
                };
                let tag = if tag == 0xfffe { fields.4.unwrap_or(tag) } else { tag };
                let format = match (tag, bits) {
                    (1, 16) => Format::S16,
                    (1, 24) => Format::S24,
                    (3, 32) => Format::F32,
                    _ => {
                        return Err(VoiceError::Sound(format!(
                            "its WAV has {bits} bits of kind {tag}; 16 bits are best"
                        )));
                    }
                };
                if !(1..=8).contains(&channels) || !(8_000..=192_000).contains(&rate) {
                    return Err(VoiceError::Sound(format!("its WAV has {channels} channels at {rate} Hz")));
                }
                shape = Some(Shape { rate, channels: channels.into(), format });
            }
            at += 8 + (size as usize).saturating_add(size as usize & 1).min(1 << 30);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wav(channels: u16, rate: u32, frames: &[i16]) -> Vec<u8> {
        let mut out = b"RIFF\xff\xff\xff\x7fWAVELIST\x04\0\0\0abcdfmt \x10\0\0\0\x01\0".to_vec();
        out.extend(channels.to_le_bytes());
        out.extend(rate.to_le_bytes());
        out.extend((rate * u32::from(channels) * 2).to_le_bytes());
        out.extend((channels * 2).to_le_bytes());
        out.extend(b"\x10\0data\0\xf0\xff\x7f");
        frames.iter().for_each(|s| out.extend(s.to_le_bytes()));
        out
    }

    #[test]
    fn sound_is_the_same_however_its_bytes_are_cut() {
        let frames: Vec<i16> = (0..2000).map(|i| (i * 13 % 3000) as i16).collect();
        for (bytes, rate, count) in [
            (wav(1, 22_050, &frames), 22_050, 2000),
            (wav(2, 48_000, &frames), 48_000, 1000),
            (frames.iter().flat_map(|s| s.to_le_bytes()).collect(), 24_000, 2000),
        ] {
            let mut whole: Option<Vec<f32>> = None;
            for cut in [1, 3, 7, 1000, 1 << 20] {
                let (mut decoder, mut got) = (Decoder::new(24_000), Vec::new());
                for part in bytes.chunks(cut) {
                    if let Some(pcm) = decoder.push(part).unwrap() {
                        assert_eq!(pcm.rate, rate);
                        got.extend(pcm.samples);
                    }
                }
                assert_eq!(got.len(), count);
                assert_eq!(whole.get_or_insert_with(|| got.clone()), &got);
            }
        }
    }

    #[test]
    fn what_is_no_sound_is_refused_in_words() {
        for (bytes, word) in [
            (&b"{\"error\": 1}"[..], "text"),
            (b"ID3\x04", "MP3"),
            (b"OggS\0", "Ogg"),
            (b"RIFF....WAVEdata\0\0\0\0", "no format"),
        ] {
            let said = Decoder::new(24_000).push(bytes).err().map(|e| e.to_string()).unwrap_or_default();
            assert!(said.contains(word), "{said}");
        }
    }
}
