//! The program inside the test guests: measures what a shell cannot, and prints one line per fact on the console.
//!
//! * `console` obeys lines from standard input (`stats`, `poweroff`, `sh COMMAND`), prints `ALIVE` each second and watches the
//!   power button.
//! * `ping ADDR…` prints `PING4 ok ms=…` once each address has answered; `closed ADDR PORT` prints what a connection meets.
//! * `fetch ADDR` gets the page once; `fetches ADDR` every 100 ms, each over a new connection.
//! * `bench LOAD…` loads the disk or the network for a benchmark ([`mod@bench`]).
//! * `gaps ADDR` pings every 20 ms and prints each silence above 50 ms and one `TICK` a second.
//!
//! An empty address is skipped: the kernel command line did not name one.

mod bench;

use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, BufRead, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["console"] => console(),
        ["ping", addresses @ ..] => addresses.iter().filter_map(|a| address(a)).for_each(ping),
        ["closed", peer, port] => {
            address(peer).into_iter().for_each(|a| closed(a, port.parse().unwrap_or(81)))
        }
        ["fetch", peer] => {
            address(peer).into_iter().for_each(|a| until(PATIENCE, || fetch(a)).unwrap_or_default())
        }
        ["fetches", peer] => address(peer).into_iter().for_each(fetches),
        ["gaps", peer] => address(peer).into_iter().for_each(gaps),
        ["bench", load @ ..] => bench::run(load),
        _ => say(
            "usage: guest-tool console | ping ADDR… | closed ADDR PORT | fetch ADDR | fetches ADDR | gaps ADDR | bench LOAD…",
        ),
    }
}

/// Prints one line in one write, so that lines of several processes do not mix.
fn say(line: &str) {
    let _ = io::stdout().write_all(format!("{line}\n").as_bytes());
}

fn address(text: &str) -> Option<IpAddr> {
    if text.is_empty() {
        return None;
    }
    text.parse().inspect_err(|_| say(&format!("BAD-ADDRESS {text}"))).ok()
}

fn uptime() -> String {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split_whitespace().next().unwrap_or("-").to_owned()
}

fn millis(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1e3)
}

/// Calls `attempt` until it succeeds or `limit` has passed.
fn until<T>(limit: Duration, attempt: impl Fn() -> Option<T>) -> Option<T> {
    let end = Instant::now() + limit;
    loop {
        if let Some(value) = attempt() {
            return Some(value);
        }
        if Instant::now() > end {
            return None;
        }
        thread::sleep(PAUSE);
    }
}

fn console() {
    thread::spawn(alive);
    thread::spawn(power_button);
    let stdin = io::stdin();
    loop {
        let mut line = String::new();
        match stdin.lock().read_line(&mut line) {
            // A console without a reader at the other end: wait, do not spin.
            Ok(0) | Err(_) => thread::sleep(SECOND),
            Ok(_) => obey(line.trim()),
        }
    }
}

fn obey(line: &str) {
    match line.split_once(' ').unwrap_or((line, "")) {
        ("", _) => {}
        ("stats", _) => stats(),
        ("poweroff", _) => power_off(),
        ("sh", command) => shell(command.to_owned()),
        (other, _) => say(&format!("UNKNOWN {other}: use stats, poweroff or sh COMMAND")),
    }
}

fn stats() {
    let counter = |name: &str| {
        let text = fs::read_to_string(format!("/sys/class/net/eth0/statistics/{name}")).unwrap_or_default();
        if text.is_empty() { "-".to_owned() } else { text.trim().to_owned() }
    };
    say(&format!("NETSTAT rx={} tx={}", counter("rx_bytes"), counter("tx_bytes")));
}

fn shell(command: String) {
    thread::spawn(move || {
        let status = Command::new("/bin/sh").args(["-c", &command]).status();
        say(&format!("SH rc={}", status.ok().and_then(|s| s.code()).unwrap_or(-1)));
    });
}

fn power_off() {
    let _ = Command::new("/etc/guest/off").status();
}

fn alive() {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    loop {
        say(&format!("ALIVE boot_id={} uptime={}", boot_id.trim(), uptime()));
        thread::sleep(SECOND);
    }
}

