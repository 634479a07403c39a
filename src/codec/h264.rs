//! H.264 by openh264, with the settings that live speech needs: constrained baseline, even frame sizes, no frozen
//! pictures, a bitrate that can change between any two frames, and a keyframe when asked.

use super::CodecError;
use crate::media::{I420, MediaTime};
use openh264::{
    OpenH264API, Timestamp,
    encoder::{
        BitRate, Complexity, Encoder, EncoderConfig, FrameRate, FrameType, IntraFramePeriod, Level, Profile,
        RateControlMode, SpsPpsStrategy, UsageType, VuiConfig,
    },
    formats::YUVSlices,
};

/// What an encoder is made for.
#[derive(Clone, Copy, Debug)]
pub struct H264Config {
    /// Pixels; even, 16 to 2 160.
    pub width: u32,
    pub height: u32,
    /// Frames per second the bitrate is spread over; fewer may come.
    pub fps: f32,
    /// Bits per second to begin with.
    pub bitrate: u32,
    /// The highest bitrate [`VideoEncoder::set_bitrate`] will be asked for; decides the H.264 level.
    pub max_bitrate: u32,
}

/// One access unit, Annex B, parameter sets in front of every keyframe.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    pub data: Vec<u8>,
    pub keyframe: bool,
}

/// One picture stream's encoder. About 1 ms per 512 × 512 frame; stays on one thread.
pub struct VideoEncoder {
    encoder: Encoder,
    config: H264Config,
    /// Bitrate wanted and bitrate the encoder has.
    wanted: u32,
    applied: u32,
    begun: bool,
    last_at_ms: u64,
    origin: Option<MediaTime>,
}

fn failed(doing: &'static str) -> impl Fn(openh264::Error) -> CodecError {
    move |e| CodecError::H264 { doing, why: e.to_string() }
}

impl VideoEncoder {
    pub fn new(config: H264Config) -> Result<Self, CodecError> {
        let H264Config { width, height, fps, .. } = config;
        let wrong = |what: String| Err(CodecError::Picture(what));
        if !(16..=2160).contains(&width) || !(16..=2160).contains(&height) || width % 2 != 0 || height % 2 != 0 {
            return wrong(format!("H.264 needs even sides from 16 to 2160 pixels, not {width}×{height}"));
        }
        if !(0.5..=120.0).contains(&fps) {
            return wrong(format!("H.264 at {fps} frames a second is out of range (0.5 to 120)"));
        }
        let max_bitrate = config.max_bitrate.max(config.bitrate).clamp(20_000, 50_000_000);
        let bitrate = config.bitrate.clamp(20_000, max_bitrate);
        let config = H264Config { bitrate, max_bitrate, ..config };
        // Adaptive quantisation and background detection freeze the picture and then send it in bursts; scene changes
        // and periodic keyframes cost a quarter of a second of bitrate each: keyframes come only when asked.
        let settings = EncoderConfig::new()
            .bitrate(BitRate::from_bps(bitrate))
            .max_frame_rate(FrameRate::from_hz(fps))
            .rate_control_mode(RateControlMode::Bitrate)
            .skip_frames(false)
            .usage_type(UsageType::CameraVideoRealTime)
            .sps_pps_strategy(SpsPpsStrategy::ConstantId)
            .profile(Profile::Baseline)
            .level(level_for(&config))
            .complexity(Complexity::Low)
            .num_threads(1)
            .intra_frame_period(IntraFramePeriod::from_num_frames(0))
            .scene_change_detect(false)
            .adaptive_quantization(false)
            .background_detection(false)
            .vui(VuiConfig::bt601());
        let mut encoder = Encoder::with_api_config(OpenH264API::from_source(), settings).map_err(failed("encoder"))?;
        // The library prints a warning to stderr for each encoder (that we do not let it skip frames: we skip before
        // encoding); its errors come back as codes.
        let mut quiet = openh264_sys2::WELS_LOG_QUIET;
        // SAFETY: the trace level may be set before initialisation, is read as an int during the call and not kept.
        unsafe { encoder.raw_api().set_option(openh264_sys2::ENCODER_OPTION_TRACE_LEVEL, (&raw mut quiet).cast()) };
        Ok(VideoEncoder {
            encoder,
            config,
            wanted: bitrate,
            applied: bitrate,
            begun: false,
            last_at_ms: 0,
            origin: None,
        })
    }

    pub fn config(&self) -> &H264Config {
        &self.config
    }

    /// Bits per second from the next frame on, clamped to 20 000 … `max_bitrate`.
    pub fn set_bitrate(&mut self, bitrate: u32) {
        self.wanted = bitrate.clamp(20_000, self.config.max_bitrate);
    }

