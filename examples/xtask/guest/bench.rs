//! Loads on a disk and on a network, for a benchmark whose clock runs outside: each prints `BENCH-BEGIN NAME` and
//! `BENCH-END NAME count=N`, and what it counts lies between the two lines.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use crate::{PATIENCE, address, say, until};

/// `disk FILE read|write THREADS SECONDS`, `send ADDR PORT SECONDS` or `receive ADDR PORT SECONDS`.
pub(crate) fn run(words: &[&str]) {
    let outcome = match words {
        ["disk", file, verb @ ("read" | "write"), threads, seconds] => {
            disk(file, *verb == "write", number(threads), number(seconds))
        }
        ["send", peer, port, seconds] => tcp("net.tcp.out", peer, number(port), number(seconds), send),
        ["receive", peer, port, seconds] => tcp("net.tcp.in", peer, number(port), number(seconds), receive),
        _ => Err(io::Error::other("no such load")),
    };
    if let Err(error) = outcome {
        say(&format!("BENCH-FAILED {}: {error}", words.join(" ")));
    }
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or(1)
}

/// Reads or writes 4 KiB at random places past the page cache. Each thread has one operation under way, so their number is
/// the depth of the queue.
fn disk(path: &str, write: bool, threads: u64, seconds: u64) -> io::Result<()> {
    let open = || {
        let mut options = OpenOptions::new();
        options.read(true).write(write).custom_flags(OFlag::O_DIRECT.bits()).open(path)
    };
    // The driver's probe may not have come to its end yet.
    let mut file = until(PATIENCE, || open().ok()).map_or_else(open, Ok)?;
    let blocks = file.seek(SeekFrom::End(0))? / u64::try_from(BLOCK).unwrap_or(u64::MAX);
    if blocks == 0 {
        return Err(io::Error::other("the disk is empty"));
    }
    let name = if write { "blk.randwrite" } else { "blk.randread" };
    say(&format!("BENCH-BEGIN {name}"));
    let end = Instant::now() + Duration::from_secs(seconds);
    let count = thread::scope(|scope| {
        let file = &file;
        let work = move |seed| scope.spawn(move || one_by_one(file, write, blocks, seed, end));
        let all: Vec<_> = (1..=threads).map(work).collect();
        all.into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(PANICKED.into())))
            .sum::<io::Result<u64>>()
    })?;
    say(&format!("BENCH-END {name} count={count}"));
    Ok(())
}

fn one_by_one(file: &File, write: bool, blocks: u64, seed: u64, end: Instant) -> io::Result<u64> {
    let mut room = vec![u8::try_from(seed % 251).unwrap_or_default(); 2 * BLOCK];
    // O_DIRECT wants a place at a multiple of the block.
    let at = room.as_ptr().align_offset(BLOCK).min(BLOCK);
    let block = &mut room[at..at + BLOCK];
    let (mut place, mut count) = (seed.wrapping_mul(GOLDEN), 0);
    while Instant::now() < end {
        place = next(place);
        let offset = (place % blocks) << 12;
        if write { file.write_all_at(block, offset) } else { file.read_exact_at(block, offset) }?;
        count += 1;
    }
    Ok(count)
}

/// xorshift64, of Marsaglia, "Xorshift RNGs" (2003).
fn next(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ state << 17
}

fn tcp(
    name: &str,
    peer: &str,
    port: u64,
    seconds: u64,
    load: fn(&mut TcpStream, Instant) -> io::Result<u64>,
) -> io::Result<()> {
    let peer: IpAddr = address(peer).ok_or(io::ErrorKind::AddrNotAvailable)?;
    let peer = SocketAddr::new(peer, u16::try_from(port).map_err(io::Error::other)?);
    let connected = until(PATIENCE, || TcpStream::connect_timeout(&peer, Duration::from_secs(5)).ok());
    let mut stream = connected.ok_or(io::ErrorKind::TimedOut)?;
    say(&format!("BENCH-BEGIN {name}"));
    let count = load(&mut stream, Instant::now() + Duration::from_secs(seconds))?;
    say(&format!("BENCH-END {name} count={count}"));
    Ok(())
}

/// Sends, and then waits until the other side has taken everything and closes.
fn send(stream: &mut TcpStream, end: Instant) -> io::Result<u64> {
    let (chunk, mut count) = (vec![7; CHUNK], 0);
    while Instant::now() < end {
        stream.write_all(&chunk)?;
        count += chunk.len();
    }
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(count.try_into().unwrap_or_default())
}

fn receive(stream: &mut TcpStream, end: Instant) -> io::Result<u64> {
    let (mut chunk, mut count) = (vec![0; CHUNK], 0);
    while Instant::now() < end {
        count += match stream.read(&mut chunk)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            some => some,
        };
    }
    Ok(count.try_into().unwrap_or_default())
}

const BLOCK: usize = 4096;
const PANICKED: io::ErrorKind = io::ErrorKind::Other;
const CHUNK: usize = 64 << 10;
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn every_thread_goes_its_own_way_through_the_whole_disk() {
        let way = |seed: u64| {
            let first = next(seed.wrapping_mul(GOLDEN));
            std::iter::successors(Some(first), |at| Some(next(*at))).map(|at| at % 64)
        };
        let reached = way(1).take(2000).collect::<std::collections::BTreeSet<_>>();
        assert_eq!(reached.len(), 64);
        assert_ne!(way(1).take(10).collect::<Vec<_>>(), way(2).take(10).collect::<Vec<_>>());
    }

    #[test]
    fn what_was_sent_counts_only_when_the_other_side_has_it() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = thread::spawn(move || {
            let (mut far, _) = listener.accept().unwrap();
            io::copy(&mut far, &mut io::sink()).unwrap()
        });
        let sent = send(&mut stream, Instant::now() + Duration::from_millis(20)).unwrap();
        assert_eq!(far.join().unwrap(), sent);
    }
}
