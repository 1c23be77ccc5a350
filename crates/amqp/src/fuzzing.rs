//! The way of a peer's bytes to the program and to amiquip, for `tests/fuzz`, which has no socket.

pub use crate::transport::frame_filter::{Close, FRAME_MAX, Fault};
pub use crate::transport::start_ok::extend_start_ok;

use crate::transport::buffer::Buffer;
use crate::transport::decoder::Decoder;
use crate::transport::encoder::Answers;
use crate::transport::wire::Inbox;

/// The outcome for the bytes of a peer.
#[derive(Debug)]
pub struct Received {
    /// Bytes that are let through.
    pub passed: Vec<u8>,
    /// How many messages and events the program gets, unless frames do not belong together.
    pub messages: Result<usize, Fault>,
    /// Bytes that are held back, as they begin a frame that is not whole.
    pub pending: Vec<u8>,
    /// The fault that ends the connection, if any.
    pub outcome: Result<(), Fault>,
    /// The first close frame.
    pub closed: Option<Close>,
}

/// Receives the bytes of a peer as the stream does, at most `chunk` at a time, up to the end of the stream.
pub fn receive(sent: &[u8], chunk: usize) -> Received {
    let (mut buffer, mut passed, mut closed) = (Buffer::new(), Vec::new(), None);
    let (mut decoder, mut for_amiquip) = (Decoder::default(), Vec::new());
    let (mut inbox, mut answers, mut decoded) = (Inbox::default(), Answers::default(), Ok(()));
    let mut rest = sent;
    let outcome = loop {
        let room = buffer.room();
        let length = chunk.max(1).min(rest.len()).min(room.len());
        room[..length].copy_from_slice(&rest[..length]);
        rest = &rest[length..];
        let checked = buffer.received(length);
        closed = closed.or(buffer.take_closed());
        let let_through = buffer.take();
        passed.extend(let_through);
        decoded = decoded
            .and_then(|()| decoder.decode(let_through, &mut for_amiquip, &mut inbox, &mut answers));
        if checked.is_err() || length == 0 {
            break checked;
        }
    };
    let (pending, messages) = (buffer.rest().to_vec(), decoded.map(|()| inbox.messages.len()));
    Received { passed, messages, pending, outcome, closed }
}
