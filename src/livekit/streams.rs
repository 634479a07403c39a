//! Speech out of byte streams: one stream on the topic [`TOPIC`] is one segment of the agent's speech, PCM of 16 bits,
//! little-endian, interleaved. Pure: packets in, sound out, no clock.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | the agent's speech → session | `livekit.speech_buffer_s` of sound | the newest chunk is dropped, counted |
//! | segments waiting | [`MAX_SEGMENTS`] | the newest stream is refused |
//!
//! The data channel itself never waits for the voice: an interruption comes on the same channel, behind the speech.
//!
//! Source: `livekit-agents/livekit/agents/voice/avatar/_datastream_io.py` of livekit/agents @da6af86.

use livekit_protocol::data_stream::{Chunk, Header, Trailer, header::ContentHeader};
use std::collections::VecDeque;

/// The topic of speech.
pub(super) const TOPIC: &str = "lk.audio_stream";
/// Streams that may be under way or waiting.
pub(super) const MAX_SEGMENTS: usize = 64;
/// Sound is handed on in pieces of at most this, milliseconds.
const PIECE_MS: usize = 100;

/// Why a stream or a chunk was not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refused {
    #[error("a byte stream of speech needs the attribute {0} as a decimal number ({1})")]
    Attribute(&'static str, &'static str),
    #[error("speech comes in byte streams, uncompressed and not inline")]
    Kind,
    #[error("{MAX_SEGMENTS} segments are waiting already")]
    Many,
    #[error("a stream with this id is under way already")]
    Twice,
    #[error("chunk {got} came where {want} was due; the segment ends there")]
    Gap { want: u64, got: u64 },
    #[error("more than {0} s of speech wait; the rest of it is dropped")]
    Full(u64),
}

/// What comes out, in the order in which segments began.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Piece {
    /// Mono, −1…1.
    Sound { rate: u32, samples: Vec<f32> },
    /// The segment is complete.
    End,
}

struct Segment {
    id: String,
    rate: u32,
    channels: usize,
    next: u64,
    /// Bytes of a sample that was cut by a chunk's end.
    odd: Vec<u8>,
    samples: VecDeque<f32>,
    complete: bool,
    /// Something of it has been handed on.
    begun: bool,
}

/// All segments that have not been handed on completely.
pub(super) struct Streams {
    segments: VecDeque<Segment>,
    /// Streams that were cleared while under way: the rest of them is not speech any more.
    cleared: VecDeque<String>,
    most_s: u64,
    /// Samples that found no room.
    pub(super) dropped: u64,
}

impl Streams {
    pub(super) fn new(most_s: u64) -> Streams {
        Streams { segments: VecDeque::new(), cleared: VecDeque::new(), most_s, dropped: 0 }
    }

    /// A stream begins. Those on other topics are not for us and give `Ok(false)`.
    pub(super) fn header(&mut self, header: &Header) -> Result<bool, Refused> {
        if header.topic != TOPIC {
            return Ok(false);
        }
        if !matches!(header.content_header, Some(ContentHeader::ByteHeader(_)))
            || header.compression != 0
            || header.inline_content.as_ref().is_some_and(|c| !c.is_empty())
        {
            return Err(Refused::Kind);
        }
        let number = |name: &'static str, range: std::ops::RangeInclusive<u32>, allowed: &'static str| {
            let value = header.attributes.get(name).and_then(|v| v.parse().ok());
            value.filter(|v| range.contains(v)).ok_or(Refused::Attribute(name, allowed))
        };
        let rate = number("sample_rate", 8_000..=192_000, "8000 to 192000")?;
        let channels = number("num_channels", 1..=8, "1 to 8")?;
        if self.segments.len() >= MAX_SEGMENTS {
            return Err(Refused::Many);
        }
        if self.segments.iter().any(|s| s.id == header.stream_id) {
            return Err(Refused::Twice);
        }
        self.cleared.retain(|id| *id != header.stream_id);
        self.segments.push_back(Segment {
            id: header.stream_id.clone(),
            rate,
            channels: channels as usize,
            next: 0,
            odd: Vec::new(),
            samples: VecDeque::new(),
            complete: false,
            begun: false,
        });
        Ok(true)
    }

