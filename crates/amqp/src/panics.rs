//! Panics of amiquip, which stand for errors.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::thread;

/// The thread in which amiquip runs a connection.
const IO_THREAD: &str = "amiquip-io";

thread_local! {
    /// Whether [`catch_panic`] is at work in this thread.
    static IS_CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Calls `work` of a library that panics where it should return an error. Returns `None` after a panic; the
/// values that `work` used must not be used again.
pub(crate) fn catch_panic<T>(work: impl FnOnce() -> T) -> Option<T> {
    IS_CAUGHT.set(true);
    let outcome = panic::catch_unwind(AssertUnwindSafe(work));
    IS_CAUGHT.set(false);
    outcome.ok()
}

/// Whether this crate turns a panic of this thread into an error, so that the hook for panics need not
/// report it. A panic of amiquip's own thread counts as a lost connection.
pub fn is_expected_panic() -> bool {
    IS_CAUGHT.get() || thread::current().name() == Some(IO_THREAD)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_panic_that_is_caught_is_expected() {
        assert_eq!(catch_panic(is_expected_panic), Some(true));
        assert!(!is_expected_panic());
        assert_eq!(catch_panic(|| -> u8 { panic!("as libraries do") }), None);
        assert!(!is_expected_panic());
        let io_thread = thread::Builder::new().name(IO_THREAD.into()).spawn(is_expected_panic);
        assert!(io_thread.unwrap().join().unwrap());
    }
}
