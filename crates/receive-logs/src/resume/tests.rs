//! The position file and the mark in the output, with real files.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::thread;

use clap::Parser;
use logs_tests::{Message, TempFile};

use super::*;
use crate::testing::{Alerts, alert, messages};

fn cli(position: &TempFile, options: &[&str]) -> Cli {
    let position = position.path().to_str().unwrap();
    let arguments = ["receive-logs", "--raw", "--stream", "s", "--resume", position];
    Cli::parse_from([&arguments, options].concat())
}

fn open(position: &TempFile) -> Result<ResumeFile, Failure> {
    ResumeFile::open(&cli(position, &[]), alert).map(|file| file.expect("--resume"))
}

fn failure(outcome: Result<ResumeFile, Failure>) -> String {
    outcome.err().expect("a failure").to_string()
}

fn origin() -> Origin {
    let name = |name: &str| name.to_string();
    Origin { cluster: name("c"), vhost: name("/"), exchange: name("logs"), stream: name("s") }
}

/// The output of the receiver with this position.
fn output_to(file: &TempFile, position: &TempFile) -> Output {
    Output::open(&cli(position, &["-o", file.path().to_str().unwrap()]), alert).unwrap()
}

fn write(output: &mut Output, text: &str) {
    output.write(&messages(&[Message::new(text)])[0]).unwrap();
    let _ = output.flush().unwrap();
}

/// The file of a receiver that was killed: it wrote and recorded `recorded`, and then wrote `lost`. Returns the
/// position as the next receiver opens it.
fn killed(file: &TempFile, position: &TempFile, recorded: &str, lost: &str) -> ResumeFile {
    let mut resume = open(position).unwrap();
    let mut output = output_to(file, position);
    write(&mut output, recorded);
    resume.record(origin(), Place::First, vec![], &output);
    write(&mut output, lost);
    drop(resume);
    open(position).unwrap()
}

/// The alerts while the output is truncated.
fn truncated(resume: &ResumeFile, file: &TempFile, is_unbroken: bool) -> Vec<String> {
    Alerts::during(|| resume.truncate_output(Some(file.path()), is_unbroken).unwrap())
}

const REPEATED: &str = "up to 10000 messages, or one batch more, may be repeated: the previous receiver ended \
                        without recording its position";

/// The same if the output is a file, with a position once a second.
const REPEATED_OF_A_SECOND: &str = "the messages of the last second may be repeated: the previous receiver ended \
                                    without recording its position";

#[test]
fn without_the_option_there_is_no_file() {
    let cli = Cli::parse_from(["receive-logs", "--stream", "s"]);
    assert!(ResumeFile::open(&cli, alert).unwrap().is_none());
}

#[test]
fn the_next_receiver_gets_the_last_position() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let mut resume = open(&position).unwrap();
    assert_eq!((resume.place(), resume.origin()), (None, None));
    assert!(truncated(&resume, &file, true).is_empty());
    let mut output = output_to(&file, &position);
    for place in [Place::First, Place::Since(7), Place::Tail(3)] {
        write(&mut output, "a");
        resume.record(origin(), place, vec![], &output);
        assert_eq!((resume.place(), resume.origin()), (Some(place), Some(&origin())));
    }
    drop(resume);
    let resume = open(&position).unwrap();
    assert_eq!((resume.place(), resume.origin()), (Some(Place::Tail(3)), Some(&origin())));
    let mode = fs::metadata(position.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_file_of_another_program_or_version_is_an_error() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    drop(killed(&file, &position, "a", "b"));
    let content = String::from_utf8(position.read().unwrap()).unwrap();
    for (content, reason) in [
        ("hello\n".to_string(), "it holds no position: expected value at line 1 column 1"),
        (
            content.replace("\"version\":1", "\"version\":2"),
            "its position was written by another version",
        ),
    ] {
        let foreign = TempFile::with("foreign", content.as_bytes());
        let text =
            format!("resume from {:?}: {reason} (remove the file to start over)", foreign.path());
        assert_eq!(failure(open(&foreign)), text);
        assert_eq!(foreign.read().unwrap(), content.as_bytes());
    }
    let binary = TempFile::with("binary", b"\xff\xfe");
    let text = format!("resume from {:?}: it holds no position: ", binary.path());
    let failure = open(&binary).err().expect("the content of another program");
    assert_eq!(failure.status, Status::Config);
    assert!(failure.to_string().starts_with(&text), "{failure}");
}