/// Switches off when the ACPI power button is pressed.
fn power_button() {
    let events = fs::read_dir("/dev/input").into_iter().flatten().flatten().map(|e| e.path());
    for path in events.filter(|p| p.to_string_lossy().contains("event")) {
        if let Ok(file) = File::open(path) {
            thread::spawn(move || watch_button(file));
        }
    }
}

// Linux Documentation/input/input.rst §5: struct input_event is 16 bytes of time, then type, code and value.
fn watch_button(mut file: File) {
    let mut event = [0_u8; 24];
    while file.read_exact(&mut event).is_ok() {
        if event[16..22] == [EV_KEY, 0, KEY_POWER, 0, 1, 0] {
            power_off();
        }
    }
}

/// Sends echo requests until one is answered.
fn ping(peer: IpAddr) {
    let name = if peer.is_ipv4() { "PING4" } else { "PING6" };
    let last = RefCell::new(None);
    match until(PATIENCE, || echo_once(peer).map_err(|error| last.replace(Some(error))).ok()) {
        Some(time) => say(&format!("{name} ok ms={}", millis(time))),
        None => say(&format!("{name} fail {:?}", last.into_inner())),
    }
}

fn echo_once(peer: IpAddr) -> io::Result<Duration> {
    let socket = echo_socket(peer)?;
    socket.set_read_timeout(Some(SECOND))?;
    let sent = Instant::now();
    socket.send(&echo_request(peer, 1))?;
    socket.recv(&mut [0; 128])?;
    Ok(sent.elapsed())
}

/// An ICMP echo socket: the kernel fills identifier and checksum and delivers only the replies to this socket.
fn echo_socket(peer: IpAddr) -> io::Result<UdpSocket> {
    let (family, protocol) = match peer {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    let socket = UdpSocket::from(socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, protocol)?);
    socket.connect(SocketAddr::new(peer, 0))?;
    Ok(socket)
}

// RFC 792 and RFC 4443 §4.1: type, code, checksum, identifier, sequence number, data.
fn echo_request(peer: IpAddr, sequence: u16) -> [u8; 64] {
    let mut packet = [0; 64];
    packet[0] = if peer.is_ipv4() { 8 } else { 128 };
    packet[6..8].copy_from_slice(&sequence.to_be_bytes());
    packet
}

/// Pings every 20 ms for ever. A gap is the time between two replies, so the period itself is part of it.
fn gaps(peer: IpAddr) {
    let socket = match echo_socket(peer) {
        Ok(socket) => socket,
        Err(e) => return say(&format!("GAPS-FAILED {e}")),
    };
    let sent = Arc::new(AtomicU64::new(0));
    if let Ok(sender) = socket.try_clone() {
        let sent = Arc::clone(&sent);
        thread::spawn(move || send_echoes(&sender, peer, &sent));
    }
    let _ = socket.set_read_timeout(Some(PERIOD));
    receive_echoes(&socket, &sent);
}

