//! A few long-lived threads that share out the parts of one job at a time. Nobody spins: idle threads sleep on a
//! condition variable, and a caller whose helpers come late does the parts itself, so a busy machine costs speed but
//! never a stall.

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc, Condvar, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
};

/// Shares out work; see the module. Dropping it joins its threads.
pub struct Pool {
    shared: Arc<Shared>,
    /// One job at a time: callers queue here.
    turn: Mutex<()>,
    helpers: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    /// A job came, or the pool closes.
    work: Condvar,
    /// The last helper left the job.
    done: Condvar,
}

#[derive(Default)]
struct State {
    job: Option<Job>,
    /// Counts jobs, so that a helper joins each at most once.
    number: u64,
    /// Helpers inside the current job.
    inside: usize,
    panic: Option<Box<dyn std::any::Any + Send>>,
    closing: bool,
}

/// A job borrowed from the stack of [`Pool::run`], which does not return before every helper has left it.
#[derive(Clone, Copy)]
struct Job {
    part: *const (dyn Fn(usize) + Sync),
    next: *const AtomicUsize,
    parts: usize,
}

// SAFETY: both pointers are to `Sync` values that outlive the job (see `Job`).
unsafe impl Send for Job {}

impl Job {
    fn work(&self) {
        // SAFETY: the pointers are valid for as long as a helper is counted as inside.
        let (part, next) = unsafe { (&*self.part, &*self.next) };
        loop {
            let i = next.fetch_add(1, Ordering::Relaxed);
            if i >= self.parts {
                return;
            }
            part(i);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn help(&self) {
        let mut seen = 0;
        let mut state = self.lock();
        loop {
            if state.closing {
                return;
            }
            let job = state.job.filter(|_| state.number != seen);
            let Some(job) = job else {
                state = self.work.wait(state).unwrap_or_else(|e| e.into_inner());
                continue;
            };
            seen = state.number;
            state.inside += 1;
            drop(state);
            let outcome = catch_unwind(AssertUnwindSafe(|| job.work()));
            state = self.lock();
            if let Err(panic) = outcome {
                state.panic.get_or_insert(panic);
            }
            state.inside -= 1;
            if state.inside == 0 {
                self.done.notify_all();
            }
        }
    }
}

/// The pool that operations use which are not handed one.
static SHARED: Mutex<Option<Arc<Pool>>> = Mutex::new(None);

impl Pool {
    /// The process's common pool; two threads unless [`Pool::share`] said otherwise.
    pub fn shared() -> Arc<Pool> {
        let mut shared = SHARED.lock().unwrap_or_else(|e| e.into_inner());
        shared.get_or_insert_with(|| Pool::new(2)).clone()
    }

    /// Makes a pool of `threads` the common one (0 = as many as the machine has). Operations under way keep theirs.
    pub fn share(threads: usize) -> Arc<Pool> {
        let pool = Pool::new(threads);
        *SHARED.lock().unwrap_or_else(|e| e.into_inner()) = Some(pool.clone());
        pool
    }

    /// `threads` counts the caller; 0 = as many as the machine has. If a thread cannot be had, fewer are used.
    pub fn new(threads: usize) -> Arc<Pool> {
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = if threads == 0 { cores() } else { threads };
        let shared = Arc::new(Shared { state: Mutex::default(), work: Condvar::new(), done: Condvar::new() });
        let helpers = (1..threads)
            .map_while(|i| {
                let shared = shared.clone();
                std::thread::Builder::new().name(format!("maths-{i}")).spawn(move || shared.help()).ok()
            })
            .collect();
        Arc::new(Pool { shared, turn: Mutex::new(()), helpers })
    }

    /// Threads that may work on a job, the caller included.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `part(i)` once for each `i` below `parts`, on any thread, in any order; returns when all are done.
    /// A panic in a part is passed on to the caller after the others have ended. Do not call `run` from a part.
    pub fn run(&self, parts: usize, part: impl Fn(usize) + Sync) {
        if self.helpers.is_empty() || parts < 2 {
            (0..parts).for_each(part);
            return;
        }
        let _turn = self.turn.lock().unwrap_or_else(|e| e.into_inner());
        let next = AtomicUsize::new(0);
        let part: &(dyn Fn(usize) + Sync) = &part;
        // SAFETY: only the lifetime is changed; the wait below keeps it honest.
        let part = unsafe {
            std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const (dyn Fn(usize) + Sync + 'static)>(part)
        };
        let job = Job { part, next: &raw const next, parts };
        {
            let mut state = self.shared.lock();
            state.job = Some(job);
            state.number += 1;
        }
        for _ in 0..self.helpers.len().min(parts - 1) {
            self.shared.work.notify_one();
        }
        let mine = catch_unwind(AssertUnwindSafe(|| job.work()));
        if mine.is_err() {
            // Nobody starts another part of a job that is lost.
            next.store(parts, Ordering::Relaxed);
        }
        let mut state = self.shared.lock();
        // From here nobody new can enter; wait for those inside.
        state.job = None;
        while state.inside > 0 {
            state = self.shared.done.wait(state).unwrap_or_else(|e| e.into_inner());
        }
        let theirs = state.panic.take();
        drop(state);
        if let Err(panic) = mine {
            resume_unwind(panic);
        }
        if let Some(panic) = theirs {
            drop(_turn);
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.work.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper catches the panics of its parts; its own end is not worth another panic here.
            let _ = helper.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_is_done_once() {
        for threads in [1, 2, 4] {
            let pool = Pool::new(threads);
            for parts in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..parts).map(|_| AtomicUsize::new(0)).collect();
                pool.run(parts, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = Pool::new(3);
        for _ in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(64, |i| assert!(i != 40, "part forty"))));
            assert!(result.is_err());
            let sum = AtomicUsize::new(0);
            pool.run(10, |i| {
                sum.fetch_add(i, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }

    #[test]
    fn several_callers_take_turns() {
        let pool = Pool::new(2);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..200 {
                        let sum = AtomicUsize::new(0);
                        pool.run(16, |i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                        assert_eq!(sum.into_inner(), 120);
                    }
                });
            }
        });
    }
}
