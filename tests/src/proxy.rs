//! A network between a program and the broker, to be disturbed.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread;
use std::time::Duration;

use socket2::SockRef;

/// One of the two directions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// What the program sends.
    ToBroker,
    /// What the broker sends.
    FromBroker,
}

/// Passes connections on to a broker, until told otherwise.
pub struct Proxy {
    url: String,
    ways: [Arc<Direction>; 2],
    sockets: Arc<Mutex<Vec<Weak<TcpStream>>>>,
    address: SocketAddr,
    is_over: Arc<AtomicBool>,
}

/// What happens to the bytes that go one way.
#[derive(Default)]
struct Direction {
    rules: Mutex<Rules>,
    changed: Condvar,
}

#[derive(Clone, Copy, Default)]
struct Rules {
    is_stalled: bool,
    /// What becomes of a connection after so many bytes.
    end: Option<(usize, End)>,
    /// The pause after each byte.
    pause: Option<Duration>,
    /// Bytes of all connections.
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

    /// Waits as long as nothing may pass. Returns what holds then.
    fn pass(&self) -> Rules {
        let rules = self.rules.lock().expect("no panic");
        *self.changed.wait_while(rules, |rules| rules.is_stalled).expect("no panic")
    }
}

impl Proxy {
    /// Starts one before the broker at this URL.
    pub fn start(url: &str) -> Proxy {
        Proxy::start_on(TcpListener::bind("127.0.0.1:0").expect("bind"), url)
    }

    /// The same with a listener that is there already.
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

    /// The URL of the broker through it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Lets nothing through in either direction, until told otherwise.
    pub fn stall(&self) {
        self.stall_one(Way::ToBroker);
        self.stall_one(Way::FromBroker);
    }

    /// Lets nothing through in one direction.
    pub fn stall_one(&self, way: Way) {
        self.ways[way as usize].set(|rules| rules.is_stalled = true);
    }

    /// Lets everything through, what was held back first. What was swallowed does not come back.
    pub fn resume(&self) {
        for way in &self.ways {
            way.set(|rules| (rules.is_stalled, rules.end) = (false, None));
        }
    }

    /// Cuts each connection after so many bytes in one direction.
    pub fn cut_after(&self, way: Way, bytes: usize) {
        self.ways[way as usize].set(|rules| rules.end = Some((bytes, End::Cut)));
    }

    /// Swallows all that comes on a connection after so many bytes in one direction.
    pub fn silence_after(&self, way: Way, bytes: usize) {
        self.ways[way as usize].set(|rules| rules.end = Some((bytes, End::Silence)));
    }

    /// Passes byte by byte, with a pause after each.
    pub fn trickle(&self, way: Way, pause: Duration) {
        self.ways[way as usize].set(|rules| rules.pause = Some(pause));
    }

    /// Resets all connections, so that both ends get an error in place of an end.
    pub fn reset(&self) {
        let known = self.sockets.lock().expect("no panic");
        for socket in known.iter().filter_map(Weak::upgrade) {
            SockRef::from(&*socket).set_linger(Some(Duration::ZERO)).expect("an option");
            // Or it may be gone already.
            let _ = socket.shutdown(Shutdown::Read);
        }
    }

    /// Bytes that have passed in one direction, on all connections.
    pub fn passed(&self, way: Way) -> usize {
        self.ways[way as usize].rules.lock().expect("no panic").passed
    }

    /// Bytes that were swallowed in one direction, on all connections.
    pub fn swallowed(&self, way: Way) -> usize {
        self.ways[way as usize].rules.lock().expect("no panic").swallowed
    }
}

impl Drop for Proxy {
    /// Accepts no more connections; those that there are go on.
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // It looks when somebody connects.
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
            // It may be gone already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// Whether [`Proxy::reset`] has ended the connection: a socket that lingers for no time is reset when it is closed.
fn is_reset(socket: &TcpStream) -> bool {
    SockRef::from(socket).linger().is_ok_and(|time| time.is_some())
}
