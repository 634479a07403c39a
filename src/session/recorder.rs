//! A sink that writes what it hears and sees into fragmented MP4 files.
//!
//! | edge | capacity | when full |
//! | --- | --- | --- |
//! | session → file | [`QUEUE`] pictures and packets | pictures dropped until the next keyframe, packets dropped; counted |
//!
//! One named thread per recording writes and waits for the disk; the session never does. What cannot be written ends
//! the recording with a reason and leaves the session alone. A change of the picture's size begins a new part.

use super::{EncodedAudio, EncodedVideo, LinkOut, LinkStats};
use crate::{
    codec::{
        VoiceEncoder,
        fragments::{FragmentSpec, FragmentWriter},
        marks::{Mark, rfc3339},
        mp4::Mp4Error,
    },
    media::MediaTime,
};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime},
};

/// Pictures and packets that may wait for the disk: seven seconds.
const QUEUE: usize = 512;
/// A keyframe is asked for when the newest is this old, so that none is further than two seconds from the next: players
/// seek to them, a damaged file goes on at them, and each says that the picture is computer-made.
const KEYFRAMES: MediaTime = MediaTime::from_millis(1800);

/// What is recorded, and where to.
#[derive(Clone, Debug)]
pub struct RecordingSpec {
    pub folder: PathBuf,
    /// File name without ending; parts after the first get `.2`, `.3`, …
    pub name: String,
    /// The recording ends when so much is written; 0 = no limit.
    pub max_bytes: u64,
    pub mark: Mark,
}

/// How a recording stands.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RecordingStatus {
    /// File names of its parts, in order.
    pub parts: Vec<String>,
    pub bytes: u64,
    pub length: Duration,
    /// Pictures that were not written because the disk was too slow.
    pub dropped: u64,
    pub over: bool,
    /// Why it ended before it was told to.
    pub error: Option<String>,
}

enum Item {
    Video(EncodedVideo),
    Audio(EncodedAudio),
}

