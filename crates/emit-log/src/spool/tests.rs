//! The spool as a database in a directory, without a broker.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::sync::mpsc::channel;
use std::thread;

use logs_common::wire::Packing;
use logs_process::exit::Status;
use tempfile::TempDir;

use super::*;

const MIB: u64 = 1024 * 1024;
const RUN: u64 = 0xf123_4567_89ab_cdef;

fn dir() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

fn try_open(dir: &Path, limit: u64, when_full: WhenFull) -> Result<Spool, Failure> {
    Spool::open(dir, limit, when_full, Arc::new(Counts::new(true)), |_| {})
}

fn open_with(dir: &TempDir, limit: u64, when_full: WhenFull) -> Spool {
    try_open(dir.path(), limit, when_full).expect("a spool")
}

fn open(dir: &TempDir) -> Spool {
    open_with(dir, 16 * MIB, WhenFull::Block)
}

fn message(number: u64) -> Message {
    Message { run: RUN, ..Message::single(format!("record {number}"), number) }
}

/// A time after the end of the test.
fn later() -> Instant {
    Instant::now() + Duration::from_secs(1000)
}

fn append(spool: &mut Spool, message: &Message) {
    spool.append(&Message { run: RUN, ..message.clone() }, later()).expect("no damage");
}

fn fill(spool: &mut Spool, numbers: impl IntoIterator<Item = u64>) {
    numbers.into_iter().for_each(|number| append(spool, &message(number)));
    spool.commit().expect("no damage");
}

fn read(spool: &mut Spool) -> Option<Message> {
    spool.read().expect("no damage")
}

/// The numbers of all remaining messages. Their bodies must be those of [`message`].
fn numbers(spool: &mut Spool) -> Vec<u64> {
    std::iter::from_fn(|| spool.read().expect("no damage"))
        .map(|read| {
            assert_eq!((read.run, &read.body), (RUN, &message(read.number).body));
            assert_eq!((read.packing, read.records), (Packing::Single, 1));
            read.number
        })
        .collect()
}

/// Confirms and deletes all messages that are read.
fn confirm(spool: &mut Spool) {
    spool.confirm(None);
    spool.commit().expect("no damage");
}

fn database(dir: &TempDir) -> PathBuf {
    dir.path().join(database::NAME)
}

/// Overwrites bytes in the file of the database.
fn overwrite(dir: &TempDir, place: u64, bytes: &[u8]) {
    let file = File::options().write(true).open(database(dir)).expect("a database");
    file.write_all_at(bytes, place).expect("a place");
}

fn open_error(dir: &Path) -> (Status, String) {
    let error = try_open(dir, MIB, WhenFull::Block).err().expect("it is refused");
    (error.status, error.to_string().replace(&dir.display().to_string(), "DIR"))
}

#[test]
fn messages_are_read_as_they_were_written() {
    let dir = dir();
    let batch = Message::joined("a\n\nb".into(), Packing::Lines, 7);
    let nul = Message::joined("a\nb\0c".into(), Packing::Nul, 10);
    let empty = Message::single("", u64::MAX);
    for is_committed in [false, true] {
        let mut spool = open(&dir);
        assert_eq!(spool.counts.spooled(), 0);
        for message in [&batch, &nul, &empty] {
            append(&mut spool, message);
        }
        if is_committed {
            spool.commit().expect("no damage");
        }
    }
    let mut spool = open(&dir);
    assert_eq!(spool.counts.spooled(), 6);
    for expected in [batch, nul, empty] {
        let message = spool.read().expect("no damage").expect("a message");
        let of = |m: &Message| (m.body.clone(), m.packing, m.records, m.number, m.timestamp);
        assert_eq!((message.run, of(&message)), (RUN, of(&expected)));
    }
    assert!(read(&mut spool).is_none() && !spool.has_unread());
}

