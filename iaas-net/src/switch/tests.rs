//! A whole switch in this process, between ports that are opened as a runner would open them.

use std::sync::mpsc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use iaas_core::Term;
use iaas_core::spi::Tag;
use iaas_core::spi::dataplane::Env;
use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::PortOpener;
use iaas_core::spi::dataplane::frame::VNET_HEADER;
use iaas_core::spi::network::NetObject;
use iaas_core::spi::network::PlugSpec;
use iaas_core::spi::target::Mode;
use iaas_core::spi::target::Target;

use super::*;
use crate::folder::StoredPlug;
use crate::folder::Totals;
use crate::port::RingOpener;
use crate::port::opener::Token;
use crate::topology::mac_of;
use crate::topology::numbered;
use crate::topology::port;
use crate::topology::vpc;

/// A host's network folder, with ports 10 and 20 in one subnet.
struct Host {
    dir: tempfile::TempDir,
}

struct Running {
    commands: Sender<Command>,
    waker: Waker,
    thread: JoinHandle<Result<()>>,
}

impl Host {
    fn new() -> Self {
        let host = Self { dir: tempfile::tempdir().unwrap() };
        host.folder().make().unwrap();
        let mut objects = vpc(1);
        objects.extend([port(1, 0, 10, &[]), port(1, 0, 20, &[])]);
        host.program(1, objects);
        host.plug(10);
        host.plug(20);
        host
    }

    fn folder(&self) -> Folder {
        Folder::new(self.dir.path().join("net"))
    }

    fn program(&self, rev: u64, objects: Vec<NetObject>) {
        self.folder()
            .set_program(&StoredProgram { incarnation: uuid::Uuid::nil(), rev: Rev(rev), objects })
            .unwrap();
    }

    fn socket(&self, p: u8) -> PathBuf {
        self.dir.path().join(format!("{p}.sock"))
    }

    fn plug(&self, p: u8) {
        let tag = Tag { cloud: numbered(1), incarnation: uuid::Uuid::nil(), rev: Rev(1) };
        let spec = PlugSpec { port: numbered(p.into()), term: Term(1), queues: 1 };
        let plug = StoredPlug { tag, spec, socket: self.socket(p), ended: Vec::new() };
        self.folder().set_plug(numbered(p.into()), &plug).unwrap();
    }

    fn counted(&self, p: u8) -> Totals {
        self.folder().counters(numbered(p.into()), Term(1)).unwrap().totals()
    }

    /// Opens a port as a runner would: first outside the jail, then inside.
    fn open(&self, p: u8) -> Box<dyn FramePort> {
        let token = Token::new(self.socket(p), Offloads::default());
        let forms = vec![token.form().unwrap()];
        let target = Target {
            id: numbered::<Plug>(p.into()).uuid(),
            term: Term(1),
            mode: Mode::Write,
            forms,
            key: None,
        };
        let grant = RingOpener.prepare(&target).unwrap();
        RingOpener.open(&target, grant, &Env::default()).unwrap().remove(0)
    }

    fn start(&self) -> Running {
        let mut switch = Switch::new(self.dir.path().join("net"), Offloads::default(), Limits::default(), 1)
            .unwrap()
            .with_patience(Duration::from_secs(60));
        let (commands, inbox) = mpsc::channel();
        let waker = switch.waker();
        Running { commands, waker, thread: std::thread::spawn(move || switch.run(&inbox)) }
    }
}

impl Running {
    fn ask<T: Send + 'static>(&self, what: impl FnOnce(&mut Switch) -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::channel();
        self.commands.send(Box::new(move |switch| answer.send(what(switch)).unwrap())).unwrap();
        self.waker.wake();
        answered.recv().unwrap()
    }

    /// Ends the thread between two turns, as a kill would at that moment.
    fn stop(self) {
        drop(self.commands);
        self.waker.wake();
        self.thread.join().unwrap().unwrap();
    }
}

/// A UDP frame from port `p` to port `q` with a number in it.
fn frame(p: u8, q: u8, number: u8) -> Vec<u8> {
    let mut out = Vec::new();
    crate::wire::begin(&mut out, mac_of(q), mac_of(p), crate::wire::IPV4);
    crate::wire::ipv4(&mut out, 17, [10, 1, 0, p], [10, 1, 0, q], 9);
    out.extend_from_slice(&[0, 1, 0, 2, 0, 9, 0, 0, number]);
    out
}

/// The next frame that is not an advertisement, if there is one.
fn try_recv(port: &mut dyn FramePort) -> Option<Vec<u8>> {
    loop {
        let (mut into, mut lens) = ([IoBuffers::zeroed(2048)], [0]);
        port.recv(&mut into, &mut lens).ok()?;
        let mut frame = vec![0; lens[0] as usize];
        into[0].read_at(0, &mut frame);
        if frame[VNET_HEADER + 12..][..2] != [0x86, 0xdd] {
            return Some(frame);
        }
    }
}

