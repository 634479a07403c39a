//! Opus by libopus: the microphone's packets to samples (with in-band repair and concealment), the voice to packets.

use super::CodecError;
use opus::{Application, Bitrate, Channels, Decoder, Encoder, Signal};

/// Opus always counts time at 48 kHz, whatever rate it is decoded to.
pub const OPUS_RATE: u32 = 48_000;

/// Samples of one voice packet: 20 ms at 48 kHz.
pub const VOICE_FRAME: usize = 960;

/// The longest stretch one Opus packet or one concealment may hold, in milliseconds (RFC 6716 §2.1.4).
const LONGEST_MS: u32 = 120;

fn failed(doing: &'static str) -> impl Fn(opus::Error) -> CodecError {
    move |e| CodecError::Opus { doing, why: e.description().to_string() }
}

/// Decodes one sender's packets to mono at a chosen rate. Stereo packets are mixed down by libopus.
pub struct SpeechDecoder {
    decoder: Decoder,
    rate: u32,
    scratch: Vec<f32>,
}

impl SpeechDecoder {
    /// `rate`: 8, 12, 16, 24 or 48 kHz, whatever the sender encoded at.
    pub fn new(rate: u32) -> Result<Self, CodecError> {
        let decoder = Decoder::new(rate, Channels::Mono).map_err(failed("decoder"))?;
        Ok(SpeechDecoder { decoder, rate, scratch: vec![0.0; (rate * LONGEST_MS / 1000) as usize] })
    }

    /// Samples per second that come out.
    pub fn rate(&self) -> u32 {
        self.rate
    }

    /// One packet, in order: 2.5 to 120 ms of samples in −1..1.
    /// An empty packet is refused: libopus would invent 120 ms for it.
    pub fn decode(&mut self, packet: &[u8]) -> Result<Vec<f32>, CodecError> {
        if packet.is_empty() {
            return Err(CodecError::Opus { doing: "decoding", why: "an empty packet holds no sound".into() });
        }
        self.run("decoding", packet, self.scratch.len(), false)
    }

    /// Repairs the stretch just before `next` from the low-rate copy inside `next`; where `next` carries none, libopus
    /// conceals. `samples` is the length of what was lost. Decode `next` itself afterwards.
    pub fn fec(&mut self, next: &[u8], samples: usize) -> Result<Vec<f32>, CodecError> {
        if next.is_empty() {
            return self.conceal(samples);
        }
        let samples = self.whole(samples)?;
        self.run("repairing", next, samples, true)
    }

    /// Continues the voice where nothing arrived. libopus fades by itself, but not to silence: the caller bounds it.
    pub fn conceal(&mut self, samples: usize) -> Result<Vec<f32>, CodecError> {
        let samples = self.whole(samples)?;
        self.run("concealing", &[], samples, false)
    }

    /// Length of a packet in samples at this decoder's rate, from its first bytes.
    pub fn samples_in(&self, packet: &[u8]) -> Result<usize, CodecError> {
        if packet.is_empty() {
            return Err(CodecError::Opus { doing: "reading a packet", why: "it is empty".into() });
        }
        opus::packet::get_nb_samples(packet, self.rate).map_err(failed("reading a packet"))
    }

    /// libopus repairs and conceals in steps of 2.5 ms, at most 120 ms.
    fn whole(&self, samples: usize) -> Result<usize, CodecError> {
        let step = (self.rate / 400) as usize;
        if samples == 0 || samples % step != 0 || samples > self.scratch.len() {
            let why = format!("{samples} samples is not a multiple of {step} up to {}", self.scratch.len());
            return Err(CodecError::Opus { doing: "concealing", why });
        }
        Ok(samples)
    }

    fn run(&mut self, doing: &'static str, packet: &[u8], room: usize, fec: bool) -> Result<Vec<f32>, CodecError> {
        // The room given to libopus decides how much it conceals, so it is exact for repairs.
        let n = self.decoder.decode_float(packet, &mut self.scratch[..room], fec).map_err(failed(doing))?;
        let n = n.min(room);
        // A hostile packet may decode to anything finite; what leaves here stays in range and is never NaN.
        Ok(self.scratch[..n].iter().map(|s| if s.is_finite() { s.clamp(-1.0, 1.0) } else { 0.0 }).collect())
    }
}

/// Encodes the voice: 48 kHz mono, 20 ms a packet, with in-band repair for the packet before.
pub struct VoiceEncoder {
    encoder: Encoder,
    out: Vec<u8>,
}

impl VoiceEncoder {
    /// `bitrate` in bits per second (32 000 is transparent for one voice); `loss_percent` is how much loss the in-band
    /// repair is dimensioned for, 0 switches it off.
    pub fn new(bitrate: u32, loss_percent: u8) -> Result<Self, CodecError> {
        let mut encoder = Encoder::new(OPUS_RATE, Channels::Mono, Application::Voip).map_err(failed("encoder"))?;
        encoder.set_signal(Signal::Voice).map_err(failed("encoder"))?;
        // 5 of 10: half the time of the default at no audible cost for one voice at this rate.
        encoder.set_complexity(5).map_err(failed("encoder"))?;
        let mut this = VoiceEncoder { encoder, out: vec![0; 1500] };
        this.set_bitrate(bitrate)?;
        this.set_loss(loss_percent)?;
        Ok(this)
    }

    /// Samples by which the decoded voice comes later than what was encoded (an MP4 writer's pre-skip), at 48 kHz.
    pub fn look_ahead(&mut self) -> Result<usize, CodecError> {
        Ok(self.encoder.get_lookahead().map_err(failed("encoder"))?.max(0) as usize)
    }

    pub fn set_bitrate(&mut self, bitrate: u32) -> Result<(), CodecError> {
        let bits = bitrate.clamp(6_000, 510_000) as i32;
        self.encoder.set_bitrate(Bitrate::Bits(bits)).map_err(failed("setting the bitrate"))
    }

    pub fn set_loss(&mut self, percent: u8) -> Result<(), CodecError> {
        self.encoder.set_inband_fec(percent > 0).map_err(failed("setting repair"))?;
        self.encoder.set_packet_loss_perc(i32::from(percent.min(100))).map_err(failed("setting repair"))
    }

    /// Exactly [`VOICE_FRAME`] samples to one packet.
    pub fn encode(&mut self, samples: &[f32]) -> Result<Vec<u8>, CodecError> {
        if samples.len() != VOICE_FRAME {
            let why = format!("{} samples given, {VOICE_FRAME} needed", samples.len());
            return Err(CodecError::Opus { doing: "encoding", why });
        }
        let n = self.encoder.encode_float(samples, &mut self.out).map_err(failed("encoding"))?;
        Ok(self.out[..n.min(self.out.len())].to_vec())
    }
}