#[test]
fn a_spool_is_read_while_it_is_written_and_without_a_commit() {
    let dir = dir();
    let mut spool = open_with(&dir, MIB, WhenFull::Block);
    let mut expected = 1;
    for number in 1..=20_000 {
        append(&mut spool, &message(number));
        if number % 7 == 0 {
            spool.commit().expect("no damage");
        }
        if number % 3 == 0 {
            for _ in 0..2 {
                assert_eq!(read(&mut spool).expect("a message").number, expected);
                expected += 1;
            }
        }
        if number % 1000 == 0 {
            spool.confirm(None);
        }
    }
    assert_eq!(numbers(&mut spool), (expected..=20_000).collect::<Vec<_>>());
    confirm(&mut spool);
    drop(spool);
    let spool = open(&dir);
    assert!(spool.counts.spooled() == 0 && !spool.has_unread());
}

#[test]
fn confirmed_messages_are_not_read_again() {
    let dir = dir();
    fill(&mut open(&dir), 1..=5000);
    let mut left = 1;
    while left <= 5000 {
        let mut spool = open(&dir);
        assert_eq!(spool.counts.spooled(), 5001 - left);
        for number in left..(left + 617).min(5001) {
            assert_eq!(read(&mut spool).map(|message| message.number), Some(number));
        }
        left += 617;
        confirm(&mut spool);
    }
    assert!(numbers(&mut open(&dir)).is_empty());
}

#[test]
fn a_full_disk_does_not_stop_messages_on_it() {
    let dir = dir();
    let mut spool = open(&dir);
    fill(&mut spool, 1..=3);
    spool.failure = Some(("full".into(), Instant::now()));
    assert_eq!(numbers(&mut spool), [1, 2, 3]);
    // A failed read is retried later.
    spool.failure = None;
    fill(&mut spool, 4..=4);
    spool.read_failure = Some(("no disk".into(), Instant::now()));
    assert!(read(&mut spool).is_none() && spool.next_time().is_some());
    thread::sleep(RETRY);
    assert_eq!(numbers(&mut spool), [4]);
    assert_eq!(spool.failure(), None);
}

#[test]
fn an_unconfirmed_message_keeps_all_later_ones() {
    let dir = dir();
    let mut spool = open(&dir);
    fill(&mut spool, 1..=5);
    let second = (read(&mut spool), read(&mut spool)).1.expect("a message");
    numbers(&mut spool);
    spool.confirm(second.position);
    spool.commit().expect("no damage");
    drop(spool);
    assert_eq!(numbers(&mut open(&dir)), [2, 3, 4, 5]);
}

#[test]
fn messages_that_were_sent_before_are_not_read() {
    let dir = dir();
    let mut spool = open(&dir);
    let mut sent = message(1);
    spool.append_sent(&mut sent);
    assert!(!spool.has_unread() && sent.position.is_some());
    fill(&mut spool, 2..=3);
    assert_eq!(numbers(&mut spool), [2, 3]);
    spool.confirm(sent.position);
    drop(spool);
    assert_eq!(numbers(&mut open(&dir)), [1, 2, 3]);
}

#[test]
fn a_message_confirmed_before_its_commit_is_not_written() {
    let dir = dir();
    let mut spool = open(&dir);
    let mut sent = [message(1), message(2), message(3)];
    sent.iter_mut().for_each(|message| spool.append_sent(message));
    append(&mut spool, &message(4));
    spool.confirm(sent[2].position);
    spool.commit().expect("no damage");
    assert_eq!(numbers(&mut spool), [4]);
    drop(spool);
    let mut spool = open(&dir);
    assert_eq!((spool.counts.spooled(), numbers(&mut spool)), (2, vec![3, 4]));
}

