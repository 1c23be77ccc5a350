//! From the bytes of a peer to messages, for `tests/fuzz`, which has no socket.

pub use crate::frame::{FRAME_MAX, Fault};
pub use crate::start_ok::extend_start_ok;

use crate::content::{Assembler, Message};
use crate::frame::{Frame, FrameReader};
use crate::method::{self, Method};

/// What the bytes of a peer hold.
#[derive(Debug)]
pub struct Received {
    /// Frames, or parts of frames.
    pub frames: usize,
    /// Messages with their content.
    pub messages: usize,
    /// The fault that ends the connection, if any.
    pub outcome: Result<(), Fault>,
}

/// Receives the bytes of a peer as a connection does, at most `chunk` at a time, up to the end of the stream.
pub fn receive(mut sent: &[u8], chunk: usize) -> Received {
    let mut reader = FrameReader::new();
    let mut assembler = Assembler::default();
    let mut received = Received { frames: 0, messages: 0, outcome: Ok(()) };
    received.outcome = loop {
        if let Err(fault) = read_frames(&mut reader, &mut assembler, &mut received) {
            break Err(fault);
        }
        let room = reader.room();
        let length = chunk.max(1).min(sent.len()).min(room.len());
        if length == 0 {
            break reader.finish();
        }
        room[..length].copy_from_slice(&sent[..length]);
        sent = &sent[length..];
        reader.add(length);
    };
    received
}

fn read_frames(
    reader: &mut FrameReader,
    assembler: &mut Assembler,
    received: &mut Received,
) -> Result<(), Fault> {
    while let Some(frame) = reader.next()? {
        received.frames += 1;
        let complete = match frame {
            Frame::Heartbeat => None,
            Frame::Header { part, is_last } => assembler.add_header(part, is_last)?,
            Frame::Body(part) => assembler.add_body(part, false)?,
            Frame::Method { id, arguments, .. } => {
                match method::read(id, arguments) {
                    Ok(Method::Deliver(delivery)) => {
                        assembler.begin(Message::Delivery(delivery))?
                    }
                    Ok(Method::Return(returned)) => assembler.begin(Message::Returned(returned))?,
                    // Those of the login, and answers.
                    _ => {}
                }
                None
            }
        };
        received.messages += usize::from(complete.is_some());
    }
    Ok(())
}
