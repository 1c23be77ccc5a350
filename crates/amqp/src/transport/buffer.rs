//! Received bytes, of which only those are used that the filter lets through.

use std::mem;

use super::frame_filter::{Close, FRAME_MAX, Fault, FrameFilter};

/// Bytes asked of the kernel at a time, at most: as many as a frame may have.
const READ_BUFFER: usize = FRAME_MAX as usize;

/// Bytes on their way from the socket.
pub struct Buffer {
    filter: FrameFilter,
    bytes: Vec<u8>,
    /// Bytes from `start` to `checked` are let through, those from there to `end` are not yet.
    start: usize,
    checked: usize,
    end: usize,
}

impl Buffer {
    /// An empty buffer.
    pub fn new() -> Buffer {
        let bytes = vec![0; READ_BUFFER];
        Buffer { filter: FrameFilter::default(), bytes, start: 0, checked: 0, end: 0 }
    }

    /// The room for more bytes, once all that are let through have been read; never empty.
    pub fn room(&mut self) -> &mut [u8] {
        // The rest begins a frame that is longer than the part of it that has come.
        self.bytes.copy_within(self.checked..self.end, 0);
        (self.start, self.checked, self.end) = (0, 0, self.end - self.checked);
        &mut self.bytes[self.end..]
    }

    /// Takes note of so many bytes in the [`room`](Buffer::room); 0 for the end of the stream.
    ///
    /// # Errors
    ///
    /// As for [`FrameFilter::check`] and [`FrameFilter::end`].
    pub fn received(&mut self, length: usize) -> Result<(), Fault> {
        if length == 0 {
            return self.filter.end(&self.bytes[..self.end]);
        }
        self.end += length;
        self.checked = self.filter.check(&mut self.bytes[..self.end])?;
        Ok(())
    }

    /// The close frame of the broker, the first time after it has come.
    pub fn take_closed(&mut self) -> Option<Close> {
        self.filter.closed.take()
    }

    /// Takes the bytes that are let through.
    pub fn take(&mut self) -> &[u8] {
        &self.bytes[mem::replace(&mut self.start, self.checked)..self.checked]
    }

    /// Bytes that are held back.
    #[cfg(feature = "fuzzing")]
    pub fn rest(&self) -> &[u8] {
        &self.bytes[self.checked..self.end]
    }
}