#[test]
fn a_position_is_locked_by_one_receiver() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let mut resume = open(&position).unwrap();
    let in_use = format!("resume from {:?}: another receiver uses it", position.path());
    assert_eq!(failure(open(&position)), in_use);
    // Each record of the position creates a new file, which must be locked too.
    resume.record(origin(), Place::First, vec![], &output_to(&file, &position));
    assert_eq!(failure(open(&position)), in_use);
    drop(resume);
    open(&position).unwrap();
}

#[test]
fn opening_waits_for_a_receiver_that_ends() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let mut holder = open(&position).unwrap();
    let ending = thread::spawn({
        let output = output_to(&file, &position);
        move || {
            thread::sleep(Duration::from_millis(100));
            // Each record replaces the file that the next receiver waits for.
            holder.record(origin(), Place::First, vec![], &output);
            thread::sleep(Duration::from_millis(100));
        }
    });
    assert_eq!(open(&position).unwrap().place(), Some(Place::First));
    ending.join().unwrap();
}

#[test]
fn unrecorded_output_is_truncated() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let resume = killed(&file, &position, "recorded", "lost");
    let cut = format!(
        "{:?} is truncated by 5 bytes to the last recorded position: the messages in them are written again",
        file.path()
    );
    assert_eq!(truncated(&resume, &file, true), [cut]);
    assert_eq!(file.read().unwrap(), b"recorded\n");
    // A second receiver has nothing to truncate.
    assert_eq!(truncated(&resume, &file, true), [""; 0]);
    assert_eq!(truncated(&resume, &file, false), [""; 0]);
    assert_eq!(file.read().unwrap(), b"recorded\n");
}

#[test]
fn a_long_file_is_truncated_inside_a_record() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let recorded = "x".repeat(10_000);
    let resume = killed(&file, &position, &recorded, "lost");
    let cut = File::options().write(true).open(file.path()).unwrap();
    cut.set_len(10_003).unwrap();
    assert_eq!(truncated(&resume, &file, true).len(), 1);
    assert_eq!(file.read().unwrap(), format!("{recorded}\n").as_bytes());
}

#[test]
fn output_that_the_stream_may_lack_is_kept() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let resume = killed(&file, &position, "recorded", "lost");
    assert_eq!(truncated(&resume, &file, false), [REPEATED_OF_A_SECOND]);
    assert_eq!(file.read().unwrap(), b"recorded\nlost\n");
}

#[test]
fn another_file_is_not_truncated() {
    type Change = fn(&Path);
    let rotated: Change = |path| {
        fs::rename(path, path.with_extension("1")).unwrap();
        fs::write(path, "recorded\nother\n").unwrap();
    };
    let removed: Change = |path| {
        fs::remove_file(path).unwrap();
        fs::write(path, "recorded\nother\n").unwrap();
    };
    let gone: Change = |path| fs::remove_file(path).unwrap();
    let shorter: Change = |path| fs::write(path, "note").unwrap();
    let rewritten: Change = |path| fs::write(path, "other\nthan before\n").unwrap();
    for change in [rotated, removed, gone, shorter, rewritten] {
        let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
        let resume = killed(&file, &position, "recorded", "lost");
        change(file.path());
        let content = file.read().ok();
        let mut expected = vec![REPEATED_OF_A_SECOND.to_string()];
        if content.as_ref().is_some_and(|content| content == b"note") {
            let path = file.path();
            let lacks =
                "is shorter than when the position was recorded: messages are missing from it";
            expected.insert(0, format!("{path:?} {lacks}"));
        }
        assert_eq!(truncated(&resume, &file, true), expected);
        assert_eq!(file.read().ok(), content);
    }
}

