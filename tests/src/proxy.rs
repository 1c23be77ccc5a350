//! A network between a program and the broker, to be disturbed.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

/// Passes connections on to a broker; can swallow everything for a while.
pub struct Proxy {
    url: String,
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    is_closed: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    fn pass(&self) {
        let closed = self.is_closed.lock().expect("no panic");
        drop(self.opened.wait_while(closed, |closed| *closed).expect("no panic"));
    }

    fn set_closed(&self, closed: bool) {
        *self.is_closed.lock().expect("no panic") = closed;
        self.opened.notify_all();
    }
}

impl Proxy {
    /// Starts one before the broker at this URL.
    pub fn start(url: &str) -> Proxy {
        let (credentials, place) = url.split_once('@').expect("credentials in the URL");
        let (target, vhost) = place.split_once('/').expect("a vhost in the URL");
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let address = listener.local_addr().expect("an address");
        let gate = Arc::<Gate>::default();
        let (target, shared) = (target.to_string(), Arc::clone(&gate));
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                let Ok(far) = TcpStream::connect(&target) else { continue };
                let clone = |socket: &TcpStream| socket.try_clone().expect("a handle");
                let (from, to) = (clone(&near), clone(&far));
                for (from, to) in [(from, to), (far, near)] {
                    let gate = Arc::clone(&shared);
                    thread::spawn(move || pump(from, to, &gate));
                }
            }
        });
        Proxy { url: format!("{credentials}@{address}/{vhost}"), gate }
    }

    /// The URL of the broker through it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Lets nothing through in either direction, until told otherwise.
    pub fn stall(&self) {
        self.gate.set_closed(true);
    }

    /// Lets everything through, what was held back first.
    pub fn resume(&self) {
        self.gate.set_closed(false);
    }
}

fn pump(mut from: TcpStream, mut to: TcpStream, gate: &Gate) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        gate.pass();
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    gate.pass();
    // Either may be gone already.
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}