#[test]
fn pending_messages_are_written_in_time() {
    let dir = dir();
    let mut spool = open(&dir);
    let now = Instant::now();
    let second = Duration::from_secs(1);
    spool.append(&message(1), now + 3 * second).expect("no damage");
    spool.append(&message(2), now + 2 * second).expect("no damage");
    spool.sync_due = None;
    assert_eq!(spool.next_time(), Some(now + 2 * second));
    spool.work(now + second).expect("no damage");
    assert_eq!(spool.facts.records, 0);
    spool.work(now + 2 * second).expect("no damage");
    assert_eq!(spool.facts.records, 2);
    assert_eq!(spool.next_time(), None);
    assert!(spool.sync_time().is_some_and(|time| time <= Instant::now() + SYNC));
    spool.flush().expect("no damage");
    assert_eq!(spool.sync_time(), None);
}

#[test]
fn a_full_log_is_synced_at_once() {
    let dir = dir();
    let mut spool = open_with(&dir, MIB, WhenFull::Block);
    spool.flush().expect("no damage");
    let log = || fs::metadata(dir.path().join("spool.db-wal")).unwrap().len();
    for number in 1..=20 {
        append(&mut spool, &Message::single(vec![b'x'; 16 * 1024], number));
        let is_due = spool.sync_time().is_some_and(|time| time <= Instant::now());
        assert_eq!(is_due, log() > 64 * 1024, "{number}: {}", log());
        if is_due {
            spool.flush().expect("no damage");
            // The log starts again, so the next commit does not wait for the disk.
            assert!(!spool.database.is_wal_full() && log() <= 64 * 1024 + 4096, "{}", log());
        }
    }
}

#[test]
fn a_spool_has_one_process_and_private_files() {
    let parent = dir();
    let path = parent.path().join("a/spool");
    let mut first = try_open(&path, MIB, WhenFull::Block).expect("a spool");
    fill(&mut first, [1]);
    let in_use = "open the spool DIR: another emit-log is using it".to_string();
    assert_eq!(open_error(&path), (Status::Io, in_use));
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    for file in fs::read_dir(&path).unwrap() {
        assert_eq!(mode(&file.unwrap().path()), 0o600);
    }
    let ending = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        drop(first);
    });
    assert!(
        try_open(&path, MIB, WhenFull::Block).is_ok(),
        "it waits for a process that is about to exit"
    );
    ending.join().unwrap();
}

#[test]
fn an_empty_database_frees_its_space() {
    let dir = dir();
    let mut spool = open(&dir);
    let large = Message::single(vec![b'x'; 3 * MIB as usize], 1);
    append(&mut spool, &large);
    spool.flush().expect("no damage");
    let size = || fs::metadata(database(&dir)).unwrap().len();
    assert!(size() > 3 * MIB);
    assert!(read(&mut spool).is_some());
    confirm(&mut spool);
    spool.sync().expect("no damage");
    assert!(size() < MIB / 16, "{}", size());
    fill(&mut spool, 2..=3);
    assert_eq!(numbers(&mut spool), [2, 3]);
}

/// Adds more records than fit into a spool of 1 MiB, and returns the numbers of those that remain.
fn overfill(when_full: WhenFull) -> Vec<u64> {
    let dir = dir();
    let mut spool = open_with(&dir, MIB, when_full);
    for number in 1..=40_000 {
        append(&mut spool, &message(number));
    }
    spool.flush().expect("no damage");
    let size: u64 =
        fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(size <= MIB, "{size}");
    drop(spool);
    let mut spool = open_with(&dir, MIB, when_full);
    let left = numbers(&mut spool);
    let (dropped, bytes) = spool.counts.dropped();
    assert_eq!(dropped + left.len() as u64, 40_000);
    assert_eq!(spool.counts.spooled(), left.len() as u64);
    let expected = (1..=40_000).filter(|number| left.binary_search(number).is_err());
    assert_eq!(bytes, expected.map(|number| message(number).body.len()).sum::<usize>() as u64);
    left
}

#[test]
fn the_newest_records_are_dropped_and_counted() {
    let left = overfill(WhenFull::DropNewest);
    assert_eq!(left, (1..=left.len() as u64).collect::<Vec<_>>());
    assert!(left.len() > 15_000, "{}", left.len());
}

