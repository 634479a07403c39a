//! How far a rendering is: a bar with the remaining time on a terminal; a line now and then elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

pub(super) enum Progress {
    Quiet,
    Bar(ProgressBar),
    Lines { total: u64, fps: u32, began: Instant, next: Instant },
}

impl Progress {
    pub(super) fn new(total: u64, fps: u32, quiet: bool) -> Progress {
        if quiet {
            return Progress::Quiet;
        }
        if !std::io::stderr().is_terminal() {
            let now = Instant::now();
            return Progress::Lines { total, fps, began: now, next: now + Duration::from_secs(2) };
        }
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        let template = "{bar:32} {pos}/{len} frames, {per_sec}, {elapsed} gone, {eta} left";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Progress::Bar(bar)
    }

    pub(super) fn at(&mut self, frames: u64) {
        match self {
            Progress::Quiet => {}
            Progress::Bar(bar) => bar.set_position(frames),
            Progress::Lines { total, fps, began, next } => {
                let now = Instant::now();
                if now >= *next && frames > 0 {
                    let took = now - *began;
                    let left = took.mul_f64((*total - frames) as f64 / frames as f64);
                    let shown = frames as f64 / f64::from((*fps).max(1));
                    eprintln!(
                        "{frames}/{total} frames ({shown:.1} s of video), about {:.0} s left",
                        left.as_secs_f64()
                    );
                    *next = now + Duration::from_secs(5);
                }
            }
        }
    }

    pub(super) fn done(&self) {
        if let Progress::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}
