//! The socket, which two threads use by turns: amiquip's, and that of the program.
//!
//! amiquip logs in, makes requests, and sends heartbeats; its I/O thread reads the socket meanwhile. From then on the
//! program's own thread reads and writes, as each hand-over of a message from thread to thread costs more than all
//! the work on the message. Messages and confirmations are encoded and decoded here; amiquip gets all other frames.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::mem;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mio::event::Evented;
use mio::unix::EventedFd;
use mio::{Poll, PollOpt, Ready, Registration, SetReadiness, Token};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::buffer::Buffer;
use super::decoder::{Decoder, Inbound};
use super::encoder::{Answer, Answers, Login};
use super::frame_filter::HEARTBEAT_FRAME;
use super::observed::{Observed, Reason};
use super::{Socket, tls};
use crate::Delivery;

/// Bytes of deliveries that may wait for the program while amiquip's thread reads, so that a receiver takes less
/// than 64 MiB with all else; log lines never come near. RabbitMQ closes the connection of a receiver that leaves
/// its socket unread for half a minute; that is better than to fill the memory.
const LARGEST_INBOX: usize = 56 * 1024 * 1024;

/// How long the program may be busy, as with an output that takes no bytes, before it looks at the socket once more
/// when it has taken all messages: whether any waited makes a difference where the connection is lost.
const ABSENCE: Duration = Duration::from_millis(50);

/// Bytes that wait for the socket from which on a publisher had better wait.
const CONGESTED: usize = 256 * 1024;

/// Which thread reads the socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reader {
    /// amiquip's I/O thread, while a request of amiquip waits for its answer.
    Amiquip,
    /// The program's, whenever it waits.
    Program,
}

/// What has come for the program.
#[derive(Debug, Default)]
pub struct Inbox {
    /// In the order of the broker.
    pub messages: VecDeque<Inbound>,
    /// The deliveries among them, and the bytes that these take.
    pub deliveries: usize,
    pub bytes: usize,
    /// Whether deliveries are dropped from now on; one that came after a dropped one would make a hole.
    pub is_dropping: bool,
    /// Whether nothing more comes on the channel.
    pub is_over: bool,
}

impl Inbox {
    /// Adds a delivery.
    pub fn deliver(&mut self, delivery: Box<Delivery>) {
        if !self.is_dropping {
            self.deliveries += 1;
            self.bytes += delivery.memory;
            self.push(Inbound::Delivery(delivery));
        }
    }

    /// Adds a message, unless that comes after the end.
    pub fn push(&mut self, message: Inbound) {
        if !self.is_over {
            self.messages.push_back(message);
        }
    }
}

/// The socket of a connection.
pub struct Wire {
    state: Mutex<State>,
    /// A second handle, to wait for the socket without the lock.
    handle: TcpStream,
    /// Watches the socket for amiquip's I/O thread, as long as that is the reader.
    watch: Poll,
    /// Tells amiquip's I/O thread that bytes are there for it.
    readiness: SetReadiness,
    /// Bytes of the deliveries that the program has taken, and not handled yet.
    taken: AtomicUsize,
    /// Facts for the holder of the connection.
    pub observed: Arc<Observed>,
}

struct State {
    socket: Socket,
    reader: Reader,
    /// What amiquip's I/O thread is woken by, at the socket.
    watched: Ready,
    buffer: Buffer,
    decoder: Decoder,
    for_amiquip: Vec<u8>,
    inbox: Inbox,
    /// Bytes that the socket has not taken yet, from `written` on.
    outgoing: Vec<u8>,
    written: usize,
    /// Answers that amiquip has got ahead of the broker.
    answers: Answers,
    login: Login,
    /// The last read got less than asked for: another would find the socket empty, at the price of a system call.
    is_drained: bool,
    end: Option<End>,
    /// Whether the program waits for the socket.
    is_waiting: bool,
    /// Whether deliveries for which there is no room are dropped.
    drops_excess: bool,
    /// When the socket was last read.
    looked: Instant,
    /// When amiquip last heard that the broker is alive.
    told: Instant,
}