fn send_echoes(socket: &UdpSocket, peer: IpAddr, sent: &AtomicU64) {
    let mut next = Instant::now();
    let mut sequence = 0_u16;
    loop {
        sequence = sequence.wrapping_add(1);
        if socket.send(&echo_request(peer, sequence)).is_ok() {
            sent.fetch_add(1, Ordering::Relaxed);
        }
        next += PERIOD;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

fn receive_echoes(socket: &UdpSocket, sent: &AtomicU64) {
    let mut reply = [0_u8; 128];
    let (mut last, mut tick) = (Instant::now(), Instant::now());
    let (mut replies, mut longest) = (0_u64, Duration::ZERO);
    loop {
        let received = socket.recv(&mut reply).is_ok();
        let now = Instant::now();
        longest = longest.max(now - last);
        if received {
            replies += 1;
            if now - last > LONG_GAP {
                let sequence = u16::from_be_bytes([reply[6], reply[7]]);
                say(&format!("GAP seq={sequence} ms={} uptime={}", millis(now - last), uptime()));
            }
            last = now;
        }
        if now - tick >= SECOND {
            let sent = sent.swap(0, Ordering::Relaxed);
            say(&format!("TICK n={replies} sent={sent} max_gap_ms={} uptime={}", millis(longest), uptime()));
            (tick, replies, longest) = (now, 0, Duration::ZERO);
        }
    }
}

fn fetches(peer: IpAddr) {
    loop {
        let started = Instant::now();
        fetch(peer);
        thread::sleep(FETCH_PERIOD.saturating_sub(started.elapsed()));
    }
}

/// Gets the page over a new connection and prints the nonce in it.
fn fetch(peer: IpAddr) -> Option<()> {
    let name = if peer.is_ipv4() { "FETCH" } else { "FETCH6" };
    let started = Instant::now();
    let outcome = connect(peer, 8080).and_then(|stream| {
        let connected = started.elapsed();
        Ok((connected, page(stream)?))
    });
    let at = uptime();
    match outcome {
        Ok((connected, nonce)) => {
            let (connect_ms, ms) = (millis(connected), millis(started.elapsed()));
            say(&format!("{name} nonce={nonce} uptime={at} connect_ms={connect_ms} ms={ms}"));
            Some(())
        }
        Err(e) => {
            say(&format!("{name} fail={} uptime={at} ms={}", reason(&e), millis(started.elapsed())));
            None
        }
    }
}

fn connect(peer: IpAddr, port: u16) -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&SocketAddr::new(peer, port), TEN_SECONDS)
}

fn page(mut stream: TcpStream) -> io::Result<String> {
    stream.set_read_timeout(Some(TEN_SECONDS))?;
    stream.write_all(b"GET / HTTP/1.0\r\nHost: web\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(64 * 1024).read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_default();
    if head.lines().next().is_none_or(|status| !status.contains(" 200 ")) {
        return Err(io::Error::other("bad-status"));
    }
    Ok(body.trim().to_owned())
}

fn closed(peer: IpAddr, port: u16) {
    let outcome = TcpStream::connect_timeout(&SocketAddr::new(peer, port), 3 * SECOND);
    say(&match outcome {
        Ok(_) => format!("CLOSED open port={port}"),
        Err(e) if e.kind() == io::ErrorKind::TimedOut => format!("CLOSED dropped port={port}"),
        Err(e) => format!("CLOSED {} port={port}", reason(&e)),
    });
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => "timeout".to_owned(),
        io::ErrorKind::ConnectionRefused => "refused".to_owned(),
        io::ErrorKind::ConnectionReset => "reset".to_owned(),
        _ => error.to_string().replace(' ', "-"),
    }
}

const SECOND: Duration = Duration::from_secs(1);
const TEN_SECONDS: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(100);
const PERIOD: Duration = Duration::from_millis(20);
const LONG_GAP: Duration = Duration::from_millis(50);
const FETCH_PERIOD: Duration = Duration::from_millis(100);
const EV_KEY: u8 = 1;
const KEY_POWER: u8 = 116;

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_page_is_its_body_and_a_bad_status_is_an_error() {
        let serve = |answer: &'static str| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let at = listener.local_addr().unwrap();
            let server = thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 256];
                let length = stream.read(&mut request).unwrap();
                assert!(request[..length].starts_with(b"GET / "));
                stream.write_all(answer.as_bytes()).unwrap();
            });
            let page = page(TcpStream::connect(at).unwrap());
            server.join().unwrap();
            page
        };
        assert_eq!(serve("HTTP/1.0 200 OK\r\nA: b\r\n\r\n1234\n").unwrap(), "1234");
        assert!(serve("HTTP/1.0 404 Not Found\r\n\r\nno\n").is_err());
    }

    #[test]
    fn echo_requests_carry_type_and_sequence() {
        let four = echo_request("10.0.0.1".parse().unwrap(), 0x0102);
        assert_eq!((four[0], &four[6..8]), (8, &[1, 2][..]));
        assert_eq!(echo_request("fd00::1".parse().unwrap(), 1)[0], 128);
    }

    #[test]
    fn an_empty_address_is_skipped() {
        assert_eq!(address(""), None);
        assert!(address("fd00::1").is_some());
    }
}
