//! `--lines`: standard input to messages, live.

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use amqp::Coalescer;
use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, TryRecvError, bounded};
use logs_common::exit::{Failure, Status};
use logs_common::notes::last_words;
use logs_common::signals::{self, StopSignals};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::cli::Cli;
use crate::counts::Counts;
use crate::input::{Chunk, InputError, READ_BUFFER, Records};
use crate::packer::Packer;
use crate::progress::Progress;
use crate::publisher::Publisher;

/// How long the broker may take to confirm the rest after a signal.
const GRACE: Duration = Duration::from_secs(5);

/// Publishes each record of standard input until its end or a signal, and waits until all are
/// confirmed. Returns the signal that stopped it.
///
/// # Errors
///
/// Those of the publisher; input that cannot be read, and a record that is too large, after all
/// before it are confirmed.
pub fn publish(cli: &Cli, stop: StopSignals, publisher: Publisher) -> Result<Option<i32>> {
    let counts = publisher.counts();
    let counted = Arc::clone(&counts);
    let stop = stop.handle(GRACE, move |signal| report_stop(signal, &counted));
    // Not through io::stdin, which has a buffer of its own.
    let stdin = io::stdin().as_fd().try_clone_to_owned().context("read standard input")?;
    publish_file(stdin.into(), cli, &stop, publisher)?;
    let signal = stop.try_recv().ok();
    if let Some(signal) = signal {
        report_stop(signal, &counts);
    }
    Ok(signal)
}

/// Publishes each record of a file until its end or a `stop`.
fn publish_file(
    file: File,
    cli: &Cli,
    stop: &Receiver<i32>,
    mut publisher: Publisher,
) -> Result<()> {
    publisher.number_messages();
    let counts = publisher.counts();
    let mut input = Input::start(file, cli, Arc::clone(&counts)).context("read standard input")?;
    let mut packer = Packer::new(cli.separator(), cli.batch);
    let progress = Progress::start(cli, Arc::clone(&counts)).context("show the progress")?;

    let read = copy(&mut input, stop, &progress, &mut packer, &mut publisher)?;
    publisher.finish()?;
    if let Err(error) = read {
        return Err(describe(&error, cli)).context(counts.to_string());
    }
    progress.finish();
    Ok(())
}

/// Publishes what comes until the end of the input, an error of it, or a signal.
fn copy(
    input: &mut Input,
    stop: &Receiver<i32>,
    progress: &Progress,
    packer: &mut Packer,
    publisher: &mut Publisher,
) -> Result<Result<(), InputError>> {
    loop {
        let chunk = match stop.is_empty() {
            true if publisher.is_ready() => input.chunks.try_recv(),
            true => Err(TryRecvError::Empty),
            false => input.last_chunk(),
        };
        match chunk {
            Ok(Ok(chunk)) => {
                progress.add(chunk.bytes.len());
                packer.add(chunk.bytes);
                for message in packer.by_ref() {
                    publisher.publish(message)?;
                }
            }
            Ok(Err(error)) => return Ok(Err(error)),
            Err(TryRecvError::Disconnected) => return Ok(Ok(())),
            Err(TryRecvError::Empty) => publisher.wait(&input.chunks, stop)?,
        }
    }
}

fn describe(error: &InputError, cli: &Cli) -> Failure {
    match error {
        InputError::Io(error) => Failure::io("read standard input", error),
        InputError::TooLarge(record) => Failure::new(
            Status::Data,
            format!("record {record} is larger than {} (--max-record)", cli.max_record),
        ),
    }
}

fn report_stop(signal: i32, counts: &Counts) {
    let name = signals::name(signal);
    last_words(format_args!("emit-log: stopped by {name}: {counts}"));
}

/// Standard input, read by a thread of its own, as a read may take for ever. It hands one chunk
/// over while it reads the next, so that the producer is held back as by any pipe.
struct Input {
    chunks: Receiver<Result<Chunk, InputError>>,
    /// Nothing more is read once this is dropped.
    reading: Option<PipeWriter>,
}

impl Input {
    fn start(file: File, cli: &Cli, counts: Arc<Counts>) -> io::Result<Input> {
        let (stop, reading) = io::pipe()?;
        let max_record = cli.max_record.as_u64() as usize;
        let source = Source { file, stop, is_drained: false, coalescer: Coalescer::new() };
        let mut records = Records::new(source, cli.separator(), max_record, cli.skip_empty);
        let (sender, chunks) = bounded(0);
        thread::Builder::new().spawn(move || {
            while let Some(chunk) = records.next_chunk().transpose() {
                let is_last = chunk.is_err();
                counts.add_read(chunk.as_ref().map_or(0, |chunk| chunk.records));
                if sender.send(chunk).is_err() || is_last {
                    break;
                }
            }
        })?;
        Ok(Input { chunks, reading: Some(reading) })
    }

    /// What was read before and is not handed over yet; `Disconnected` if there is no more.
    fn last_chunk(&mut self) -> Result<Result<Chunk, InputError>, TryRecvError> {
        drop(self.reading.take());
        match self.chunks.recv() {
            Err(_) | Ok(Err(InputError::Io(_))) => Err(TryRecvError::Disconnected),
            Ok(chunk) => Ok(chunk),
        }
    }
}

/// A file that cannot be read any more, not even by a read that waits, when the other end of `stop`
/// is dropped.
struct Source {
    file: File,
    stop: PipeReader,
    /// Nothing was left to be read.
    is_drained: bool,
    coalescer: Coalescer,
}

impl Read for Source {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let ends = [self.stop.as_fd(), self.file.as_fd()];
        let mut watched = ends.map(|end| PollFd::from_borrowed_fd(end, PollFlags::IN));
        while let Err(Errno::INTR) = poll(&mut watched, None) {}
        if !watched[0].revents().is_empty() {
            return Err(io::Error::other("stopped"));
        }
        if self.is_drained {
            self.coalescer.pause();
        }
        let length = self.file.read(out)?;
        self.is_drained = length < out.len().min(READ_BUFFER);
        Ok(length)
    }
}