    /// More of a stream. Chunks of streams that are not speech, or were cleared, are ignored.
    pub(super) fn chunk(&mut self, chunk: &Chunk) -> Result<(), Refused> {
        let waiting: f64 = self.segments.iter().map(|s| s.samples.len() as f64 / f64::from(s.rate)).sum();
        let most = self.most_s;
        let Some(segment) = self.segments.iter_mut().find(|s| s.id == chunk.stream_id && !s.complete) else {
            return Ok(());
        };
        if chunk.chunk_index < segment.next {
            // Sent again after the signalling was resumed.
            return Ok(());
        }
        if chunk.chunk_index > segment.next {
            segment.complete = true;
            return Err(Refused::Gap { want: segment.next, got: chunk.chunk_index });
        }
        segment.next += 1;
        let mut bytes = std::mem::take(&mut segment.odd);
        bytes.extend_from_slice(&chunk.content);
        let frame = 2 * segment.channels;
        let whole = bytes.len() / frame * frame;
        segment.odd = bytes.split_off(whole);
        let incoming = whole / frame;
        if waiting + incoming as f64 / f64::from(segment.rate) > most as f64 {
            self.dropped += incoming as u64;
            return Err(Refused::Full(most));
        }
        let scale = 1.0 / (32768.0 * segment.channels as f32);
        segment.samples.extend(bytes.chunks_exact(frame).map(|frame| {
            let sum: i32 = frame.chunks_exact(2).map(|s| i32::from(i16::from_le_bytes([s[0], s[1]]))).sum();
            sum as f32 * scale
        }));
        Ok(())
    }

    /// A stream is complete, for whatever reason.
    pub(super) fn trailer(&mut self, trailer: &Trailer) {
        self.cleared.retain(|id| *id != trailer.stream_id);
        if let Some(segment) = self.segments.iter_mut().find(|s| s.id == trailer.stream_id) {
            segment.complete = true;
        }
    }

    /// The next piece of the oldest segment; `None` while there is nothing to hand on.
    pub(super) fn next(&mut self) -> Option<Piece> {
        let front = self.segments.front_mut()?;
        if front.samples.is_empty() {
            return front.complete.then(|| {
                self.segments.pop_front();
                Piece::End
            });
        }
        front.begun = true;
        let most = (front.rate as usize * PIECE_MS / 1000).min(front.samples.len());
        Some(Piece::Sound { rate: front.rate, samples: front.samples.drain(..most).collect() })
    }

