use super::*;
use proptest::prelude::*;

/// A runner's port and a way to dial it.
struct Rig {
    port: RingPort,
    path: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("p.sock");
        let port = RingPort::new(socket::listen(&path).unwrap(), Offloads::default()).unwrap();
        Self { port, path, _dir: dir }
    }

    /// A switch that dials; the runner lets it in.
    fn dial(&mut self) -> RingLink {
        let peer = socket::dial(&self.path).unwrap();
        assert!(socket::receive_ring(&peer).unwrap().is_none());
        assert!(readable(&self.port), "the runner is told that somebody dials");
        self.idle();
        let memfd = socket::receive_ring(&peer).unwrap().unwrap();
        RingLink::new(memfd, peer).unwrap()
    }

    /// The runner looks for frames and finds none.
    fn idle(&mut self) {
        let got = self.port.recv(&mut [IoBuffers::zeroed(64)], &mut [0]);
        assert_eq!(got.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    fn send(&mut self, frame: &[u8]) -> bool {
        self.port.send(&[IoBuffers::copied(frame)]).is_ok()
    }

    fn recv(&mut self) -> Option<Vec<u8>> {
        let (mut into, mut lens) = ([IoBuffers::zeroed(LARGEST_FRAME)], [0]);
        self.port.recv(&mut into, &mut lens).ok()?;
        let mut out = vec![0; lens[0] as usize];
        into[0].read_at(0, &mut out);
        Some(out)
    }
}

fn readable(port: &RingPort) -> bool {
    let mut fds = [rustix::event::PollFd::from_borrowed_fd(port.event_fd(), rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}

fn next(link: &mut RingLink) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    link.next(&mut out).then_some(out)
}

/// Frame `n` of a row of any sizes.
fn frame(n: usize) -> Vec<u8> {
    let len = [26, 60, 1514, 9000, 40_000, LARGEST_FRAME][n % 6] + n % 6 % 2;
    vec![u8::try_from(n % 251).unwrap(); len.min(LARGEST_FRAME)]
}

#[test]
fn a_port_takes_of_what_is_wanted_only_what_was_agreed() {
    let all = Offloads { checksum: true, tso4: true, tso6: true, uso: true };
    let agreed = Offloads { checksum: true, tso4: true, ..Offloads::default() };
    let dir = tempfile::tempdir().unwrap();
    let listener = socket::listen(&dir.path().join("p.sock")).unwrap();
    let mut port = RingPort::new(listener, agreed).unwrap();
    assert_eq!(port.offloads(all), agreed);
    assert_eq!(port.offloads(Offloads { tso4: false, ..all }), Offloads { tso4: false, ..agreed });
    assert_eq!(port.offloads(Offloads::default()), Offloads::default());
}

#[test]
fn frames_of_all_sizes_cross_both_ways_many_times_around() {
    let mut rig = Rig::new();
    let mut link = rig.dial();
    for n in 0..200 {
        assert!(rig.send(&frame(n)));
        assert_eq!(next(&mut link), Some(frame(n)));
        link.release();
        assert!(link.give(&frame(n)));
        link.publish();
        assert_eq!(rig.recv(), Some(frame(n)));
    }
    assert_eq!((link.broken(), rig.port.inward.broken), (0, 0));
}

#[test]
fn a_switch_that_dies_loses_no_frame_and_the_next_one_goes_on() {
    let mut rig = Rig::new();
    // Before the first switch, frames wait.
    assert!(rig.send(&frame(0)) && rig.send(&frame(1)));
    let mut link = rig.dial();
    assert_eq!(next(&mut link), Some(frame(0)));
    link.release();
    // It reads two more, but dies before it has passed them on.
    assert!(rig.send(&frame(2)));
    assert_eq!((next(&mut link), next(&mut link)), (Some(frame(1)), Some(frame(2))));
    drop(link);
    assert!(readable(&rig.port), "the runner is told that the switch is gone");
    rig.idle();
    assert!(!rig.port.is_connected());
    assert!(rig.send(&frame(3)));
    let mut link = rig.dial();
    for n in 1..4 {
        assert_eq!(next(&mut link), Some(frame(n)));
    }
    link.release();
    assert_eq!(next(&mut link), None);
}

#[test]
fn a_new_switch_replaces_an_old_one_that_hangs() {
    let mut rig = Rig::new();
    let old = rig.dial();
    assert!(rig.send(&frame(1)));
    let mut new = rig.dial();
    assert!(!old.drain(), "the old one's socket has ended");
    assert_eq!(next(&mut new), Some(frame(1)));
}

#[test]
fn bells_ring_only_for_sleepers_and_never_too_late() {
    let mut rig = Rig::new();
    let mut link = rig.dial();
    let rung = |link: &RingLink| socket_has_message(link.peer());
    assert!(rig.send(&frame(0)));
    assert!(!rung(&link), "the switch does not sleep");
    next(&mut link).unwrap();
    link.release();
    assert!(!link.sleep());
    assert!(rig.send(&frame(1)));
    assert!(rung(&link));
    assert!(link.drain() && link.sleep(), "something came");
    // The runner sleeps after it found nothing.
    rig.idle();
    assert!(!readable(&rig.port));
    link.give(&frame(2));
    link.publish();
    assert!(readable(&rig.port));
    assert_eq!(rig.recv(), Some(frame(2)));
}

#[test]
fn a_full_ring_blocks_the_runner_until_the_switch_has_made_room() {
    let mut rig = Rig::new();
    let mut link = rig.dial();
    let mut sent = 0;
    while rig.send(&[7; 9000]) {
        sent += 1;
    }
    assert_eq!(sent, SIZE / 9008);
    rig.idle();
    assert!(!readable(&rig.port));
    next(&mut link).unwrap();
    link.release();
    assert!(readable(&rig.port), "the runner hears of the room");
    assert!(rig.send(&[7; 9000]) && !rig.send(&[7; 9000]));
}

#[test]
fn a_frame_that_does_not_fit_the_guests_buffer_is_dropped_and_counted() {
    let mut rig = Rig::new();
    let mut link = rig.dial();
    link.give(&[1; 100]);
    link.give(&[2; 60]);
    link.publish();
    let (mut into, mut lens) = ([IoBuffers::zeroed(64)], [0]);
    assert_eq!(rig.port.recv(&mut into, &mut lens).unwrap(), 1);
    assert_eq!((lens[0], rig.port.dropped()), (60, 1));
}

#[test]
fn a_ring_that_could_shrink_or_has_another_layout_is_refused() {
    let (peer, _other) = pair();
    let make = |seals: SealFlags, size: u64, magic: u64| {
        let fd = rustix::fs::memfd_create("x", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&fd, size).unwrap();
        let map = Mapping::new(&fd, 4096).unwrap();
        map.store(AT_MAGIC, magic);
        map.store(AT_SIZE, SIZE as u64);
        rustix::fs::fcntl_add_seals(&fd, seals).unwrap();
        fd
    };
    let good = (HEAD + 2 * SIZE) as u64;
    let open = |fd: OwnedFd| RingLink::new(fd, peer.try_clone().unwrap()).map(|_| ()).map_err(|e| e.kind());
    assert_eq!(open(make(SEALS, good, MAGIC)), Ok(()));
    assert_eq!(open(make(SealFlags::GROW | SealFlags::SEAL, good, MAGIC)), Err(io::ErrorKind::InvalidData));
    assert_eq!(open(make(SEALS, good - 4096, MAGIC)), Err(io::ErrorKind::InvalidData));
    assert_eq!(open(make(SEALS, good, MAGIC + 1)), Err(io::ErrorKind::InvalidData));
    let file = tempfile::tempfile().unwrap();
    file.set_len(good).unwrap();
    assert_eq!(open(file.into()), Err(io::ErrorKind::InvalidData));
}

#[test]
fn a_runner_that_sends_no_ring_is_refused() {
    let (ours, theirs) = pair();
    rustix::net::send(&theirs, b"notaring", rustix::net::SendFlags::empty()).unwrap();
    assert_eq!(socket::receive_ring(&ours).unwrap_err().kind(), io::ErrorKind::InvalidData);
    drop(theirs);
    assert_eq!(socket::receive_ring(&ours).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
}

proptest! {
    /// Whatever a runner writes into the ring, the switch neither panics nor loops, and what it reads has a bounded size.
    #[test]
    fn nonsense_in_the_ring_costs_only_its_writer(
        head in prop_oneof![any::<u64>(), 0u64..4096, (0u64..80_000).prop_map(|n| n * 8)],
        tail in prop_oneof![any::<u64>(), 0u64..4096, Just(0)],
        lens in prop::collection::vec(prop_oneof![any::<u64>(), 0u64..200_000], 1..8),
        then in any::<u64>(),
    ) {
        let mut rig = Rig::new();
        let map = rig.port.inward.map.clone();
        for (n, len) in lens.iter().enumerate() {
            map.store(OUT.data + n * 64, *len);
        }
        map.store(OUT.head, head);
        map.store(OUT.tail, tail);
        map.store(IN.tail, tail);
        map.store(IN.head, head);
        let mut link = rig.dial_hostile();
        let mut read = 0;
        while let Some(frame) = next(&mut link) {
            prop_assert!(frame.len() <= LARGEST_FRAME);
            read += 1;
            prop_assert!(read <= SIZE / 8, "the ring holds no more records");
        }
        link.release();
        link.give(&[1; 60]);
        link.publish();
        map.store(OUT.head, then);
        map.store(IN.tail, then);
        let _ = next(&mut link);
        link.release();
        link.give(&[1; 60]);
        link.publish();
        // The runner is no worse off with the switch's numbers.
        map.store(IN.head, then);
        let _ = rig.recv();
    }

    /// Any interleaving of sends, reads and deaths of the switch delivers every frame at least once and in order.
    #[test]
    fn no_frame_is_lost_over_deaths_of_the_switch(steps in prop::collection::vec(0u8..5, 1..60)) {
        let mut rig = Rig::new();
        let mut link = rig.dial();
        let (mut sent, mut released, mut read) = (0usize, 0usize, 0usize);
        for step in steps {
            match step {
                0 | 1 => sent += usize::from(rig.send(&frame(sent))),
                2 => {
                    if let Some(got) = next(&mut link) {
                        prop_assert_eq!(got, frame(read));
                        read += 1;
                    }
                }
                3 => {
                    link.release();
                    released = read;
                }
                _ => {
                    drop(link);
                    rig.idle();
                    link = rig.dial();
                    read = released;
                }
            }
        }
        while let Some(got) = next(&mut link) {
            prop_assert_eq!(got, frame(read));
            read += 1;
        }
        prop_assert_eq!(read, sent);
    }
}

impl Rig {
    /// As `dial`, when the runner's own view of the ring is broken.
    fn dial_hostile(&mut self) -> RingLink {
        let peer = socket::dial(&self.path).unwrap();
        let _ = self.port.recv(&mut [IoBuffers::zeroed(64)], &mut [0]);
        self.port.look_around();
        let memfd = socket::receive_ring(&peer).unwrap().unwrap();
        RingLink::new(memfd, peer).unwrap()
    }
}

fn pair() -> (OwnedFd, OwnedFd) {
    use rustix::net::*;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn socket_has_message(fd: &OwnedFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(fd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap() == 1
}