/// How the received bytes end.
enum End {
    Closed,
    Failed(String),
}

impl State {
    /// Whether there is anything for the program.
    fn has_come(&self) -> bool {
        !self.inbox.messages.is_empty() || self.inbox.is_over
    }
}

impl Wire {
    /// Takes over a connected socket, which `handle` is another handle of. Also returns the part that amiquip polls.
    /// `heartbeat` is the time between two signs of life of the peer that amiquip watches for, or zero.
    ///
    /// # Errors
    ///
    /// When the system has no file descriptor left.
    pub fn new(
        socket: Socket,
        handle: TcpStream,
        heartbeat: Duration,
        name: String,
    ) -> io::Result<(Wire, Registration)> {
        let (registration, readiness) = Registration::new2();
        readiness.set_readiness(Ready::writable())?;
        let wire = Wire {
            handle,
            watch: Poll::new()?,
            readiness,
            taken: AtomicUsize::new(0),
            observed: Arc::new(Observed::new(heartbeat)),
            state: Mutex::new(State {
                socket,
                reader: Reader::Amiquip,
                watched: Ready::empty(),
                buffer: Buffer::new(),
                decoder: Decoder::default(),
                for_amiquip: Vec::new(),
                inbox: Inbox::default(),
                outgoing: Vec::new(),
                written: 0,
                answers: Answers::default(),
                login: Login::new(name, heartbeat),
                is_drained: false,
                end: None,
                is_waiting: false,
                drops_excess: false,
                looked: Instant::now(),
                told: Instant::now(),
            }),
        };
        wire.read_by(Reader::Amiquip);
        Ok((wire, registration))
    }

    /// Lets this thread read from now on; returns the reader before.
    pub fn read_by(&self, reader: Reader) -> Reader {
        let mut state = self.lock();
        let before = mem::replace(&mut state.reader, reader);
        self.watch(&mut state);
        if reader == Reader::Amiquip && state.socket.has_more() {
            // The socket does not wake the I/O thread for bytes that a TLS session holds.
            self.wake();
        }
        before
    }

    /// Moves what has come for the program to `inbox`, which is empty. After a long absence, the program learns what
    /// has come meanwhile.
    pub fn take(&self, inbox: &mut Inbox) {
        let mut state = self.lock();
        if !state.has_come() && state.looked.elapsed() > ABSENCE {
            self.receive(&mut state);
        }
        mem::swap(&mut state.inbox.messages, &mut inbox.messages);
        self.taken.store(mem::take(&mut state.inbox.bytes), Ordering::Relaxed);
        inbox.deliveries = mem::take(&mut state.inbox.deliveries);
        self.observed.unread.store(0, Ordering::Relaxed);
        inbox.is_over = state.inbox.is_over;
    }

