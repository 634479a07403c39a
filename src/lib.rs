//! Loquent: speech in, a speaking presenter out, live.
//!
//! A WebRTC peer sends a voice; Loquent resamples it, cuts it into windows, runs few-step, block-wise
//! speech-to-video diffusion with the last frames as context, and streams H.264 video back with the voice exactly in
//! time. The same engine renders files offline.
//!
//! # Rooms
//!
//! Read top to bottom: that is also the direction of `use`. A room may use rooms below it that stand after its arrow,
//! and nothing else (`tests/it/tidy.rs` keeps this true). Each room has a façade (`mod.rs`); nobody reaches past it.
//!
//! | room | what it is | may use |
//! | --- | --- | --- |
//! | [`cli`] | the commands; the only place with `anyhow`, the environment, exit codes | everything |
//! | [`config`] | composes each room's `Config`; load, validate, print | their `Config` types |
//! | [`server`] | axum: who may do what, limits, API, pages, TLS, health, metrics, shutdown | cluster, livekit, net, session, voice, engine, avatar, codec, media, edge, telemetry |
//! | [`cluster`] | several processes as one service: who is there, who has room, requests between them, over NATS | telemetry |
//! | [`livekit`] | a worker in LiveKit rooms: signalling, speech by byte streams, calls | net, session, media, edge, telemetry |
//! | [`net`] | WebRTC: peers, SDP, ICE, tracks, data channel, congestion | session, media, edge, telemetry |
//! | [`session`] | one conversation: state machine, ingest, playout | engine, avatar, codec, media, edge, telemetry |
//! | [`voice`] | text to sound: a local command or a speech endpoint, sentence by sentence | media, edge, telemetry |
//! | [`engine`] | one thread per engine: slots, admission, health, warm-up, building anew after a failure | avatar, media, edge, telemetry |
//! | [`avatar`] | the `Generator` trait and its implementations | model, codec, media |
//! | [`model`] | the networks as maths; candle lives here | (candle only) |
//! | [`codec`] | Opus, H.264, resampling, colour, audio and video files, pictures | media |
//! | [`media`] | the words everyone speaks: time, sound, pictures | (std only) |
//! | [`edge`] | bounded queues with a policy and a counter | (tokio::sync only) |
//! | [`telemetry`] | tracing set-up, metric names | (leaf) |
//!
//! ```text
//!  browser ─RTP─▶ net ─▶ session::ingest ─▶ engine ─▶ avatar ─▶ model
//!                          (opus, rubato)    device thread   audio net → dit ⟲ rings → vae
//!  viewers ◀─RTP─ net ◀─ session::playout ◀── engine ◀──────────────┘
//!                          (I420, h264, opus)
//!             session::machine stands beside the path and decides; it carries no frames
//! ```
//!
//! # Invariants
//!
//! 1. `media` imports nothing of ours. `model` has no tokio, no clock, no sockets; files only in `model::weights`.
//! 2. candle is named only in `model` and `avatar`; webrtc only in `net`; axum only in `server`; NATS only in `cluster`;
//!    opus, openh264, rubato only in `codec`.
//! 3. `Instant::now()` is called only at edges; all decisions take `now`.
//! 4. The voice is the clock: video follows audio, and only video is held or skipped, before encoding.
//! 5. Streaming equals whole: however the audio is cut, the concatenated output is the same.
//! 6. A session's mutable state is owned in one value; ending it is `drop`.
//! 7. Every edge is bounded, has a policy and a counter.
//! 8. Work begins after admission.
//! 9. A dead engine is seen: health turns, sessions close with a reason.
//! 10. The whole service runs without a GPU.
//! 11. Offline and live are one pipeline with two clocks.
//! 12. Configuration is read once, complete, before anything starts.
//! 13. Wire types (serde, protobuf) live in `server`, `net`, `livekit` and `cluster`; inner types are free to change.
//! 14. The pocket model and the 14B model are two configurations of one implementation.
//!
//! # Where do I go if…
//!
//! | I want to… | room |
//! | --- | --- |
//! | change picture quality, steps, cache length | `model::dit`, `model::sampler`, a profile in `config/` |
//! | make one op faster | `model::kernels` (write the plain twin first) |
//! | load a different checkpoint | `model::weights` |
//! | change how the large engine hears, cuts and shows | `avatar::s2v` |
//! | fix lips that lead or lag the voice | `session::playout` |
//! | change what an interruption does | `session::machine` |
//! | admit more people per device | `engine` |
//! | share a face's work among several devices | `model::ranks` (who does what, what is sent), `avatar::crew` (the threads) |
//! | fix connection trouble | `net` |
//! | change how agents in LiveKit rooms are served | `livekit`, `server::livekit` for the calls that start it |
//! | change where a new session goes, or what a dead machine means | `cluster`; which requests travel: `server::spread` |
//! | add an HTTP route | `server`; its right stands beside it (`server::access`) |
//! | add a setting | the room's own `Config`, then `config/loquent.toml` (a test reminds you) |
//! | retrain or judge the pocket model | `pocket/` outside `src` |

pub mod avatar;
pub mod cli;
pub mod cluster;
pub mod codec;
pub mod config;
pub mod edge;
pub mod engine;
pub mod livekit;
pub mod media;
pub mod model;
pub mod net;
pub mod server;
pub mod session;
pub mod telemetry;
pub mod voice;
