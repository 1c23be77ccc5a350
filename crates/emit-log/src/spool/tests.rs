//! The spool as files in a directory, without a broker.

use std::os::unix::fs::PermissionsExt;

use logs_common::wire::Packing;
use tempfile::TempDir;

use super::entry::ENTRY_HEADER;
use super::*;

const MIB: u64 = 1024 * 1024;
const RUN: u64 = 0x0123_4567_89ab_cdef;

fn dir() -> TempDir {
    tempfile::tempdir().expect("a directory")
}

fn counts() -> Arc<Counts> {
    Arc::new(Counts::new(true))
}

fn open_with(dir: &TempDir, limit: u64, when_full: WhenFull) -> Spool {
    open_saying(dir, limit, when_full, |_| {})
}

fn open_saying(
    dir: &TempDir,
    limit: u64,
    when_full: WhenFull,
    alert: impl Fn(String) + Send + 'static,
) -> Spool {
    Spool::open(dir.path(), limit, when_full, counts(), alert).expect("a spool")
}

fn open(dir: &TempDir) -> Spool {
    open_with(dir, 16 * MIB, WhenFull::Block)
}

fn message(number: u64) -> Message {
    Message::single(format!("record {number}"), number)
}

fn fill(spool: &mut Spool, numbers: impl IntoIterator<Item = u64>) {
    numbers.into_iter().for_each(|number| spool.append(RUN, &message(number)));
    spool.commit();
}

/// The numbers of all messages that are left, whose bodies must be those of [`message`].
fn numbers(spool: &mut Spool) -> Vec<u64> {
    std::iter::from_fn(|| spool.read())
        .map(|Spooled { run, message: read }| {
            assert_eq!((run, &read.body), (RUN, &message(read.number).body));
            assert_eq!((read.packing, read.records), (Packing::Single, 1));
            read.number
        })
        .collect()
}

fn files(dir: &TempDir) -> Vec<String> {
    let files = fs::read_dir(dir.path()).unwrap();
    let mut names: Vec<_> =
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name != MARK);
    names.sort();
    names
}

#[test]
fn messages_come_back_as_they_were() {
    let dir = dir();
    let mut spool = open(&dir);
    let batch = Message::joined("a\n\nb".into(), Packing::Lines, 7);
    let nul = Message::joined("a\nb\0c".into(), Packing::Nul, 10);
    let empty = Message::single("", 12);
    for message in [&batch, &nul, &empty] {
        spool.append(RUN, message);
    }
    drop(spool);
    assert!(files(&dir).is_empty(), "nothing was committed");
    let mut spool = open(&dir);
    for message in [&batch, &nul, &empty] {
        spool.append(RUN, message);
    }
    spool.sync();
    drop(spool);
    let mut spool = open(&dir);
    assert_eq!(spool.counts.spooled(), 6);
    for expected in [batch, nul, empty] {
        let Spooled { run, message } = spool.read().expect("a message");
        let of = |m: &Message| (m.body.clone(), m.packing, m.records, m.number, m.timestamp);
        assert_eq!((run, of(&message)), (RUN, of(&expected)));
    }
    assert!(spool.read().is_none() && !spool.has_unread());
}

#[test]
fn a_spool_is_read_while_it_is_written_and_without_a_commit() {
    let dir = dir();
    let mut spool = open_with(&dir, MIB, WhenFull::Block);
    let mut expected = 1;
    for number in 1..=20_000 {
        spool.append(RUN, &message(number));
        if number % 7 == 0 {
            spool.commit();
        }
        if number % 3 == 0 {
            for _ in 0..2 {
                assert_eq!(spool.read().expect("a message").message.number, expected);
                expected += 1;
            }
        }
        if number % 1000 == 0 {
            spool.acknowledge(None);
        }
    }
    assert_eq!(numbers(&mut spool), (expected..=20_000).collect::<Vec<_>>());
    spool.acknowledge(None);
    assert!(spool.is_empty() && files(&dir).is_empty());
}

#[test]
fn what_is_acknowledged_is_not_read_again() {
    let dir = dir();
    let mut spool = open_with(&dir, MIB, WhenFull::Block);
    fill(&mut spool, 1..=5000);
    assert!(files(&dir).len() > 2, "{:?}", files(&dir));
    let mut left = 1;
    loop {
        drop(spool);
        spool = open_with(&dir, MIB, WhenFull::Block);
        assert_eq!(spool.counts.spooled(), 5000 - (left - 1));
        for _ in 0..617 {
            if spool.read().is_none() {
                assert_eq!(left, 5000 / 617 * 617 + 1);
                spool.acknowledge(None);
                assert!(files(&dir).is_empty());
                return;
            }
        }
        left += 617;
        spool.acknowledge(None);
    }
}

#[test]
fn a_message_in_flight_keeps_its_place_and_all_behind_it() {
    let dir = dir();
    let mut spool = open(&dir);
    fill(&mut spool, 1..=5);
    let second = (spool.read(), spool.read()).1.expect("a message").message;
    numbers(&mut spool);
    spool.acknowledge(second.position);
    drop(spool);
    assert_eq!(numbers(&mut open(&dir)), [2, 3, 4, 5]);
}

