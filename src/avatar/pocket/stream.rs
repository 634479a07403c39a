//! One face of the pocket engine.

use super::{Shared, matte::solid};
use crate::{
    avatar::{
        AvatarError, Controls, Direction, Intake, Liveliness, MatteWish, OpenOptions, Result, Stream, Tone,
        intonation::Intonation, noise::normal,
    },
    media::{AudioBlock, Epoch, Frame, FrameBlock, MediaTime, Pixels, SPEECH_RATE, StageTimes},
    model::{
        self,
        audio::{AHEAD, AudioState, BANDS, FEATURES, MelState},
        dit::StreamState,
        vae::patch::{FRAMES, LATENT, Memory},
    },
};
use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

/// Everything one face remembers.
pub(super) struct Face {
    shared: Arc<Shared>,
    seed: u64,
    intake: Intake,
    mel: MelState,
    hearing: AudioState,
    /// Mel frames that wait until a block needs them: the audio net's weights then pass by once a block, not once for
    /// every few milliseconds of speech.
    waiting: Vec<f32>,
    /// Mel frames so far, and how many make the audio net run next.
    mel_frames: usize,
    wanted: usize,
    /// Features that are final and not yet used, `[frames][192]`.
    features: VecDeque<f32>,
    intonation: Intonation,
    /// Of complete frames that are not yet used.
    tones: VecDeque<Tone>,
    life: Liveliness,
    direction: Direction,
    state: StreamState,
    memory: Memory,
    matte: MatteWish,
    /// The next block.
    index: u64,
    /// Time spent on features since the last block.
    listening: Duration,
    /// Features are complete to the end.
    complete: bool,
}

impl Face {
    pub(super) fn new(shared: Arc<Shared>, state: StreamState, options: &OpenOptions) -> Face {
        let ([h, w], seed) = (shared.grid, options.seed);
        Face {
            seed,
            intake: Intake::default(),
            mel: MelState::default(),
            hearing: shared.net.start(),
            waiting: Vec::new(),
            mel_frames: 0,
            wanted: 2 * FRAMES + shared.mel_ahead,
            features: VecDeque::new(),
            intonation: Intonation::default(),
            tones: VecDeque::new(),
            direction: options.direction.clone(),
            life: Liveliness::new(seed, shared.control_range),
            state,
            memory: Memory::new(&shared.decoder, h, w),
            matte: options.matte.clone(),
            index: 0,
            listening: Duration::ZERO,
            complete: false,
            shared,
        }
    }

    /// Features and levels of some more samples.
    fn hear(&mut self, speech: &[f32]) {
        let began = Instant::now();
        let mel = self.shared.mel.push(&mut self.mel, speech);
        self.mel_frames += mel.len() / BANDS;
        self.waiting.extend(mel);
        if self.mel_frames >= self.wanted {
            self.understand();
            let blocks = (self.mel_frames - self.shared.mel_ahead) / (2 * FRAMES);
            self.wanted = (blocks + 1) * 2 * FRAMES + self.shared.mel_ahead;
        }
        self.tones.extend(self.intonation.push(speech));
        self.listening += began.elapsed();
    }

    /// Features of the mel frames that wait.
    fn understand(&mut self) {
        let mel = std::mem::take(&mut self.waiting);
        self.features.extend(self.shared.net.push(&mut self.hearing, &mel));
    }

    /// The latent of the next block.
    fn generate(&mut self, controls: &[Controls]) -> model::Result<Vec<f32>> {
        let [h, w] = self.shared.grid;
        let noise = normal(self.seed, self.index, LATENT * h * w);
        let features = self.features.drain(..FRAMES * FEATURES);
        self.shared.imagine(&mut self.state, features, controls, noise)
    }
}

impl Stream for Face {
    fn push(&mut self, audio: &AudioBlock) -> Result<()> {
        let mut clean = Vec::new();
        self.intake.take(audio, &mut clean)?;
        self.hear(&clean);
        Ok(())
    }

    fn pull(&mut self) -> Result<Option<FrameBlock>> {
        let ready = if self.complete { !self.features.is_empty() } else { self.features.len() >= FRAMES * FEATURES };
        if !ready {
            return Ok(None);
        }
        self.life.amount(self.direction.liveliness());
        self.direction.take().into_iter().for_each(|gesture| self.life.act(gesture));
        let controls: Vec<Controls> = self.tones.drain(..FRAMES).map(|tone| self.life.next(tone)).collect();
        let began = Instant::now();
        let block = self.index;
        let latent = self.generate(&controls).map_err(|e| AvatarError::Device {
            block,
            stage: "generation",
            source: e.into(),
        })?;
        let generated = Instant::now();
        let s = &self.shared;
        let pictures = s.decoder.decode(&s.pool, &latent, &mut self.memory);
        let mattes = if self.matte.get() { s.decoder.mattes(&s.pool, &self.memory) } else { None };
        let mattes = mattes.map(|all| all.map(|matte| solid(&matte, s.geometry.width as usize)));
        let stages = StageTimes {
            features: std::mem::take(&mut self.listening),
            generation: generated - began,
            decode: generated.elapsed(),
            busiest: None,
        };
        let g = &s.geometry;
        let first = g.first_frame(block);
        let frame = |(i, rgb): (usize, Arc<[u8]>)| Frame {
            at: self.intake.origin() + MediaTime::from_units(first as i64 + i as i64, g.fps),
            width: g.width,
            height: g.height,
            pixels: Pixels::Rgb(rgb),
            matte: mattes.as_ref().map(|m| m[i].clone()),
        };
        let frames = pictures.into_iter().enumerate().map(frame).collect();
        self.index += 1;
        Ok(Some(FrameBlock { epoch: Epoch::default(), index: block, frames, stages, controls }))
    }

    fn cut(&mut self) -> bool {
        if self.complete {
            return false;
        }
        // Hearing begins anew, as at the start of a stream; picture, noise and liveliness go on.
        let s = &self.shared;
        (self.mel, self.hearing) = (MelState::default(), s.net.start());
        (self.mel_frames, self.wanted) = (0, 2 * FRAMES + s.mel_ahead);
        self.waiting.clear();
        self.features.clear();
        self.intonation = Intonation::default();
        self.tones.clear();
        let each = u64::from(SPEECH_RATE / s.geometry.fps);
        self.intake.rewind(s.geometry.first_frame(self.index) * each);
        true
    }

    fn finish(&mut self) -> Result<()> {
        if self.intake.is_finished() {
            return Ok(());
        }
        self.intake.finish();
        // Silence fills the last block, then every layer gets the zeros that stand for the end of the stream.
        let block = FRAMES * (SPEECH_RATE / self.shared.geometry.fps) as usize;
        let samples = self.intake.samples() as usize;
        self.hear(&vec![0.0; samples.next_multiple_of(block) - samples]);
        let began = Instant::now();
        self.waiting.extend(self.shared.mel.push(&mut self.mel, &[0.0; AHEAD]));
        self.understand();
        if samples > 0 {
            self.features.extend(self.shared.net.finish(&mut self.hearing));
        }
        self.listening += began.elapsed();
        self.complete = true;
        Ok(())
    }
}

impl Drop for Face {
    fn drop(&mut self) {
        let repaired = self.intake.repaired();
        if repaired > 0 {
            tracing::warn!(repaired, "samples of speech were not numbers and became silence");
        }
    }
}