    /// Records that the program has handled a delivery, which took so many bytes.
    pub fn record_handled(&self, bytes: usize) {
        self.taken.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Drops deliveries for which there is no room from now on. amiquip's thread reads them until the answer that it
    /// waits for.
    pub fn drop_excess(&self) {
        self.lock().drops_excess = true;
    }

    /// Whether so many deliveries wait for the program that the rest had better stay in the socket.
    fn is_full(&self, state: &State) -> bool {
        let whole = self.taken.load(Ordering::Relaxed) + state.inbox.bytes;
        // A message that is larger than that is received alone.
        whole > 0 && whole + state.decoder.held() >= LARGEST_INBOX
    }

    /// Sends bytes, whole frames, as far as the socket takes them; the rest goes out with the next bytes, or while
    /// somebody waits.
    pub fn send(&self, frames: &[u8]) {
        let mut state = self.lock();
        self.flush(&mut state);
        let mut rest = frames;
        // Not by way of `outgoing`, which costs a copy.
        while state.outgoing.is_empty() && !rest.is_empty() {
            match state.socket.write(rest) {
                Ok(length) => rest = &rest[length..],
                Err(_) => break,
            }
        }
        // After an error, too: a flush tells what to do about it.
        if !rest.is_empty() {
            state.outgoing.extend_from_slice(rest);
            self.flush(&mut state);
        }
    }

    /// The same with the next bytes that are sent, or while somebody waits.
    pub fn send_later(&self, frames: &[u8]) {
        self.lock().outgoing.extend_from_slice(frames);
    }

    /// Notes that the broker is going to give an answer that nobody waits for.
    pub fn expect(&self, answer: Answer) {
        self.lock().answers.expect(answer);
    }

    /// The time to the broker and back: the shortest that an answer of the login has taken.
    pub fn round_trip(&self) -> Duration {
        self.lock().login.round_trip.unwrap_or_default()
    }

    /// The largest payload of a frame that the broker takes.
    pub fn max_payload(&self) -> usize {
        self.lock().login.max_payload
    }

    /// Whether so many bytes wait for the socket that more had better not be added.
    pub fn is_congested(&self) -> bool {
        let state = self.lock();
        state.outgoing.len() - state.written > CONGESTED
    }

    /// Whether an answer that nobody waits for is still to come.
    pub fn expects(&self, answer: Answer) -> bool {
        self.lock().answers.contain(answer)
    }

    /// Waits until something has come for the program, all that was left to be sent is sent, or one of `others` is
    /// ready, at most `until` then. The program has to be the reader.
    pub fn wait(&self, others: &[BorrowedFd<'_>], until: Option<Instant>) -> Woken {
        self.wait_until(State::has_come, others, until)
    }

    /// Waits until something has come for the program, or this answer, at most `until` then.
    pub fn wait_for_message_or(&self, answer: Answer, until: Option<Instant>) -> Woken {
        let has_come = |state: &State| state.has_come() || !state.answers.contain(answer);
        self.wait_until(has_come, &[], until)
    }

    /// Waits until this answer, or the end, has come, at most `until` then.
    pub fn wait_for_answer(&self, answer: Answer, until: Instant) {
        let has_come = |state: &State| !state.answers.contain(answer) || state.inbox.is_over;
        // A wait also ends when all is sent.
        while !has_come(&self.lock()) && Instant::now() < until {
            self.wait_until(has_come, &[], Some(until));
        }
    }

    fn wait_until(
        &self,
        has_come: impl Fn(&State) -> bool,
        others: &[BorrowedFd<'_>],
        until: Option<Instant>,
    ) -> Woken {
        loop {
            let mut state = self.lock();
            let was_sending = !state.outgoing.is_empty();
            self.flush(&mut state);
            let is_sending = !state.outgoing.is_empty();
            // poll(2) does not see bytes that a TLS session holds.
            while state.socket.has_more() && self.receive(&mut state) {}
            if has_come(&state) || was_sending && !is_sending {
                return wait_for(others, Some(Instant::now()));
            }
            state.is_waiting = true;
            drop(state);
            let events = if is_sending { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            let woken = wait(others, Some(PollFd::new(&self.handle, events)), until);
            let mut state = self.lock();
            state.is_waiting = false;
            if !woken.by(others.len()) {
                return woken;
            }
            self.flush(&mut state);
            while self.receive(&mut state) && state.socket.has_more() {}
            let is_sent = is_sending && state.outgoing.is_empty();
            if woken.by_any_of(others.len()) || is_sent || has_come(&state) {
                return woken;
            }
        }
    }

    /// Ends the connection at once.
    pub fn cut(&self) {
        // An error means that the peer has closed the connection already.
        let _ = self.handle.shutdown(Shutdown::Both);
    }

    /// Lets amiquip's I/O thread be woken by the socket.
    pub fn register(&self, poll: &Poll, token: Token) -> io::Result<()> {
        let watch = self.watch.as_raw_fd();
        EventedFd(&watch).register(poll, token, Ready::readable(), PollOpt::level())
    }

    /// Undoes [`register`](Wire::register).
    pub fn deregister(&self, poll: &Poll) -> io::Result<()> {
        EventedFd(&self.watch.as_raw_fd()).deregister(poll)
    }

    /// Bytes for amiquip.
    pub fn read(&self, out: &mut [u8]) -> io::Result<usize> {
        let mut state = self.lock();
        while state.for_amiquip.is_empty() {
            match &state.end {
                Some(End::Closed) => return Ok(0),
                Some(End::Failed(reason)) => return Err(io::Error::other(reason.clone())),
                None => {}
            }
            self.flush(&mut state);
            if !state.drops_excess && self.is_full(&state) {
                // The answer to amiquip's request has come before the deliveries. The program reads on.
                state.reader = Reader::Program;
                self.watch(&mut state);
            }
            let is_program = state.reader == Reader::Program;
            let is_drained = is_program || mem::take(&mut state.is_drained);
            if is_drained || !self.receive(&mut state) && state.end.is_none() {
                self.readiness.set_readiness(Ready::writable())?;
                return Err(ErrorKind::WouldBlock.into());
            }
        }
        let length = out.len().min(state.for_amiquip.len());
        out[..length].copy_from_slice(&state.for_amiquip[..length]);
        state.for_amiquip.drain(..length);
        Ok(length)
    }

    /// Takes bytes of amiquip, which are whole frames.
    pub fn write(&self, frames: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        let State { outgoing, answers, for_amiquip, login, .. } = &mut *state;
        for answer in login.pass(frames, outgoing) {
            answers.expect(answer);
            for_amiquip.extend(answer.frame());
        }
        self.flush(&mut state);
        if frames == HEARTBEAT_FRAME && state.reader == Reader::Program && !state.is_waiting {
            // The program may be busy for long, as with an output that takes no more bytes. One that waits would not
            // be woken by what this thread reads.
            while !self.is_full(&state) && self.receive(&mut state) {}
        }
        if !state.for_amiquip.is_empty() {
            self.wake();
        }
        Ok(frames.len())
    }

    /// Reads from the socket once; returns whether there was anything, and more may come.
    fn receive(&self, state: &mut State) -> bool {
        if state.end.is_some() {
            return false;
        }
        let is_tcp = matches!(state.socket, Socket::Tcp(_));
        let room = state.buffer.room();
        let read = state.socket.read(room);
        let now = Instant::now();
        state.looked = now;
        if read.as_ref().is_err_and(is_passing) {
            return false;
        }
        self.observed.last_received.set(now);
        if let Ok(length) = read {
            // A TLS session may hold more.
            state.is_drained = is_tcp && (1..room.len()).contains(&length);
            self.observed.note_bytes(length);
            state.login.note_answer();
        }
        if let Err(error) = &read
            && let Some(failure) = tls::failure_of(error)
        {
            self.observed.ends(Reason::Tls(failure));
        }
        state.inbox.is_dropping |= state.drops_excess && self.is_full(state);
        // A reset is an end like any other.
        let checked = state.buffer.received(*read.as_ref().unwrap_or(&0));
        let State { buffer, decoder, for_amiquip, inbox, answers, .. } = &mut *state;
        let had = for_amiquip.len();
        let decoded =
            checked.and_then(|()| decoder.decode(buffer.take(), for_amiquip, inbox, answers));
        if let Some(close) = buffer.take_closed() {
            self.observed.ends(Reason::Closed(close));
        }
        match (decoded, read) {
            (Err(fault), _) => {
                state.end = Some(End::Failed(fault.to_string()));
                self.observed.ends(Reason::Fault(fault));
            }
            (Ok(()), Ok(0)) => state.end = Some(End::Closed),
            (Ok(()), Ok(_)) => {}
            (Ok(()), Err(error)) => state.end = Some(End::Failed(error.to_string())),
        }
        state.inbox.is_over |= state.end.is_some();
        self.observed.unread.store(state.inbox.deliveries, Ordering::Relaxed);
        let heartbeat = state.login.heartbeat;
        let is_due = !heartbeat.is_zero() && now - state.told > heartbeat / 2;
        if state.for_amiquip.len() == had && is_due {
            // amiquip ends a connection on which it reads nothing for two heartbeats.
            state.for_amiquip.extend_from_slice(&HEARTBEAT_FRAME);
        }
        if state.for_amiquip.len() > had || state.end.is_some() {
            state.told = now;
            self.wake();
        }
        state.end.is_none()
    }

    /// Writes as much as the socket takes.
    fn flush(&self, state: &mut State) {
        while state.written < state.outgoing.len() {
            match state.socket.write(&state.outgoing[state.written..]) {
                Ok(length) => state.written += length,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => {
                    // The last words of the peer are still to be read. The end of the stream comes after them.
                    log::debug!("write: {error}");
                    let _ = self.handle.shutdown(Shutdown::Write);
                    state.written = state.outgoing.len();
                }
            }
        }
        // A socket that is never ready for all must not make the sent part grow for ever.
        if state.written >= state.outgoing.len() / 2 {
            state.outgoing.drain(..state.written);
            state.written = 0;
        }
        self.watch(state);
    }

    /// Lets amiquip's I/O thread be woken by the socket as long as it reads.
    fn watch(&self, state: &mut State) {
        let wanted = match state.reader {
            Reader::Program => Ready::empty(),
            Reader::Amiquip if state.outgoing.is_empty() => Ready::readable(),
            Reader::Amiquip => Ready::readable() | Ready::writable(),
        };
        let before = mem::replace(&mut state.watched, wanted);
        if before == wanted {
            return;
        }
        let (socket, level) = (state.socket.tcp(), PollOpt::level());
        let watched = match (before.is_empty(), wanted.is_empty()) {
            (_, true) => self.watch.deregister(socket),
            (true, false) => self.watch.register(socket, Token(0), wanted, level),
            (false, false) => self.watch.reregister(socket, Token(0), wanted, level),
        };
        if let Err(error) = watched {
            // Without it amiquip would wait for ever.
            log::debug!("watch the socket: {error}");
            state.end = Some(End::Failed(error.to_string()));
            state.inbox.is_over = true;
            self.wake();
        }
    }

    fn wake(&self) {
        // Fails when the I/O thread is gone.
        let _ = self.readiness.set_readiness(Ready::readable() | Ready::writable());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in the middle of a frame has ended amiquip's thread, and with that the connection.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Which of the file descriptors that were waited for are ready.
#[derive(Clone, Copy, Debug)]
pub struct Woken(u32);

impl Woken {
    /// Whether the file descriptor at this place, of 32 at most, is ready.
    pub fn by(self, place: usize) -> bool {
        self.0 >> place & 1 == 1
    }

    /// Whether any of the first so many file descriptors is ready.
    fn by_any_of(self, first: usize) -> bool {
        self.0 & !(u32::MAX << first) != 0
    }
}

/// Waits until one of these is ready, at most `until` then.
pub fn wait_for(watched: &[BorrowedFd<'_>], until: Option<Instant>) -> Woken {
    wait(watched, None, until)
}

fn wait(watched: &[BorrowedFd<'_>], last: Option<PollFd<'_>>, until: Option<Instant>) -> Woken {
    let mut files = Vec::with_capacity(watched.len() + 1);
    files.extend(watched.iter().map(|file| PollFd::from_borrowed_fd(*file, PollFlags::IN)));
    files.extend(last);
    loop {
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        // A time too far away to be expressed is as good as for ever.
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut files, timeout.as_ref()) {
            // A signal that concerns the waiting program puts a message into a mailbox.
            Err(Errno::INTR) => {}
            Err(_) => return Woken(0),
            Ok(_) => break,
        }
    }
    let ready = files.iter().enumerate().filter(|(_, file)| !file.revents().is_empty());
    Woken(ready.fold(0, |woken, (place, _)| woken | 1 << place))
}