#[test]
fn messages_that_are_sent_already_are_not_read() {
    let dir = dir();
    let mut spool = open(&dir);
    let mut sent = message(1);
    spool.append_sent(RUN, &mut sent);
    assert!(!spool.has_unread() && sent.position.is_some());
    fill(&mut spool, 2..=3);
    assert_eq!(numbers(&mut spool), [2, 3]);
    spool.acknowledge(sent.position);
    drop(spool);
    assert_eq!(numbers(&mut open(&dir)), [1, 2, 3]);
}

#[test]
fn a_file_that_ends_anywhere_gives_all_whole_messages_and_takes_more() {
    let master = dir();
    fill(&mut open(&master), 1..=3);
    let name = &files(&master)[0];
    let bytes = fs::read(master.path().join(name)).unwrap();
    let entry = ENTRY_HEADER + b"record 1".len();
    for length in 0..=bytes.len() {
        let dir = dir();
        fs::write(dir.path().join(name), &bytes[..length]).unwrap();
        let mut spool = open(&dir);
        let whole = (length.saturating_sub(FILE_HEADER) / entry) as u64;
        assert_eq!(spool.counts.spooled(), whole, "{length}");
        fill(&mut spool, [9]);
        assert_eq!(numbers(&mut spool), (1..=whole).chain([9]).collect::<Vec<_>>(), "{length}");
        spool.acknowledge(None);
        let is_whole =
            length == 0 || length >= FILE_HEADER && (length - FILE_HEADER).is_multiple_of(entry);
        let aside = if is_whole { vec![] } else { vec!["00000000.corrupt".to_string()] };
        assert_eq!(files(&dir), aside, "{length}");
    }
}

#[test]
fn a_flipped_byte_takes_at_most_the_message_that_holds_it() {
    let master = dir();
    fill(&mut open(&master), 1..=100);
    let name = &files(&master)[0];
    let bytes = fs::read(master.path().join(name)).unwrap();
    let mut starts = vec![FILE_HEADER];
    for number in 1..=100 {
        starts.push(starts[starts.len() - 1] + ENTRY_HEADER + message(number).body.len());
    }
    let dir = dir();
    for place in 0..bytes.len() {
        let mut bytes = bytes.clone();
        bytes[place] ^= 1 << (place % 8);
        for file in files(&dir) {
            fs::remove_file(dir.path().join(file)).unwrap();
        }
        fs::write(dir.path().join(MARK), []).unwrap();
        fs::write(dir.path().join(name), bytes).unwrap();
        let (alerts, said) = unbounded();
        let mut spool = open_saying(&dir, MIB, WhenFull::Block, move |text| {
            alerts.send(text).unwrap();
        });
        let lost = starts.iter().rposition(|start| *start <= place);
        let lost = lost.map(|index| index as u64 + 1);
        let expected: Vec<_> = (1..=100).filter(|number| Some(*number) != lost).collect();
        assert_eq!(numbers(&mut spool), expected, "{place}");
        let text: Vec<_> = said.try_iter().collect();
        assert!(
            text.len() == 1 && text[0].contains(" of 00000000.spool are no messages"),
            "{text:?}"
        );
        spool.acknowledge(None);
        assert_eq!(files(&dir), ["00000000.corrupt"], "{place}");
    }
}

#[test]
fn records_that_damage_has_taken_are_counted_where_a_later_file_tells_of_them() {
    let dir = dir();
    fill(&mut open_with(&dir, MIB, WhenFull::Block), 1..=5000);
    let names = files(&dir);
    let path = dir.path().join(&names[1]);
    let mut bytes = fs::read(&path).unwrap();
    bytes[FILE_HEADER + ENTRY_HEADER] ^= 1;
    fs::write(path, bytes).unwrap();
    let mut spool = open_with(&dir, MIB, WhenFull::Block);
    assert_eq!(spool.counts.spooled(), 5000);
    assert_eq!(numbers(&mut spool).len(), 4999);
    assert_eq!((spool.counts.dropped().0, spool.counts.spooled()), (1, 4999));
    spool.acknowledge(None);
    assert_eq!(files(&dir), [names[1].replace("spool", "corrupt")]);
}

#[test]
fn files_of_others_are_kept_aside() {
    let dir = dir();
    fs::write(dir.path().join("00000007.spool"), "not a spool").unwrap();
    fs::write(dir.path().join("notes.txt"), "not a spool").unwrap();
    let mut later = entry::file_header(0);
    later[7] = 2;
    let checksum = crc32fast::hash(&later[..16]);
    later[16..].copy_from_slice(&checksum.to_le_bytes());
    fs::write(dir.path().join("00000008.spool"), later).unwrap();
    let mut spool = open(&dir);
    fill(&mut spool, [1]);
    assert_eq!(numbers(&mut spool), [1]);
    spool.acknowledge(None);
    assert_eq!(files(&dir), ["00000007.corrupt", "00000008.corrupt", "notes.txt"]);
}