/// The next frame that is not an advertisement; waits for it as a runner does.
fn recv(port: &mut dyn FramePort) -> Vec<u8> {
    loop {
        if let Some(frame) = try_recv(port) {
            return frame;
        }
        let mut fds =
            [rustix::event::PollFd::from_borrowed_fd(port.event_fd(), rustix::event::PollFlags::IN)];
        // A minute is for ever here; a test that waits so long has failed.
        let minute = rustix::event::Timespec { tv_sec: 60, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&minute)), Ok(1), "no frame came");
    }
}

fn send(port: &mut dyn FramePort, frame: &[u8]) {
    assert_eq!(port.send(&[IoBuffers::copied(frame)]).unwrap(), 1);
}

#[test]
fn frames_pass_and_are_counted_as_the_guests_count_them() {
    let host = Host::new();
    let (mut a, mut b) = (host.open(10), host.open(20));
    let switch = host.start();
    up(&switch, &mut *a, &mut *b);
    let before = (host.counted(10), host.counted(20));
    for n in 0..100 {
        send(&mut *a, &frame(10, 20, n));
        assert_eq!(recv(&mut *b), frame(10, 20, n));
        send(&mut *b, &frame(20, 10, n));
        assert_eq!(recv(&mut *a), frame(20, 10, n));
    }
    // The counters are set before the sender gets its room back, which the next command comes after.
    switch.ask(|_| ());
    let bytes = 100 * (frame(10, 20, 0).len() - VNET_HEADER) as u64;
    for (p, before) in [(10, before.0), (20, before.1)] {
        let now = host.counted(p);
        assert_eq!((now.tx_packets - before.tx_packets, now.tx_bytes - before.tx_bytes), (100, bytes));
        assert!(now.rx_packets - before.rx_packets >= 100);
    }
    switch.stop();
}

#[test]
fn frames_that_are_sent_while_the_switch_is_dead_arrive_when_it_is_back() {
    let host = Host::new();
    let (mut a, mut b) = (host.open(10), host.open(20));
    let switch = host.start();
    up(&switch, &mut *a, &mut *b);
    send(&mut *a, &frame(10, 20, 0));
    assert_eq!(recv(&mut *b), frame(10, 20, 0));
    switch.stop();
    for n in 1..50 {
        send(&mut *a, &frame(10, 20, n));
    }
    let switch = host.start();
    // The sender's runner is the faster one: its frames wait for the receiver's.
    while !switch.ask(|s| s.status().plugs[&numbered(10)]) {
        let _ = try_recv(&mut *a);
    }
    switch.ask(|_| ());
    switch.ask(|_| ());
    let mut got = up(&switch, &mut *a, &mut *b);
    while got.len() < 49 {
        got.push(recv(&mut *b));
    }
    assert_eq!(got, (1..50).map(|n| frame(10, 20, n)).collect::<Vec<_>>());
    switch.ask(|_| ());
    assert_eq!(host.counted(10).tx_packets, 50, "the count goes on");
    switch.stop();
}

/// Lets both ports look around until they are up; the frames that the second got meanwhile, but for advertisements.
fn up(switch: &Running, a: &mut dyn FramePort, b: &mut dyn FramePort) -> Vec<Vec<u8>> {
    let mut got = Vec::new();
    while !switch.ask(|s| s.status().plugs.values().all(|up| *up)) {
        let _ = try_recv(a);
        got.extend(try_recv(b));
    }
    got
}

#[test]
fn a_new_program_and_a_new_plug_take_effect_on_reload() {
    let host = Host::new();
    let switch = host.start();
    let mut objects = vpc(1);
    objects.extend([port(1, 0, 10, &[]), port(1, 0, 30, &[])]);
    host.program(2, objects);
    host.plug(30);
    host.folder().remove_plug(numbered(20)).unwrap();
    let status = switch.ask(|s| s.reload().map(|()| s.status())).unwrap();
    assert_eq!(status.program, Rev(2));
    let plugs: Vec<Id<Plug>> = status.plugs.into_keys().collect();
    assert_eq!(plugs, [numbered(10), numbered(30)]);
    // A program that does not compile leaves the old one.
    host.program(3, vec![port(1, 0, 10, &[])]);
    let refused = switch.ask(|s| s.reload().map_err(|e| e.kind()));
    assert_eq!(refused, Err(iaas_core::ErrorKind::Invalid));
    assert_eq!(switch.ask(|s| s.status().program), Rev(2));
    switch.stop();
}