struct Shared {
    status: Mutex<RecordingStatus>,
    dropped: AtomicU64,
    /// A picture was lost: nothing can be decoded before the next keyframe.
    broken: AtomicBool,
    keyframe: Box<dyn Fn() + Send + Sync>,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, RecordingStatus> {
        self.status.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A recording under way. Ends by [`Recorder::close`] or when it is dropped.
pub struct Recorder {
    shared: Arc<Shared>,
    /// `None` once it was told to end.
    items: Mutex<Option<SyncSender<Item>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Recorder {
    /// Creates the folder and the first file. `keyframe` asks the session for one.
    ///
    /// # Errors
    /// The system's, with the path: a folder or file that cannot be written.
    pub fn start(spec: RecordingSpec, keyframe: impl Fn() + Send + Sync + 'static) -> Result<Recorder, Mp4Error> {
        let io = |path: &Path, source| Mp4Error::Io { path: path.display().to_string(), source };
        fs::create_dir_all(&spec.folder).map_err(|e| io(&spec.folder, e))?;
        let shared = Arc::new(Shared {
            status: Mutex::default(),
            dropped: AtomicU64::new(0),
            broken: AtomicBool::new(false),
            keyframe: Box::new(keyframe),
        });
        // The session's voice is encoded like this one; what it puts before the voice depends on nothing else.
        let voice = VoiceEncoder::new(32_000, 0).and_then(|mut e| e.look_ahead());
        let pre_skip = voice.map_err(|e| Mp4Error::Index(e.to_string()))? as u16;
        let mut work =
            Work { spec, pre_skip, shared: shared.clone(), file: None, finished: 0, length: MediaTime::ZERO };
        let first = work.create()?;
        let (items, received) = sync_channel(QUEUE);
        let name = format!("record-{}", work.spec.mark.session);
        let thread = std::thread::Builder::new()
            .name(name)
            .spawn(move || work.run(first, &received))
            .map_err(|e| io(Path::new("a thread"), e))?;
        Ok(Recorder { shared, items: Mutex::new(Some(items)), thread: Mutex::new(Some(thread)) })
    }

    pub fn status(&self) -> RecordingStatus {
        let mut status = self.shared.status().clone();
        status.dropped = self.shared.dropped.load(Ordering::Relaxed);
        status
    }

    /// Ends it and waits until the file is complete: blocks for as long as the disk needs.
    pub fn finish(&self) {
        self.close();
        let thread = self.thread.lock().unwrap_or_else(|e| e.into_inner()).take();
        if thread.is_some_and(|t| t.join().is_err()) {
            tracing::error!("a recorder's thread ended by a panic");
        }
    }

    fn put(&self, item: Item) -> bool {
        let items = self.items.lock().unwrap_or_else(|e| e.into_inner());
        match items.as_ref().map(|i| i.try_send(item)) {
            Some(Err(TrySendError::Full(_))) => {
                self.shared.dropped.fetch_add(1, Ordering::Relaxed);
                false
            }
            _ => true,
        }
    }
}

impl LinkOut for Recorder {
    fn video(&self, video: EncodedVideo, _: Instant) {
        if self.shared.broken.load(Ordering::Relaxed) && !video.keyframe {
            self.shared.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let taken = self.put(Item::Video(video));
        if self.shared.broken.swap(!taken, Ordering::Relaxed) != !taken && !taken {
            (self.shared.keyframe)();
        }
    }

    fn audio(&self, audio: EncodedAudio, _: Instant) {
        self.put(Item::Audio(audio));
    }

    fn message(&self, _: String) {}

    fn stats(&self) -> LinkStats {
        LinkStats::default()
    }

    fn close(&self) {
        self.items.lock().unwrap_or_else(|e| e.into_inner()).take();
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.finish();
    }
}

/// The thread's own.
struct Work {
    spec: RecordingSpec,
    pre_skip: u16,
    shared: Arc<Shared>,
    file: Option<FragmentWriter<File>>,
    /// Bytes and length of parts that are complete.
    finished: u64,
    length: MediaTime,
}

impl Work {
    /// Creates the next part's file.
    fn create(&mut self) -> Result<File, Mp4Error> {
        let mut status = self.shared.status();
        let part = status.parts.len() + 1;
        let name = if part == 1 { format!("{}.mp4", self.spec.name) } else { format!("{}.{part}.mp4", self.spec.name) };
        let path = self.spec.folder.join(&name);
        let file = File::options().write(true).create_new(true).open(&path);
        let file = file.map_err(|source| Mp4Error::Io { path: path.display().to_string(), source })?;
        status.parts.push(name);
        Ok(file)
    }

    fn run(mut self, first: File, items: &Receiver<Item>) {
        let mut waiting = Some(first);
        let (mut keyframe, mut last_audio, mut span) = (None, None, MediaTime::from_millis(40));
        let over = loop {
            match items.recv_timeout(Duration::from_secs(1)) {
                Err(RecvTimeoutError::Disconnected) => break Ok(()),
                Err(RecvTimeoutError::Timeout) => {}
                Ok(Item::Audio(audio)) => {
                    if let Some(file) = &mut self.file {
                        file.audio(audio.at, &audio.data, audio.duration);
                    }
                    last_audio = Some(audio);
                }
                Ok(Item::Video(video)) => {
                    span = video.duration;
                    let newest = keyframe.get_or_insert(video.at);
                    if video.keyframe || video.at - *newest >= KEYFRAMES {
                        // Asked for once; if it does not come, again after as long.
                        *newest = video.at;
                        if !video.keyframe {
                            (self.shared.keyframe)();
                        }
                    }
                    if let Err(error) = self.video(&video, &mut waiting, last_audio.as_ref()) {
                        break Err(error);
                    }
                }
            }
            if self.spec.max_bytes > 0 && self.bytes() >= self.spec.max_bytes {
                let most = self.spec.max_bytes >> 20;
                break Err(Mp4Error::Full(format!("it has reached its largest size, {most} MB")));
            }
        };
        let ended = self.end(span);
        let mut status = self.shared.status();
        if waiting.is_some()
            && let Some(name) = status.parts.pop()
        {
            // Not one picture came.
            let _ = fs::remove_file(self.spec.folder.join(name));
        }
        status.over = true;
        status.error = over.and(ended).err().map(|e| e.to_string());
        if let Some(error) = &status.error {
            tracing::warn!(session = self.spec.mark.session, "a recording ended early: {error}");
        }
    }

    fn bytes(&self) -> u64 {
        self.finished + self.file.as_ref().map_or(0, FragmentWriter::written)
    }

    fn video(
        &mut self,
        video: &EncodedVideo,
        waiting: &mut Option<File>,
        last_audio: Option<&EncodedAudio>,
    ) -> Result<(), Mp4Error> {
        loop {
            let Some(file) = &mut self.file else {
                if !video.keyframe {
                    return Ok(());
                }
                let disk = match waiting.take() {
                    Some(first) => first,
                    None => self.create()?,
                };
                let spec = FragmentSpec {
                    width: video.width,
                    height: video.height,
                    pre_skip: self.pre_skip,
                    mark: self.spec.mark.clone(),
                    when: rfc3339(SystemTime::now()),
                };
                let file = self.file.insert(FragmentWriter::new(disk, spec)?);
                if let Some(audio) = last_audio {
                    file.audio(audio.at, &audio.data, audio.duration);
                }
                continue;
            };
            match file.video(video.at, &video.data, video.keyframe) {
                // Another size: another part, which this keyframe begins.
                Err(Mp4Error::Changed) => self.end(video.duration)?,
                done => {
                    let flushed = done?;
                    if flushed {
                        let (bytes, length) = (
                            self.bytes(),
                            self.length + self.file.as_ref().map_or(MediaTime::ZERO, FragmentWriter::length),
                        );
                        let mut status = self.shared.status();
                        (status.bytes, status.length) = (bytes, length.as_duration());
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Completes the part that is being written.
    fn end(&mut self, last: MediaTime) -> Result<(), Mp4Error> {
        let Some(mut file) = self.file.take() else { return Ok(()) };
        self.length += file.length() + last;
        let done = file.finish(last).and_then(|()| {
            let disk = file.into_disk();
            let size = disk.metadata().map(|m| m.len());
            disk.sync_all().and(size).map_err(|source| Mp4Error::Io { path: "the recording".into(), source })
        });
        let mut status = self.shared.status();
        if let Ok(size) = done {
            self.finished += size;
        }
        (status.bytes, status.length) = (self.finished.max(status.bytes), self.length.as_duration());
        done.map(drop)
    }
}
