//! Decoder libraries read strangers' files. What they panic about is a fault of the file, not of the program.

use std::{
    cell::Cell,
    panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook},
    sync::Once,
};

thread_local! {
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Calls a decoder library; a panic in it becomes a sentence. Nothing is printed: a file that anybody may send must not
/// fill the log, and its sender is told. Whoever gets the error must not use again what `call` borrowed.
pub(super) fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = take_hook();
        set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                before(panic);
            }
        }));
    });
    let outer = GUARDED.replace(true);
    // Safe to assert: decoders keep their state in themselves, and they are dropped or left alone after this.
    let outcome = catch_unwind(AssertUnwindSafe(call));
    GUARDED.set(outer);
    outcome.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        format!("its decoder gave up: {}", text.unwrap_or("no message"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_a_sentence_and_the_next_call_is_fine() {
        let n = std::hint::black_box(3);
        assert_eq!(guarded(|| [1, 2, 3][n]).unwrap_err().lines().count(), 1);
        assert_eq!(guarded(|| -> u8 { panic!("chunk {n}") }), Err("its decoder gave up: chunk 3".into()));
        assert_eq!(guarded(|| n), Ok(3));
        assert!(!GUARDED.get(), "other panics would be silent");
    }
}