#[test]
fn a_mark_in_an_empty_file_matches_no_later_file() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let mut resume = open(&position).unwrap();
    let inode = |file: &TempFile| fs::metadata(file.path()).unwrap().ino();
    let output = output_to(&file, &position);
    resume.record(origin(), Place::First, vec![], &output);
    let before = inode(&file);
    drop((resume, output));
    fs::remove_file(file.path()).unwrap();
    fs::write(file.path(), "precious\n").unwrap();
    // As on a file system that gives the inode of a deleted file to the next file.
    let note = String::from_utf8(position.read().unwrap()).unwrap();
    let inodes = [before, inode(&file)].map(|inode| format!("\"inode\":{inode},"));
    fs::write(position.path(), note.replace(&inodes[0], &inodes[1])).unwrap();
    let resume = open(&position).unwrap();
    assert_eq!(truncated(&resume, &file, true), [REPEATED_OF_A_SECOND]);
    assert_eq!(file.read().unwrap(), b"precious\n");
}

#[test]
fn without_a_file_nothing_is_truncated() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let resume = killed(&file, &position, "recorded", "lost");
    let alerts = Alerts::during(|| resume.truncate_output(None, true).unwrap());
    assert_eq!(alerts, [REPEATED_OF_A_SECOND]);
    // The output is a pipe or a device when the position is recorded.
    let mut resume = resume;
    let device = TempFile::new("device");
    symlink("/dev/null", device.path()).unwrap();
    resume.record(origin(), Place::Since(1), vec![], &output_to(&device, &position));
    assert_eq!(truncated(&resume, &device, true), [REPEATED]);
}

#[test]
fn a_complete_position_keeps_the_output() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let mut resume = killed(&file, &position, "recorded", "lost");
    let mut output = output_to(&file, &position);
    resume.record(origin(), Place::First, vec![], &output);
    resume.complete(&output).unwrap();
    drop(resume);
    // Another program writes to the file.
    write(&mut output, "theirs");
    let mut resume = open(&position).unwrap();
    assert_eq!(truncated(&resume, &file, true), [""; 0]);
    assert_eq!(file.read().unwrap(), b"recorded\nlost\ntheirs\n");
    // A receiver that continues is not complete, even at the same place.
    resume.record(origin(), Place::First, vec![], &output);
    drop(resume);
    write(&mut output, "more");
    assert_eq!(truncated(&open(&position).unwrap(), &file, true).len(), 1);
    assert_eq!(file.read().unwrap(), b"recorded\nlost\ntheirs\n");
}

#[test]
fn a_file_without_a_position_is_complete() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let mut resume = open(&position).unwrap();
    resume.complete(&output_to(&file, &position)).unwrap();
    assert_eq!(position.read().unwrap(), b"");
}

#[test]
fn a_failed_record_is_reported_once_and_at_the_end() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let mut output = output_to(&file, &position);
    let mut resume = open(&position).unwrap();
    resume.record(origin(), Place::First, vec![], &output);
    write(&mut output, "a");
    // A directory blocks the new file.
    let beside = position.path().with_extension("new");
    fs::rename(position.path(), position.path().with_extension("kept")).unwrap();
    fs::create_dir(position.path()).unwrap();
    let alerts = Alerts::during(|| {
        for time in 1..=3 {
            resume.record(origin(), Place::Since(time), vec![], &output);
        }
    });
    let error =
        format!("record the position in {:?}: Is a directory (os error 21)", position.path());
    let expected = format!("{error}; messages written from now on are repeated after a restart");
    assert_eq!(alerts, std::slice::from_ref(&expected));
    assert_eq!(resume.place(), Some(Place::First), "the place that is in the file");
    // The directory is gone. The last place is not recorded, and the one before is not complete.
    fs::remove_dir(position.path()).unwrap();
    let failure = resume.complete(&output).unwrap_err();
    assert_eq!(failure.to_string(), error);
    assert!(!position.path().exists());
    resume.record(origin(), Place::Since(4), vec![], &output);
    resume.complete(&output).unwrap();
    assert!(!beside.exists());
    fs::remove_file(position.path()).unwrap();
    fs::create_dir(position.path()).unwrap();
    let alerts = Alerts::during(|| resume.record(origin(), Place::Since(5), vec![], &output));
    assert_eq!(alerts, [expected]);
}