    /// Throws away all that waits, and what is still to come of streams that are under way. Returns how many segments
    /// with sound in them nobody will hear anything of.
    pub(super) fn clear(&mut self) -> usize {
        let mut unheard = 0;
        for segment in self.segments.drain(..) {
            unheard += usize::from(!segment.begun && !segment.samples.is_empty());
            if !segment.complete {
                self.cleared.push_back(segment.id);
            }
        }
        while self.cleared.len() > MAX_SEGMENTS {
            self.cleared.pop_front();
        }
        unheard
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use livekit_protocol::data_stream::ByteHeader;

    fn header(id: &str, rate: &str, channels: &str) -> Header {
        Header {
            stream_id: id.into(),
            topic: TOPIC.into(),
            attributes: [("sample_rate".into(), rate.into()), ("num_channels".into(), channels.into())].into(),
            content_header: Some(ContentHeader::ByteHeader(ByteHeader { name: "AUDIO_1".into() })),
            ..Header::default()
        }
    }

    fn chunk(id: &str, index: u64, content: &[u8]) -> Chunk {
        Chunk { stream_id: id.into(), chunk_index: index, content: content.to_vec(), ..Chunk::default() }
    }

    fn pcm(samples: &[i16]) -> Vec<u8> {
        samples.iter().flat_map(|s| s.to_le_bytes()).collect()
    }

    fn trailer(id: &str) -> Trailer {
        Trailer { stream_id: id.into(), ..Trailer::default() }
    }

    #[test]
    fn segments_come_out_in_the_order_they_began_however_chunks_are_cut() {
        let mut streams = Streams::new(60);
        assert_eq!(streams.header(&header("a", "16000", "2")), Ok(true));
        assert_eq!(streams.header(&header("b", "8000", "1")), Ok(true));
        streams.chunk(&chunk("b", 0, &pcm(&[16384]))).unwrap();
        assert_eq!(streams.next(), None, "a began first");
        // Two stereo frames, cut inside of samples.
        let bytes = pcm(&[16384, -16384, 8192, 24576]);
        streams.chunk(&chunk("a", 0, &bytes[..3])).unwrap();
        streams.chunk(&chunk("a", 1, &bytes[3..7])).unwrap();
        assert_eq!(streams.next(), Some(Piece::Sound { rate: 16000, samples: vec![0.0] }));
        streams.chunk(&chunk("a", 2, &bytes[7..])).unwrap();
        // Sent again.
        streams.chunk(&chunk("a", 2, &bytes[7..])).unwrap();
        streams.trailer(&trailer("b"));
        assert_eq!(streams.next(), Some(Piece::Sound { rate: 16000, samples: vec![0.5] }));
        assert_eq!(streams.next(), None);
        streams.trailer(&trailer("a"));
        assert_eq!(streams.next(), Some(Piece::End));
        assert_eq!(streams.next(), Some(Piece::Sound { rate: 8000, samples: vec![0.5] }));
        assert_eq!(streams.next(), Some(Piece::End));
        assert_eq!(streams.next(), None);
    }

    #[test]
    fn long_segments_come_in_pieces_of_a_tenth_of_a_second() {
        let mut streams = Streams::new(60);
        streams.header(&header("a", "24000", "1")).unwrap();
        streams.chunk(&chunk("a", 0, &pcm(&vec![1; 5000]))).unwrap();
        let lengths: Vec<usize> = std::iter::from_fn(|| streams.next())
            .map(|p| match p {
                Piece::Sound { samples, .. } => samples.len(),
                Piece::End => 0,
            })
            .collect();
        assert_eq!(lengths, [2400, 2400, 200]);
    }

    #[test]
    fn what_is_cleared_is_gone_with_the_rest_of_its_streams() {
        let mut streams = Streams::new(60);
        for id in ["a", "b", "c"] {
            streams.header(&header(id, "16000", "1")).unwrap();
        }
        streams.chunk(&chunk("a", 0, &pcm(&[1; 4000]))).unwrap();
        streams.chunk(&chunk("b", 0, &pcm(&[1; 100]))).unwrap();
        assert!(streams.next().is_some());
        assert_eq!(streams.clear(), 1, "b was not heard; of a something was, c had nothing");
        streams.chunk(&chunk("a", 1, &pcm(&[1; 100]))).unwrap();
        streams.trailer(&trailer("a"));
        assert_eq!(streams.next(), None);
        streams.header(&header("d", "16000", "1")).unwrap();
        streams.chunk(&chunk("d", 0, &pcm(&[1]))).unwrap();
        assert!(matches!(streams.next(), Some(Piece::Sound { .. })));
    }

    #[test]
    fn what_is_no_speech_is_refused_or_ignored() {
        let mut streams = Streams::new(1);
        assert_eq!(streams.header(&Header { topic: "files".into(), ..header("x", "1", "1") }), Ok(false));
        for (rate, channels) in
            [("", "1"), ("x", "1"), ("7999", "1"), ("999999999999", "1"), ("16000", "0"), ("16000", "9"), ("-1", "1")]
        {
            assert!(
                matches!(streams.header(&header("x", rate, channels)), Err(Refused::Attribute(..))),
                "{rate} {channels}"
            );
        }
        assert_eq!(streams.header(&Header { compression: 1, ..header("x", "16000", "1") }), Err(Refused::Kind));
        assert_eq!(streams.header(&Header { content_header: None, ..header("x", "16000", "1") }), Err(Refused::Kind));
        streams.chunk(&chunk("nobody", 0, &[1, 2])).unwrap();
        streams.trailer(&trailer("nobody"));
        streams.header(&header("a", "8000", "1")).unwrap();
        assert_eq!(streams.header(&header("a", "8000", "1")), Err(Refused::Twice));
        streams.chunk(&chunk("a", 0, &pcm(&[1; 8000]))).unwrap();
        assert_eq!(streams.chunk(&chunk("a", 1, &pcm(&[1; 10]))), Err(Refused::Full(1)));
        assert_eq!(streams.dropped, 10);
        assert_eq!(streams.chunk(&chunk("a", u64::MAX, &[])), Err(Refused::Gap { want: 2, got: u64::MAX }));
        streams.chunk(&chunk("a", 2, &pcm(&[1; 10]))).unwrap();
        let pieces: Vec<Piece> = std::iter::from_fn(|| streams.next()).collect();
        assert_eq!(pieces.last(), Some(&Piece::End), "a gap ends the segment");
        for n in 0..MAX_SEGMENTS {
            streams.header(&header(&n.to_string(), "8000", "1")).unwrap();
        }
        assert_eq!(streams.header(&header("more", "8000", "1")), Err(Refused::Many));
    }
}
