//! Whether standard input and output were closed when the program was started.
//!
//! Before `main`, Rust's runtime opens `/dev/null` for each closed descriptor from 0 to 2. A write to a closed stdout
//! then succeeds and loses the data, and a closed stdin reads as empty. This module checks the descriptors before the
//! runtime starts.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{Errno, fcntl_getfd};
use rustix::stdio::{stdin, stdout};

static STDIN_IS_CLOSED: AtomicBool = AtomicBool::new(false);
static STDOUT_IS_CLOSED: AtomicBool = AtomicBool::new(false);

/// The loader calls the functions of this section before it starts Rust's runtime.
// The attribute is unsafe because the linker trusts its value. The section holds pointers to functions of this type,
// and `check_descriptors` calls nothing that needs the runtime.
#[allow(unsafe_code)]
#[used]
#[cfg_attr(not(target_vendor = "apple"), unsafe(link_section = ".init_array"))]
#[cfg_attr(target_vendor = "apple", unsafe(link_section = "__DATA,__mod_init_func"))]
static CHECK: extern "C" fn() = check_descriptors;

extern "C" fn check_descriptors() {
    STDIN_IS_CLOSED.store(is_closed(stdin()), Ordering::Relaxed);
    STDOUT_IS_CLOSED.store(is_closed(stdout()), Ordering::Relaxed);
}

fn is_closed(descriptor: impl AsFd) -> bool {
    fcntl_getfd(descriptor) == Err(Errno::BADF)
}

/// Whether descriptor 0 was closed when the program was started.
pub fn stdin_is_closed() -> bool {
    STDIN_IS_CLOSED.load(Ordering::Relaxed)
}

/// Whether descriptor 1 was closed when the program was started.
pub fn stdout_is_closed() -> bool {
    STDOUT_IS_CLOSED.load(Ordering::Relaxed)
}