#[test]
fn the_oldest_records_are_dropped_and_counted() {
    let left = overfill(WhenFull::DropOldest);
    assert_eq!(left, (left[0]..=40_000).collect::<Vec<_>>());
    assert!(left.len() > 15_000, "{}", left.len());
}

#[test]
fn only_as_many_records_are_dropped_as_needed() {
    let dir = dir();
    let mut spool = open_with(&dir, 4 * MIB, WhenFull::DropOldest);
    let large = |number| Message::single(vec![b'x'; 100 * 1024], number);
    (1..=60).for_each(|number| append(&mut spool, &large(number)));
    spool.commit().expect("no damage");
    let (dropped, _) = spool.counts.dropped();
    // Each message needs 25 pages.
    let room = spool.database.capacity(4 * MIB) / (25 * 4096);
    assert!((60 - room..=62 - room).contains(&dropped), "{dropped}, with room for {room}");
    // Confirmed messages make room.
    (0..20).for_each(|_| assert!(read(&mut spool).is_some()));
    spool.confirm(None);
    (61..=75).for_each(|number| append(&mut spool, &large(number)));
    spool.commit().expect("no damage");
    assert_eq!(spool.counts.dropped().0, dropped);
}

#[test]
fn records_in_flight_are_not_dropped() {
    let dir = dir();
    let mut spool = open_with(&dir, MIB, WhenFull::DropOldest);
    fill(&mut spool, 1..=10);
    let first = read(&mut spool).expect("a message");
    fill(&mut spool, 11..=40_000);
    spool.confirm(first.position);
    spool.commit().expect("no damage");
    drop(spool);
    let left = numbers(&mut open_with(&dir, MIB, WhenFull::Block));
    assert!(left.len() > 10_000 && left[0] == 1 && left[1] > 10_000, "{:?}", &left[..2]);
    assert_eq!(left[1..], (left[1]..=40_000).collect::<Vec<_>>());
}

#[test]
fn a_failure_blocks_the_input_while_messages_are_pending() {
    let dir = dir();
    let mut spool = open(&dir);
    let mut sent = message(1);
    spool.append_sent(&mut sent);
    spool.failure = Some(("full".into(), Instant::now()));
    assert!(!spool.has_room() && spool.next_time().is_some());
    spool.confirm(None);
    assert!(spool.has_room() && spool.failure().is_none());
    spool.append(&message(2), Instant::now()).expect("no damage");
    assert!(!spool.has_room());
    spool.failure = spool.failure.map(|(text, time)| (text, time - RETRY));
    spool.work(Instant::now()).expect("no damage");
    assert!(spool.has_room());
}

#[test]
fn a_record_larger_than_the_spool_drops_no_other() {
    for when_full in [WhenFull::DropOldest, WhenFull::DropNewest, WhenFull::Block] {
        let dir = dir();
        let mut spool = open_with(&dir, MIB, when_full);
        fill(&mut spool, 1..=1000);
        append(&mut spool, &Message::single(vec![b'x'; 2 * MIB as usize], 1001));
        spool.commit().expect("no damage");
        let is_dropped = u64::from(when_full != WhenFull::Block);
        assert_eq!(spool.counts.dropped(), (is_dropped, is_dropped * 2 * MIB));
        assert_eq!(spool.counts.spooled(), 1001 - is_dropped);
    }
}

#[test]
fn a_full_spool_that_blocks_accepts_records_read_before() {
    let dir = dir();
    let mut spool = open_with(&dir, MIB, WhenFull::Block);
    let mut number = 0;
    while spool.has_room() {
        number += 1;
        append(&mut spool, &message(number));
    }
    fill(&mut spool, [number + 1]);
    assert!(spool.size() < MIB + MIB / 8, "{}", spool.size());
    assert_eq!(numbers(&mut spool).len() as u64, number + 1);
    confirm(&mut spool);
    assert!(spool.has_room());
}