#[test]
fn a_lost_mark_sends_all_again() {
    for mark in [&b""[..], &[7; 20], &[7; 3]] {
        let dir = dir();
        let mut spool = open(&dir);
        fill(&mut spool, 1..=3);
        spool.read();
        spool.acknowledge(None);
        drop(spool);
        fs::write(dir.path().join(MARK), mark).unwrap();
        assert_eq!(numbers(&mut open(&dir)), [1, 2, 3]);
    }
}

#[test]
fn a_spool_has_one_user_and_is_nobody_elses_business() {
    let parent = dir();
    let path = parent.path().join("a/spool");
    let open = || Spool::open(&path, MIB, WhenFull::Block, counts(), |_| {});
    let mut first = open().expect("a spool");
    fill(&mut first, [1]);
    let error = open().err().expect("it is locked");
    assert_eq!(error.to_string(), "another emit-log is using it");
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    for file in fs::read_dir(&path).unwrap() {
        assert_eq!(mode(&file.unwrap().path()), 0o600);
    }
    let ending = thread::spawn(move || {
        thread::sleep(Duration::from_millis(100));
        drop(first);
    });
    assert!(open().is_ok(), "one that is about to end is waited for");
    ending.join().unwrap();
}

/// Fills a spool of 1 MiB with more than it takes, and returns what is left.
fn overfill(when_full: WhenFull) -> (Spool, Vec<u64>, TempDir) {
    let dir = dir();
    let mut spool = open_with(&dir, MIB, when_full);
    for number in 1..=40_000 {
        spool.append(RUN, &message(number));
    }
    spool.commit();
    assert!(spool.size() <= MIB);
    let left = numbers(&mut spool);
    let (dropped, bytes) = spool.counts.dropped();
    assert_eq!(dropped + left.len() as u64, 40_000);
    assert_eq!(spool.counts.spooled(), left.len() as u64);
    let expected = (1..=40_000).filter(|number| left.binary_search(number).is_err());
    let expected = expected.map(|number| ENTRY_HEADER + message(number).body.len());
    assert_eq!(bytes, expected.sum::<usize>() as u64);
    (spool, left, dir)
}

#[test]
fn the_newest_are_dropped_and_counted() {
    let (_, left, _dir) = overfill(WhenFull::DropNewest);
    assert_eq!(left, (1..=left.len() as u64).collect::<Vec<_>>());
    assert!(left.len() > 20_000, "{}", left.len());
}

#[test]
fn the_oldest_are_dropped_and_counted() {
    let (_, left, _dir) = overfill(WhenFull::DropOldest);
    assert_eq!(left, (left[0]..=40_000).collect::<Vec<_>>());
    assert!(left.len() > 19_000, "{}", left.len());
}

#[test]
fn the_oldest_that_are_dropped_are_none_that_are_being_sent() {
    let dir = dir();
    let mut spool = open_with(&dir, MIB, WhenFull::DropOldest);
    fill(&mut spool, 1..=10);
    let first = spool.read().expect("a message").message;
    fill(&mut spool, 11..=40_000);
    spool.acknowledge(first.position);
    drop(spool);
    let left = numbers(&mut open_with(&dir, MIB, WhenFull::Block));
    assert_eq!(left[..10], (1..=10).collect::<Vec<_>>());
}

#[test]
fn a_full_spool_that_blocks_takes_what_is_read_already() {
    let dir = dir();
    let mut spool = open_with(&dir, MIB, WhenFull::Block);
    let mut number = 0;
    while spool.has_room() {
        number += 1;
        spool.append(RUN, &message(number));
        spool.commit();
    }
    assert!(spool.size() < MIB + 100);
    fill(&mut spool, [number + 1]);
    assert_eq!(numbers(&mut spool).len() as u64, number + 1);
    spool.acknowledge(None);
    assert!(spool.has_room());
}

#[test]
fn what_cannot_be_written_is_read_from_memory_and_dropped_at_the_end() {
    let dir = dir();
    let mut spool = open(&dir);
    // A file that is in the way fails any attempt to write.
    fs::write(dir.path().join("00000000.spool"), "").unwrap();
    fill(&mut spool, 1..=3);
    assert!(!spool.has_room() && spool.next_commit().is_some());
    assert_eq!(spool.read().map(|spooled| spooled.message.number), Some(1));
    fs::remove_file(dir.path().join("00000000.spool")).unwrap();
    spool.sync();
    assert!(spool.has_room());
    fs::remove_file(dir.path().join("00000000.spool")).unwrap();
    assert_eq!(spool.counts.spooled(), 3);

    let dir = tempfile::tempdir().unwrap();
    let mut spool = open(&dir);
    fs::write(dir.path().join("00000000.spool"), "").unwrap();
    fill(&mut spool, 1..=3);
    spool.read();
    spool.sync();
    spool.drop_unwritten();
    assert_eq!((spool.counts.spooled(), spool.counts.dropped().0), (0, 3));
}
