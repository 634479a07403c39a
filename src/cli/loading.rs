//! What a person sees while a large model loads: a bar on a terminal, a line now and then elsewhere.

use crate::avatar::s2v::{Loading, Watcher};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    io::IsTerminal,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// What is under way, in words.
fn doing(what: &str) -> String {
    if what == Loading::STEPS { "denoising".into() } else { format!("loading the {what}") }
}

/// Nobody looks.
pub(super) fn unwatched() -> Watcher {
    Arc::new(|_| {})
}

/// On standard error.
pub(super) fn shown() -> Watcher {
    if !std::io::stderr().is_terminal() {
        return lines(|line| eprintln!("{line}"));
    }
    let bars: Mutex<Option<(&'static str, ProgressBar)>> = Mutex::new(None);
    Arc::new(move |Loading { what, done, total }| {
        let mut bars = bars.lock().unwrap_or_else(PoisonError::into_inner);
        if bars.as_ref().is_none_or(|(before, _)| *before != what) {
            let bar = ProgressBar::with_draw_target(Some(total as u64), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{msg} {bar:32} {percent} %, {elapsed} gone, {eta} left") {
                bar.set_style(style);
            }
            bar.set_message(doing(what));
            *bars = Some((what, bar));
        }
        if let Some((_, bar)) = bars.as_ref() {
            bar.set_position(done as u64);
            if done >= total {
                bar.finish_and_clear();
            }
        }
    })
}

/// In the log.
pub(super) fn logged() -> Watcher {
    lines(|line| tracing::info!("{line}"))
}

/// One line when a part begins, every five seconds, and when it is complete.
fn lines(say: impl Fn(String) + Send + Sync + 'static) -> Watcher {
    struct State {
        what: &'static str,
        began: Instant,
        next: Instant,
    }
    const EVERY: Duration = Duration::from_secs(5);
    let state: Mutex<Option<State>> = Mutex::new(None);
    Arc::new(move |Loading { what, done, total }| {
        let now = Instant::now();
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if done == 0 {
            *state = Some(State { what, began: now, next: now + EVERY });
            say(match what {
                Loading::STEPS => format!("denoising: {total} steps"),
                _ => format!("loading the {what}: {:.1} million parameters", total as f64 / 1e6),
            });
        }
        let Some(state) = state.as_mut().filter(|s| s.what == what) else { return };
        if done >= total {
            say(format!("{}: done in {:.1} s", doing(what), (now - state.began).as_secs_f64()));
        } else if now >= state.next {
            state.next = now + EVERY;
            say(format!("{}: {:.0} %", doing(what), 100.0 * done as f64 / total.max(1) as f64));
        }
    })
}
