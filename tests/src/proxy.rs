//! A network between a program and the broker that a test can disturb.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread;
use std::time::Duration;

use socket2::SockRef;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the program to the broker.
    ToBroker,
    /// From the broker to the program.
    FromBroker,
}

/// A proxy before a broker. Until a test disturbs it, all bytes pass.
pub struct Proxy {
    url: String,
    ways: [Arc<Direction>; 2],
    sockets: Arc<Mutex<Vec<Weak<TcpStream>>>>,
    address: SocketAddr,
    is_over: Arc<AtomicBool>,
}

/// The bytes of one direction.
#[derive(Default)]
struct Direction {
    rules: Mutex<Rules>,
    changed: Condvar,
}

#[derive(Clone, Copy, Default)]
struct Rules {
    is_stalled: bool,
    /// What happens to a connection after this number of bytes.
    end: Option<(usize, End)>,
    /// The pause after each byte.
    pause: Option<Duration>,
    /// The number of bytes of all connections.
    passed: usize,
    swallowed: usize,
}

#[derive(Clone, Copy)]
enum End {
    Cut,
    Silence,
}

impl Direction {
    fn set(&self, change: impl FnOnce(&mut Rules)) {
        change(&mut self.rules.lock().expect("no panic"));
        self.changed.notify_all();
    }

    /// Waits while the direction is stalled. Returns the rules that apply then.
    fn pass(&self) -> Rules {
        let rules = self.rules.lock().expect("no panic");
        *self.changed.wait_while(rules, |rules| rules.is_stalled).expect("no panic")
    }
}

impl Proxy {
    /// Starts a proxy before the broker at this URL.
    pub fn start(url: &str) -> Proxy {
        Proxy::start_on(TcpListener::bind("127.0.0.1:0").expect("bind"), url)
    }

    /// The same with an open listener.
    pub fn start_on(listener: TcpListener, url: &str) -> Proxy {
        let (credentials, place) = url.split_once('@').expect("credentials in the URL");
        let (target, rest) = place.split_once('/').expect("a vhost in the URL");
        let address = listener.local_addr().expect("an address");
        let ways = [(); 2].map(|()| Arc::<Direction>::default());
        let sockets = Arc::<Mutex<Vec<_>>>::default();
        let is_over = Arc::<AtomicBool>::default();
        let (target, shared, known) = (target.to_string(), ways.clone(), Arc::clone(&sockets));
        let ends_here = Arc::clone(&is_over);
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if ends_here.load(Ordering::Relaxed) {
                    break;
                }
                let Ok(far) = TcpStream::connect(&target) else { continue };
                let ends = [near, far].map(Arc::new);
                known.lock().expect("no panic").extend(ends.iter().map(Arc::downgrade));
                for way in [Way::ToBroker, Way::FromBroker] {
                    let [near, far] = ends.clone();
                    let (from, to) = if way == Way::ToBroker { (near, far) } else { (far, near) };
                    let direction = Arc::clone(&shared[way as usize]);
                    thread::spawn(move || pump(&from, &to, &direction));
                }
            }
        });
        let url = format!("{credentials}@{address}/{rest}");
        Proxy { url, ways, sockets, address, is_over }
    }

    /// The URL of the broker through the proxy.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Stalls both directions until [`resume`](Proxy::resume).
    pub fn stall(&self) {
        self.stall_one(Way::ToBroker);
        self.stall_one(Way::FromBroker);
    }

    /// Stalls one direction.
    pub fn stall_one(&self, way: Way) {
        self.ways[way as usize].set(|rules| rules.is_stalled = true);
    }

    /// Passes all bytes again, first those that were stalled. Swallowed bytes are lost.
    pub fn resume(&self) {
        for way in &self.ways {
            way.set(|rules| (rules.is_stalled, rules.end) = (false, None));
        }
    }

    /// Cuts each connection after this number of bytes in one direction.
    pub fn cut_after(&self, way: Way, bytes: usize) {
        self.ways[way as usize].set(|rules| rules.end = Some((bytes, End::Cut)));
    }

    /// Swallows all bytes of a connection after this number of bytes in one direction.
    pub fn silence_after(&self, way: Way, bytes: usize) {
        self.ways[way as usize].set(|rules| rules.end = Some((bytes, End::Silence)));
    }

    /// Passes byte by byte, with a pause after each.
    pub fn trickle(&self, way: Way, pause: Duration) {
        self.ways[way as usize].set(|rules| rules.pause = Some(pause));
    }

    /// Resets all connections, so that both ends get an error instead of an end of file.
    pub fn reset(&self) {
        let known = self.sockets.lock().expect("no panic");
        for socket in known.iter().filter_map(Weak::upgrade) {
            SockRef::from(&*socket).set_linger(Some(Duration::ZERO)).expect("an option");
            // The connection may have ended already.
            let _ = socket.shutdown(Shutdown::Read);
        }
    }

    /// The number of bytes that have passed in one direction, on all connections.
    pub fn passed(&self, way: Way) -> usize {
        self.ways[way as usize].rules.lock().expect("no panic").passed
    }

    /// The number of bytes that were swallowed in one direction, on all connections.
    pub fn swallowed(&self, way: Way) -> usize {
        self.ways[way as usize].rules.lock().expect("no panic").swallowed
    }
}

impl Drop for Proxy {
    /// Accepts no more connections. Existing connections remain.
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // The listener checks for the end at each connection.
        let _ = TcpStream::connect(self.address);
    }
}

fn pump(mut from: &TcpStream, mut to: &TcpStream, direction: &Direction) {
    let mut buffer = vec![0; 64 * 1024];
    let mut passed = 0;
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let Rules { end, pause, .. } = direction.pass();
        if is_reset(from) {
            break;
        }
        let left = end.map_or(length, |(bytes, _)| length.min(bytes.saturating_sub(passed)));
        let written = match pause {
            None => to.write_all(&buffer[..left]),
            Some(pause) => buffer[..left].chunks(1).try_for_each(|byte| {
                thread::sleep(pause);
                to.write_all(byte)
            }),
        };
        passed += left;
        direction.set(|rules| {
            rules.passed += left;
            rules.swallowed += length - left;
        });
        match end {
            Some((bytes, End::Cut)) if passed >= bytes => break,
            _ if written.is_err() => break,
            _ => {}
        }
    }
    direction.pass();
    for socket in [from, to] {
        if !is_reset(socket) {
            // The other end may have closed the connection already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Whether [`Proxy::reset`] has ended the connection. It sets the linger time to 0, so that closing the socket resets
/// it.
fn is_reset(socket: &TcpStream) -> bool {
    SockRef::from(socket).linger().is_ok_and(|time| time.is_some())
}