    /// Encodes the frame of media time `at`; times should rise. The first frame is a keyframe in any case.
    pub fn encode(&mut self, picture: &I420, at: MediaTime, force_idr: bool) -> Result<EncodedFrame, CodecError> {
        let (w, h) = (self.config.width as usize, self.config.height as usize);
        if (picture.width as usize, picture.height as usize) != (w, h)
            || picture.y.len() != w * h
            || picture.u.len() != w * h / 4
            || picture.v.len() != w * h / 4
        {
            let (pw, ph) = (picture.width, picture.height);
            return Err(CodecError::Picture(format!("the encoder was made for {w}×{h}, the picture is {pw}×{ph}")));
        }
        if self.begun {
            // Before the first frame the library has no context: options would be lost and a forced IDR crash.
            self.apply_bitrate()?;
            if force_idr {
                self.encoder.force_intra_frame();
            }
        }
        // Rate control works from real timestamps in milliseconds, which must rise.
        let origin = *self.origin.get_or_insert(at);
        let ms = ((at - origin).ticks().max(0) / (MediaTime::TICKS_PER_SECOND / 1000)) as u64;
        let ms = if self.begun { ms.max(self.last_at_ms + 1) } else { ms };
        self.last_at_ms = ms;
        let source = YUVSlices::new((&picture.y, &picture.u, &picture.v), (w, h), (w, w / 2, w / 2));
        let stream = self.encoder.encode_at(&source, Timestamp::from_millis(ms)).map_err(failed("encoding"))?;
        let keyframe = stream.frame_type() == FrameType::IDR;
        let data = stream.to_vec();
        if data.is_empty() {
            return Err(CodecError::H264 { doing: "encoding", why: "the encoder gave no data for a frame".into() });
        }
        self.begun = true;
        Ok(EncodedFrame { data, keyframe })
    }

    fn apply_bitrate(&mut self) -> Result<(), CodecError> {
        if self.wanted == self.applied {
            return Ok(());
        }
        // The library refuses a bitrate above the maximum it was started with, so the maximum goes first.
        let most = self.config.max_bitrate.saturating_add(1000);
        self.set_option(openh264_sys2::ENCODER_OPTION_MAX_BITRATE, openh264_sys2::SPATIAL_LAYER_0, most)?;
        self.set_option(openh264_sys2::ENCODER_OPTION_BITRATE, openh264_sys2::SPATIAL_LAYER_ALL, self.wanted)?;
        self.applied = self.wanted;
        Ok(())
    }

    fn set_option(
        &mut self,
        option: openh264_sys2::ENCODER_OPTION,
        layer: openh264_sys2::LAYER_NUM,
        bits: u32,
    ) -> Result<(), CodecError> {
        let mut info = openh264_sys2::SBitrateInfo { iLayer: layer, iBitrate: bits as i32 };
        // SAFETY: the encoder is initialised (`begun`), `info` is the struct this option expects and lives through the
        // call, which copies it; neither option touches anything the wrapper keeps.
        let code = unsafe { self.encoder.raw_api().set_option(option, (&raw mut info).cast()) };
        if code == 0 {
            Ok(())
        } else {
            let why = format!("{bits} bit/s was refused with code {code}");
            Err(CodecError::H264 { doing: "changing the bitrate", why })
        }
    }
}

/// The lowest level that holds frame size, macroblock rate and bitrate (ITU-T H.264 table A-1, baseline), from 3.0 up:
/// below that old decoders gain nothing, and 3.0 and 3.1 both fit the negotiated 42e01f.
fn level_for(config: &H264Config) -> Level {
    let blocks = config.width.div_ceil(16) * config.height.div_ceil(16);
    let rate = (blocks as f32 * config.fps).ceil() as u32;
    let kbps = config.max_bitrate / 1000 + 1;
    const LEVELS: [(u32, u32, u32, Level); 6] = [
        (1_620, 40_500, 10_000, Level::Level_3_0),
        (3_600, 108_000, 14_000, Level::Level_3_1),
        (5_120, 216_000, 20_000, Level::Level_3_2),
        (8_192, 245_760, 50_000, Level::Level_4_1),
        (22_080, 589_824, 135_000, Level::Level_5_0),
        (36_864, 983_040, 240_000, Level::Level_5_1),
    ];
    LEVELS.iter().find(|l| blocks <= l.0 && rate <= l.1 && kbps <= l.2).map_or(Level::Level_5_2, |l| l.3)
}