#[test]
fn a_file_that_cannot_be_truncated_is_an_error() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let resume = killed(&file, &position, "recorded", "lost");
    let path = file.path().join("below");
    let failure = resume.truncate_output(Some(&path), true).unwrap_err();
    let text = format!("truncate {path:?}: Not a directory (os error 20)");
    assert_eq!(failure.to_string(), text);
}

#[test]
fn a_position_is_due_after_many_messages_or_a_second() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let mut output = output_to(&file, &position);
    let mut resume = open(&position).unwrap();
    resume.record(origin(), Place::First, vec![], &output);
    assert!(!resume.is_due(1));
    assert_eq!(resume.next_time(Place::First), None);
    write(&mut output, "a");
    let message = r#"{"after":{"position":{"offset":1,"checksum":2,"sent":3},"skip":0}}"#;
    let after: Place = serde_json::from_str(message).unwrap();
    resume.record(origin(), after, vec![], &output);
    let due = resume.next_time(Place::First).unwrap();
    assert!(due <= Instant::now() + INTERVAL);
    // The file can be truncated, so the number of records does not matter.
    assert!(!resume.is_due(10_001));
    resume.last.as_mut().unwrap().output = None;
    for (written, is_due) in [(1, false), (10_000, false), (10_001, true)] {
        assert_eq!(resume.is_due(written), is_due, "{written}");
    }
    resume.recorded_at = resume.recorded_at.checked_sub(INTERVAL).unwrap();
    assert!(resume.is_due(1));
}

#[test]
fn the_first_message_is_due_once_and_not_after_an_error() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let output = output_to(&file, &position);
    let mut resume = open(&position).unwrap();
    resume.record(origin(), Place::First, vec![], &output);
    let message = r#"{"at":{"position":{"offset":0,"checksum":2,"sent":3},"skip":0}}"#;
    let first: Place = serde_json::from_str(message).unwrap();
    assert!(resume.is_first(first));
    assert!(!resume.is_first(Place::Since(1)));
    resume.error = "an error".into();
    assert!(!resume.is_first(first));
    resume.record(origin(), first, vec![], &output);
    assert!(!resume.is_first(first));
}

#[test]
fn the_output_may_change_at_the_same_place() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let mut resume = open(&position).unwrap();
    let mut output = output_to(&file, &position);
    resume.record_again(&output);
    assert_eq!(resume.place(), None);
    write(&mut output, "a");
    resume.record(origin(), Place::First, vec![], &output);
    fs::rename(file.path(), file.path().with_extension("1")).unwrap();
    output.reopen().unwrap();
    resume.record_again(&output);
    write(&mut output, "b");
    drop(resume);
    assert_eq!(truncated(&open(&position).unwrap(), &file, true).len(), 1);
    assert_eq!(file.read().unwrap(), b"");
}

#[test]
fn a_file_that_is_renamed_before_it_is_reopened_has_no_mark() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let mut resume = open(&position).unwrap();
    let mut output = output_to(&file, &position);
    let renamed = file.path().with_extension("1");
    fs::rename(file.path(), &renamed).unwrap();
    write(&mut output, "a");
    resume.record(origin(), Place::First, vec![], &output);
    drop(resume);
    fs::rename(&renamed, file.path()).unwrap();
    assert_eq!(truncated(&open(&position).unwrap(), &file, true), [REPEATED]);
    assert_eq!(file.read().unwrap(), b"a\n");
}

#[test]
fn positions_are_synced_once_a_second_or_with_a_file() {
    let (file, position) = (TempFile::new("log"), TempFile::new("pos"));
    let mut resume = open(&position).unwrap();
    let device = TempFile::new("device");
    symlink("/dev/null", device.path()).unwrap();
    let opened = resume.synced_at;
    resume.record(origin(), Place::First, vec![], &output_to(&device, &position));
    assert_eq!(resume.synced_at, opened, "not synced again within the second");
    resume.synced_at = opened.checked_sub(INTERVAL).unwrap();
    resume.record(origin(), Place::Since(1), vec![], &output_to(&device, &position));
    assert!(resume.synced_at > opened, "synced once a second");
    let before = resume.synced_at;
    resume.record(origin(), Place::Since(2), vec![], &output_to(&file, &position));
    assert!(resume.synced_at > before, "synced with a file");
}
