//! Ctrl-C and termination signals while files are made.

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Whether somebody asked to stop, and what must not be left behind.
#[derive(Clone, Default)]
pub(super) struct Interruption {
    asked: Arc<AtomicBool>,
    temporaries: Arc<Mutex<Vec<PathBuf>>>,
}

impl Interruption {
    /// Listens from now on, so that the work stops at the next block and unwinds. If it has not within two seconds (one
    /// block may take long), or on a second signal, the temporary files are removed here and the process ends.
    pub(super) fn watch() -> anyhow::Result<Interruption> {
        let it = Interruption::default();
        let (asked, temporaries) = (it.asked.clone(), it.temporaries.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let work = async move {
            let Ok(mut terminate) = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) else {
                return;
            };
            tokio::select! { _ = tokio::signal::ctrl_c() => {}, _ = terminate.recv() => {} }
            asked.store(true, Ordering::Relaxed);
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {},
                _ = terminate.recv() => {},
                () = tokio::time::sleep(Duration::from_secs(2)) => {},
            }
            for path in temporaries.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                let _ = std::fs::remove_file(path);
            }
            eprintln!("loquent: interrupted; the file under way was not written");
            std::process::exit(130);
        };
        std::thread::Builder::new().name("interruption".into()).spawn(move || runtime.block_on(work))?;
        Ok(it)
    }

    pub(super) fn asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// What is removed if the work cannot unwind in time.
    pub(super) fn guard(&self, temporaries: Vec<PathBuf>) {
        *self.temporaries.lock().unwrap_or_else(PoisonError::into_inner) = temporaries;
    }
}