#[test]
fn a_later_run_reports_drops_that_were_not_reported() {
    let dir = dir();
    let mut spool = open_with(&dir, MIB, WhenFull::DropNewest);
    append(&mut spool, &Message::single(vec![b'x'; 2 * MIB as usize], 1));
    spool.commit().expect("no damage");
    drop(spool);
    let mut spool = open(&dir);
    assert_eq!(spool.counts.dropped(), (1, 2 * MIB));
    spool.close(|_| 0).expect("no damage");
    drop(spool);
    assert_eq!(open(&dir).counts.dropped(), (0, 0));
}

#[test]
fn a_removed_database_holds_nothing() {
    let dir = dir();
    let mut spool = open(&dir);
    fill(&mut spool, 1..=3);
    fs::remove_file(database(&dir)).unwrap();
    assert_eq!(read(&mut spool).map(|message| message.number), Some(1));
    spool.close(|_| 0).expect("no damage");
    assert_eq!((spool.counts.spooled(), spool.counts.dropped().0), (0, 3));
}

#[test]
fn an_unusable_spool_is_described() {
    let move_away = "(move spool.db* to another directory to begin with an empty spool)";
    let refuse = |what: &str, prepare: &dyn Fn(&Path)| {
        let dir = dir();
        prepare(dir.path());
        let text = format!("open the spool DIR: spool.db {what} {move_away}");
        assert_eq!(open_error(dir.path()), (Status::Config, text));
    };
    let db = |dir: &Path| dir.join(database::NAME);
    refuse("is not a regular file", &|dir| fs::create_dir(db(dir)).unwrap());
    refuse("is not a regular file", &|dir| symlink("/etc/hostname", db(dir)).unwrap());
    refuse("is not a regular file", &|dir| {
        rustix::fs::mknodat(
            rustix::fs::CWD,
            db(dir),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .unwrap();
    });
    refuse("is not a database", &|dir| fs::write(db(dir), "x".repeat(5000)).unwrap());
    refuse("is a database of another program", &|dir| {
        let other = rusqlite::Connection::open(db(dir)).unwrap();
        other.execute_batch("CREATE TABLE other (x)").unwrap();
    });
    refuse("has format 3; this emit-log only knows format 2", &|dir| {
        drop(try_open(dir, MIB, WhenFull::Block).unwrap());
        let later = rusqlite::Connection::open(db(dir)).unwrap();
        later.pragma_update(None, "user_version", 3).unwrap();
    });
    refuse("is damaged: its record count is missing or wrong", &|dir| {
        drop(try_open(dir, MIB, WhenFull::Block).unwrap());
        let damaged = rusqlite::Connection::open(db(dir)).unwrap();
        damaged.execute_batch("UPDATE facts SET records = 7").unwrap();
    });
    let old = dir();
    fs::write(old.path().join("mark"), "").unwrap();
    assert!(try_open(old.path(), MIB, WhenFull::Block).is_ok(), "the old spool is empty");
    fs::write(old.path().join("00000001.spool"), "").unwrap();
    let (status, text) = open_error(old.path());
    assert_eq!(status, Status::Config);
    assert!(text.contains("00000001.spool is a file of emit-log 0.2 (send it with"), "{text}");
}

#[test]
fn a_damaged_record_is_skipped_and_counted() {
    let dir = dir();
    fill(&mut open(&dir), 1..=100);
    let bytes = fs::read(database(&dir)).unwrap();
    // A page that was split may hold an old copy.
    for place in memchr::memmem::find_iter(&bytes, b"record 50") {
        overwrite(&dir, place as u64, b"RECORD 50");
    }
    let (alerts, reported) = channel();
    let alert = move |text| alerts.send(text).unwrap();
    let counts = Arc::new(Counts::new(true));
    let mut spool = Spool::open(dir.path(), MIB, WhenFull::Block, counts, alert).unwrap();
    let expected: Vec<_> = (1..=100).filter(|number| *number != 50).collect();
    assert_eq!(numbers(&mut spool), expected);
    assert_eq!((spool.counts.spooled(), spool.counts.dropped().0), (99, 1));
    let text = format!(
        "spool {}: records that are missing or damaged: 1; all others are sent",
        dir.path().display()
    );
    assert_eq!(reported.try_iter().collect::<Vec<_>>(), [text]);
    confirm(&mut spool);
    drop(spool);
    assert_eq!(open(&dir).counts.spooled(), 0);
}

#[test]
fn a_truncated_database_is_damaged() {
    let (dir, killed) = (dir(), dir());
    let mut spool = open(&dir);
    append(&mut spool, &Message::single(vec![b'x'; MIB as usize], 1));
    spool.flush().expect("no damage");
    for name in ["spool.db", "spool.db-wal"] {
        fs::copy(dir.path().join(name), killed.path().join(name)).unwrap();
    }
    let file = File::options().write(true).open(database(&killed)).unwrap();
    file.set_len(MIB - 16 * 1024).unwrap();
    let mut spool = open(&killed);
    assert_eq!(spool.read().err().map(|error| error.status), Some(Status::Config));
    file.set_len(MIB / 2).unwrap();
    assert_eq!(spool.flush().err().map(|error| error.status), Some(Status::Config));
}

/// Records of a damaged spool are read as they were written. All others are counted, or the spool is rejected.
#[test]
fn random_damage_is_never_a_silent_loss() {
    const RECORDS: u64 = 2000;
    let master = dir();
    fill(&mut open(&master), 1..=RECORDS);
    let bytes = fs::read(database(&master)).unwrap();
    let mut random = fastrand::Rng::with_seed(24);
    let (mut refused, mut counted, mut unharmed) = (0, 0, 0);
    for round in 0..500 {
        let mut bytes = bytes.clone();
        let place = random.usize(..bytes.len());
        match round % 4 {
            0 => bytes[place] ^= 1 << random.u8(..8),
            1 => (0..20).for_each(|_| {
                let place = random.usize(..bytes.len());
                bytes[place] = random.u8(..);
            }),
            2 => {
                let page = place / 4096 * 4096;
                let other = random.usize(..bytes.len()) / 4096 * 4096;
                bytes.copy_within(other..other + 4096, page);
            }
            _ => bytes.truncate(place),
        }
        let dir = dir();
        fs::write(database(&dir), bytes).unwrap();
        let Ok(mut spool) = try_open(dir.path(), MIB, WhenFull::Block) else {
            refused += 1;
            continue;
        };
        let before = spool.counts.spooled();
        let mut last = 0;
        let outcome = loop {
            match spool.read() {
                Ok(Some(found)) => {
                    assert_eq!((found.run, &found.body), (RUN, &message(found.number).body));
                    assert!(found.number > last, "{round}: {} after {last}", found.number);
                    last = found.number;
                }
                other => break other.map(drop),
            }
        };
        let read = spool.in_flight.len() as u64;
        if outcome.is_err() {
            assert!(spool.counts.spooled() >= read, "{round}");
            refused += 1;
            continue;
        }
        let lost = spool.counts.dropped().0;
        assert_eq!(read + lost, before, "{round}");
        // An empty file is a new spool.
        assert!(before == RECORDS || before == 0 && read == 0, "{round}: {before}");
        assert_eq!(spool.counts.spooled(), read, "{round}");
        spool.confirm(None);
        match spool.close(|_| 0) {
            Ok(()) => {
                drop(spool);
                assert_eq!(open(&dir).counts.spooled(), 0, "{round}");
            }
            Err(error) => assert_eq!(error.status, Status::Config, "{round}"),
        }
        match lost {
            0 => unharmed += 1,
            _ => counted += 1,
        }
    }
    println!("{refused} refused, {counted} with losses that were counted, {unharmed} unharmed");
    assert!(refused > 0 && counted > 0 && unharmed > 0);
}
