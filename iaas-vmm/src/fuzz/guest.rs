//! A guest with one device: what it does is read from the input, and what the device does about it is checked against what
//! the guest allowed.

use std::io;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::MutexGuard;
use std::sync::PoisonError;

use iaas_core::Result;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestMemoryMmap;

use super::Input;
use super::walk;
use super::walk::Walk;
use crate::arch::layout;
use crate::pci::MsiMessage;
use crate::pci::NOTIFY;
use crate::pci::NOTIFY_STRIDE;
use crate::pci::VirtioPci;
use crate::pci::Wiring;
use crate::virtio::device::Next;
use crate::virtio::device::VirtioDevice;

/// What a target knows about its device.
pub(super) trait Subject {
    /// A driver's own kind of request, from the input.
    fn request(&mut self, guest: &mut Guest, input: &mut Input<'_>);

    /// Something happens behind the device.
    fn event(&mut self, input: &mut Input<'_>);

    /// Everything that is under way behind the device comes to its end.
    fn finish_all(&mut self);

    /// What the device is about to see; `features` are those that were agreed on.
    fn offered(&mut self, _queue: usize, _chain: &Walk, _memory: &GuestMemoryMmap) {}

    /// Nothing can be said any more about what the device sees.
    fn anything_goes(&mut self) {}

    /// Whether the device must work with a well-formed chain, or must not; `None` where both are fine.
    fn judge(&self, queue: usize, chain: &Walk, memory: &GuestMemoryMmap, features: u64) -> Option<bool>;

    /// A chain was given back, and nothing else was to be written where it was.
    fn answered(&self, _chain: &Walk, _memory: &GuestMemoryMmap) {}

    /// How many chains of a queue the device takes in a turn, whatever happens behind it.
    fn taken_at_once(&self) -> usize;
}

/// Plays the whole input, and then takes everything down.
pub(super) fn run(mut guest: Guest, subject: &mut dyn Subject, input: &mut Input<'_>) {
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        guest.step(subject, input);
        guest.notice_start();
    }
    guest.settle(subject);
    guest.reset(subject);
    subject.finish_all();
    assert_eq!(lock(&guest.device).wind_down(), 0, "a device that does not let go of the memory");
    guest.check_memory();
}

/// Wires that keep what came over them.
#[derive(Debug, Default)]
struct Wires;

impl Wiring for Wires {
    fn route(&self, _: usize, _: MsiMessage) -> Result<()> {
        Ok(())
    }
    fn raise(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn place_doorbells(&self, _: Option<u64>) {}
    fn wake(&self) {}
}

/// A queue that a driver has started.
#[derive(Debug, Default)]
struct Ring {
    enabled: bool,
    size: u16,
    areas: [u64; 3],
    /// Chains that the device has taken and not given back.
    taken: Vec<Walk>,
}

/// A guest's memory and its device.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) memory: Arc<GuestMemoryMmap>,
    device: Arc<Mutex<VirtioPci>>,
    rings: Vec<Ring>,
    features: u64,
    /// The memory as it was when it was last looked at.
    known: Vec<u8>,
    /// The device may write over what it is about to read: then nobody can say what it may do.
    wild: bool,
    started: bool,
    /// The next descriptor that the driver uses, and the next place for a request's header.
    next: u16,
    place: u64,
}

impl Guest {
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let memory = memory();
        let queues = device.queue_sizes().len();
        let window = u32::try_from(layout::PCI_WINDOW).unwrap();
        let device = VirtioPci::new(device, memory.clone(), Arc::new(Wires), window).unwrap();
        let rings = (0..queues).map(|_| Ring::default()).collect();
        let known = image(&memory);
        let device = Arc::new(Mutex::new(device));
        let mut guest = Self {
            memory,
            device,
            rings,
            features: 0,
            known,
            wild: false,
            started: false,
            next: 0,
            place: HEADERS,
        };
        // Memory space and bus master.
        guest.device().write_config(4, &6u16.to_le_bytes());
        guest
    }

    fn device(&mut self) -> MutexGuard<'_, VirtioPci> {
        lock(&self.device)
    }

    fn step(&mut self, subject: &mut dyn Subject, input: &mut Input<'_>) {
        match input.byte() % 16 {
            0 | 1 => self.start(input),
            2..=5 => subject.request(self, input),
            6 | 7 => self.chain(input),
            8 | 9 => self.settle(subject),
            10 => subject.event(input),
            11 => {
                let (at, bytes) = (u64::from(input.word() & 0x7fff), input.value());
                self.device().write(at, &bytes);
            }
            12 => {
                let (at, bytes) = (input.byte(), input.value());
                self.device().write_config(at.into(), &bytes);
            }
            13 => {
                let mut out = input.value();
                let (at, config) = (u64::from(input.word() & 0x7fff), input.byte() & 1 != 0);
                if config {
                    self.device().read_config(usize::try_from(at & 0xff).unwrap(), &mut out);
                } else {
                    self.device().read(at, &mut out);
                }
            }
            14 => {
                let (at, count) = (address(input), input.below(64));
                self.put(at, input.take(count));
            }
            _ => match input.byte() % 4 {
                0 => self.reset(subject),
                // The available index, anywhere.
                1 => {
                    let (queue, value) = (input.below(self.rings.len()), input.word());
                    let at = self.rings[queue].areas[1].saturating_add(2);
                    self.put(at, &value.to_le_bytes());
                }
                // A turn alone, without whatever it asks for.
                2 => drop(self.turn(subject)),
                _ => self.write(20, &[input.byte()]),
            },
        }
    }

    fn write(&mut self, at: u64, bytes: &[u8]) {
        self.device().write(at, bytes);
    }

    fn read<const N: usize>(&mut self, at: u64) -> [u8; N] {
        let mut out = [0; N];
        self.device().read(at, &mut out);
        out
    }

    fn status(&mut self) -> u8 {
        self.read::<1>(20)[0]
    }

    /// The guest writes its memory.
    pub(super) fn put(&mut self, at: u64, bytes: &[u8]) {
        let _ = self.memory.write_slice(bytes, GuestAddress(at));
        for (at, byte) in (0..).map_while(|n| at.checked_add(n)).zip(bytes) {
            match place(at) {
                Some(place) => self.known[place] = *byte,
                None => break,
            }
        }
    }

    /// A driver's start, by the book in most cases.
    fn start(&mut self, input: &mut Input<'_>) {
        let how = input.byte();
        let wanted = if how & 1 == 0 { u64::MAX } else { input.quad() };
        [1, 3].iter().for_each(|status| self.write(20, &[*status]));
        for half in 0..2u32 {
            self.write(0, &half.to_le_bytes());
            let offered = u32::from_le_bytes(self.read(4));
            let chosen = u32::try_from(wanted >> (half * 32) & 0xffff_ffff).unwrap() & offered | half;
            self.write(8, &half.to_le_bytes());
            self.write(12, &chosen.to_le_bytes());
        }
        self.write(20, &[0xb]);
        let size = 1u16 << input.below(8);
        for (queue, base) in (0u16..).take(self.rings.len()).zip((RINGS..).step_by(0x2000)) {
            self.write(22, &queue.to_le_bytes());
            self.write(24, &size.to_le_bytes());
            for (at, offset) in [(32, 0), (40, 0x1000), (48, 0x1800)] {
                let area = if how & 2 == 0 { base + offset } else { address(input) & !0xf };
                self.write(at, &area.to_le_bytes());
            }
            // Rings are zero when a driver starts.
            self.put(base + 0x1000, &[0; 6]);
            self.put(base + 0x1800, &[0; 6]);
            if how & 4 == 0 || queue == 0 {
                self.write(28, &1u16.to_le_bytes());
            }
        }
        self.write(20, &[0xf]);
    }

    /// Sees whether the driver runs the device now, and with which queues.
    fn notice_start(&mut self) {
        let status = self.status();
        if status == 0 && self.started {
            // What came in before the reset was allowed then.
            self.check_memory();
            self.started = false;
            self.wild = false;
            self.rings.iter_mut().for_each(|ring| ring.taken.clear());
        }
        if status & 4 == 0 || self.started {
            return;
        }
        self.started = true;
        let (selected, half): ([u8; 2], [u8; 4]) = (self.read(22), self.read(8));
        for queue in 0..self.rings.len() {
            self.write(22, &u16::try_from(queue).unwrap().to_le_bytes());
            let areas = [32, 40, 48].map(|at| u64::from_le_bytes(self.read(at)));
            let (size, enabled) = (u16::from_le_bytes(self.read(24)), self.read(28) == [1, 0]);
            self.rings[queue] = Ring { enabled, size, areas, taken: Vec::new() };
        }
        self.features = (0..2u32).fold(0, |all, half| {
            self.write(8, &half.to_le_bytes());
            all | u64::from(u32::from_le_bytes(self.read(12))) << (half * 32)
        });
        self.write(22, &selected);
        self.write(8, &half);
    }

    /// A chain of whatever descriptors.
    fn chain(&mut self, input: &mut Input<'_>) {
        let (queue, count, how) = (input.below(self.rings.len()), input.below(12), input.byte());
        let table = self.rings[queue].areas[0];
        let head = self.next;
        for n in 0..u16::try_from(count).unwrap() {
            let index = self.index(queue, head.wrapping_add(n));
            let bytes =
                descriptor(input, self.index(queue, head.wrapping_add(n + 1)), usize::from(n) + 1 < count);
            self.put(table.saturating_add(u64::from(index) * 16), &bytes);
        }
        self.next = head.wrapping_add(u16::try_from(count).unwrap());
        let head = self.index(queue, head);
        self.make_available(queue, if how & 0xf0 == 0xf0 { u16::from(how) << 4 } else { head });
    }

    fn index(&self, queue: usize, n: u16) -> u16 {
        n % self.rings[queue].size.max(1)
    }

    fn make_available(&mut self, queue: usize, head: u16) {
        let Ring { size, areas: [_, avail, _], .. } = self.rings[queue];
        let index: u16 = self.memory.read_obj(GuestAddress(avail.saturating_add(2))).unwrap_or(0);
        let place = avail.saturating_add(4 + u64::from(index % size.max(1)) * 2);
        self.put(place, &head.to_le_bytes());
        self.put(avail.saturating_add(2), &index.wrapping_add(1).to_le_bytes());
    }

    /// Offers a request of these stretches, the last byte of `how` saying whether by a table of its own.
    pub(super) fn offer(&mut self, queue: usize, spans: &[(u64, u32, bool)], how: u8) {
        let indirect = how & 1 != 0;
        let Ring { areas: [table, ..], .. } = self.rings[queue];
        let head = self.index(queue, self.next);
        let into = if indirect { self.header(&vec![0; spans.len() * 16]) } else { table };
        for (n, (at, len, write)) in (0u16..).zip(spans) {
            let place = |n: u16| if indirect { n } else { self.index(queue, self.next.wrapping_add(n)) };
            let more = usize::from(n) + 1 < spans.len();
            let flags = if *write { walk::WRITE } else { 0 } | if more { walk::NEXT } else { 0 };
            let bytes = encode(*at, *len, flags, place(n + 1));
            let to = into.saturating_add(u64::from(place(n)) * 16);
            self.put(to, &bytes);
        }
        if indirect {
            let len = u32::try_from(spans.len() * 16).unwrap();
            self.put(table.saturating_add(u64::from(head) * 16), &encode(into, len, walk::INDIRECT, 0));
            self.next = self.next.wrapping_add(1);
        } else {
            self.next = self.next.wrapping_add(u16::try_from(spans.len()).unwrap());
        }
        self.make_available(queue, head);
    }

    /// Puts a request's header somewhere of its own and says where.
    pub(super) fn header(&mut self, bytes: &[u8]) -> u64 {
        let len = u64::try_from(bytes.len().next_multiple_of(16)).unwrap();
        if self.place + len > HEADERS_END {
            self.place = HEADERS;
        }
        let at = self.place;
        self.place += len;
        self.put(at, bytes);
        at
    }

    /// Rings, and gives the device turns until it wants none at once.
    fn settle(&mut self, subject: &mut dyn Subject) {
        for queue in 0..u32::try_from(self.rings.len()).unwrap() {
            self.write(u64::from(NOTIFY + queue * NOTIFY_STRIDE), &[0, 0]);
        }
        for _ in 0..TURNS {
            if self.turn(subject) != Next::Now {
                return;
            }
        }
        panic!("a device that is never done");
    }

    /// Asks for a reset, and sees that it comes when nothing is under way any more.
    fn reset(&mut self, subject: &mut dyn Subject) {
        self.write(20, &[0]);
        subject.finish_all();
        self.settle(subject);
        assert_eq!(self.status(), 0, "a reset that never ends");
        assert_eq!(self.device().fault(), None);
        self.notice_start();
    }

    /// One turn of the device, judged.
    fn turn(&mut self, subject: &mut dyn Subject) -> Next {
        self.notice_start();
        let (before, seen) = (self.positions(), self.look(subject));
        let served = self.device().serves();
        let next = self.device().turn();
        let (status, after) = (self.status(), self.positions());
        let failed = status & NEEDS_RESET != 0;
        for (queue, look) in seen.chains.into_iter().enumerate() {
            let taken = match (before[queue], after[queue]) {
                (Some((from, _)), Some((to, _))) => to.wrapping_sub(from).into(),
                // It failed, and nobody knows where; those that it took can be under way.
                (Some(_), None) if served => look.len(),
                _ => 0,
            };
            self.rings[queue].taken.extend(look.into_iter().take(taken));
        }
        self.check_memory();
        if !self.wild {
            (0..self.rings.len())
                .for_each(|queue| self.check_used(queue, before[queue], after[queue], subject));
            if served && seen.wrong {
                assert!(failed, "a driver broke the protocol and was not told");
            }
            if served && seen.right {
                assert!(!failed, "a driver did nothing wrong: {:?}", self.device().fault());
            }
        }
        next
    }

    /// Where the device is in each queue, if the driver runs it.
    fn positions(&mut self) -> Vec<Option<(u16, u16)>> {
        let count = self.rings.len();
        let device = self.device();
        (0..count).map(|queue| device.positions(queue)).collect()
    }

    /// Reads what the device is about to read.
    fn look(&mut self, subject: &mut dyn Subject) -> Seen {
        let positions = self.positions();
        let mut seen = Seen { chains: Vec::new(), wrong: false, right: true };
        let mut read_from = Vec::new();
        for (queue, position) in positions.into_iter().enumerate() {
            let mut chains = Vec::new();
            if let (Some((from, _)), true) = (position, self.rings[queue].enabled) {
                let Ring { size, areas: [table, avail, _], .. } = self.rings[queue];
                read_from.extend([(table, u64::from(size) * 16), (avail, 6 + u64::from(size) * 2)]);
                let end: u16 = self.memory.read_obj(GuestAddress(avail + 2)).unwrap();
                let count = end.wrapping_sub(from);
                let under_way = self.rings[queue].taken.len();
                // All will be looked at in one turn, and none waits behind others.
                let at_once = under_way + usize::from(count) <= subject.taken_at_once();
                if count > size {
                    seen.wrong |= under_way < subject.taken_at_once();
                    seen.right = false;
                }
                seen.right &= under_way + usize::from(count) <= usize::from(size);
                for n in 0..count.min(size) {
                    let place = avail + 4 + u64::from(from.wrapping_add(n) % size) * 2;
                    let head: u16 = self.memory.read_obj(GuestAddress(place)).unwrap();
                    let Some(chain) = walk::walk(&self.memory, table, size, head) else {
                        (seen.wrong, seen.right) = (seen.wrong | at_once, false);
                        break;
                    };
                    let verdict = subject.judge(queue, &chain, &self.memory, self.features);
                    seen.right &= verdict == Some(true);
                    seen.wrong |= verdict == Some(false) && at_once;
                    read_from.extend(&chain.read_from);
                    subject.offered(queue, &chain, &self.memory);
                    chains.push(chain);
                }
            }
            seen.chains.push(chains);
        }
        let written = self.allowed(&seen.chains);
        self.wild |= overlap(&read_from, &written) || self.rings_overlap(&seen.chains);
        if self.wild {
            subject.anything_goes();
        }
        seen
    }

    /// Whether the device's own used entries may lie where something else does.
    fn rings_overlap(&self, chains: &[Vec<Walk>]) -> bool {
        let used: Vec<_> = self.rings.iter().filter(|ring| ring.enabled).map(used_ring).collect();
        let spans = self.rings.iter().flat_map(|ring| &ring.taken).chain(chains.iter().flatten());
        let spans: Vec<_> =
            spans.flat_map(|chain| [&chain.readable, &chain.writable]).flatten().map(wide).collect();
        let twice = used.iter().enumerate().any(|(n, ring)| overlap(&[*ring], &used[n + 1..]));
        twice || overlap(&used, &spans)
    }

    /// What the device may write: used rings, and what was offered for that.
    fn allowed(&self, more: &[Vec<Walk>]) -> Vec<(u64, u64)> {
        let taken = self.rings.iter().flat_map(|ring| &ring.taken).chain(more.iter().flatten());
        let mut all: Vec<_> = taken.flat_map(|chain| &chain.writable).map(wide).collect();
        all.extend(self.rings.iter().filter(|ring| ring.enabled && self.started).map(used_ring));
        all
    }

    /// Nothing has changed but what the device may write.
    fn check_memory(&mut self) {
        let now = image(&self.memory);
        if now != self.known && !self.wild {
            let allowed = self.allowed(&[]);
            let may =
                |at: u64| allowed.iter().any(|(from, len)| at.checked_sub(*from).is_some_and(|n| n < *len));
            for (n, (now, known)) in now.iter().zip(&self.known).enumerate() {
                let at = address_of(n);
                assert!(now == known || may(at), "the byte at {at:#x} was none of the device's");
            }
        }
        self.known = now;
    }

    /// Each new used entry gives back a chain that the device has, and says no more than fits it.
    fn check_used(
        &mut self,
        queue: usize,
        before: Option<(u16, u16)>,
        after: Option<(u16, u16)>,
        subject: &mut dyn Subject,
    ) {
        let (Some((_, from)), Some((_, to))) = (before, after) else { return };
        let Ring { size, areas: [_, _, used], .. } = self.rings[queue];
        let writable = |chain: &Walk| chain.writable.iter().map(wide).collect::<Vec<_>>();
        let all: Vec<_> = self.rings.iter().flat_map(|ring| &ring.taken).map(writable).collect();
        for n in 0..to.wrapping_sub(from) {
            let at = used + 4 + u64::from(from.wrapping_add(n) % size) * 8;
            let [id, len]: [u32; 2] = [at, at + 4].map(|at| self.memory.read_obj(GuestAddress(at)).unwrap());
            // Only the last of entries that went around the ring is still there.
            if to.wrapping_sub(from) > size {
                self.wild = true;
                return;
            }
            let taken = &mut self.rings[queue].taken;
            let place = taken.iter().position(|chain| u32::from(chain.head) == id);
            let place = place.unwrap_or_else(|| panic!("chain {id} was given back and never taken"));
            let chain = taken.remove(place);
            let room = walk::length(&chain.writable);
            assert!(u64::from(len) <= room, "{len} bytes written where there is room for {room}");
            let mine = writable(&chain);
            if all.iter().filter(|others| overlap(&mine, others)).count() <= 1 {
                subject.answered(&chain, &self.memory);
            }
        }
        if to != from && self.features & 1 << VIRTIO_RING_F_EVENT_IDX == 0 {
            assert_eq!(self.read::<1>(0x1000)[0] & 1, 1, "a chain was given back and the driver not told");
        }
    }
}

/// What a device is about to see.
struct Seen {
    chains: Vec<Vec<Walk>>,
    /// It must fail at that.
    wrong: bool,
    /// It must not.
    right: bool,
}

fn used_ring(ring: &Ring) -> (u64, u64) {
    (ring.areas[2], 6 + u64::from(ring.size) * 8)
}

fn wide((at, len): &(u64, u32)) -> (u64, u64) {
    (*at, (*len).into())
}

fn overlap(some: &[(u64, u64)], others: &[(u64, u64)]) -> bool {
    let meet = |(a, n): &(u64, u64), (b, m): &(u64, u64)| {
        *n > 0 && *m > 0 && *a < b.saturating_add(*m) && *b < a.saturating_add(*n)
    };
    some.iter().any(|one| others.iter().any(|other| meet(one, other)))
}

/// Up to `most` stretches.
pub(super) fn spans(input: &mut Input<'_>, most: usize) -> Vec<(u64, u32)> {
    (0..input.below(most + 1)).map(|_| (address(input), length(input))).collect()
}

/// An address: mostly of data, sometimes of rings, at an edge or nowhere.
pub(super) fn address(input: &mut Input<'_>) -> u64 {
    let word = u64::from(input.word());
    match word >> 12 {
        0..=7 => DATA + word,
        8..=0xb => 0x1_0000 + (word & 0x3fff),
        0xc | 0xd => word & 0x1fff,
        0xe => 0x1_3f00 + (word & 0x1ff),
        _ => u64::MAX - (word & 0xfff),
    }
}

fn length(input: &mut Input<'_>) -> u32 {
    let word = u32::from(input.word());
    match word >> 12 {
        0..=0xb => word & 0x3fff,
        0xc | 0xd => word & 0xff,
        0xe => (word & 0xfff) << 12,
        _ => u32::MAX - (word & 0xfff),
    }
}

/// A descriptor that goes on to `next`, if it is to.
fn descriptor(input: &mut Input<'_>, next: u16, more: bool) -> [u8; 16] {
    let (at, len, how) = (address(input), length(input), input.byte());
    let mut flags = u16::from(how & 2) | if more { walk::NEXT } else { 0 };
    let mut next = next;
    if how & 0xf0 == 0xf0 {
        flags = input.word();
        next = input.byte().into();
    } else if how & 0xf0 == 0xe0 {
        flags |= walk::INDIRECT;
    }
    encode(at, len, flags, next)
}

fn encode(at: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&at.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}

/// Puts a descriptor of the input at place `index` of `table`, pointing at the next one.
pub(super) fn put_descriptor(memory: &GuestMemoryMmap, table: u64, index: u16, input: &mut Input<'_>) {
    let more = input.byte() & 1 != 0;
    let bytes = descriptor(input, index.wrapping_add(1), more);
    let _ = memory.write_slice(&bytes, GuestAddress(table.saturating_add(u64::from(index) * 16)));
}

thread_local! {
    /// Mapped once, with what it is filled with: both take longer than an input.
    static MEMORY: (Arc<GuestMemoryMmap>, Vec<u8>) = {
        let regions = REGIONS.map(|(at, len)| (GuestAddress(at), len));
        let pattern = (0..0x8000).map(|n| u8::try_from(n % 249).unwrap() | 0x80);
        (Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap()), pattern.collect())
    };
}

/// Memory as a guest finds it here: three regions, two of which touch, full of a pattern.
pub(super) fn memory() -> Arc<GuestMemoryMmap> {
    MEMORY.with(|(memory, pattern)| {
        for (at, len) in REGIONS {
            memory.write_slice(&pattern[..len], GuestAddress(at)).unwrap();
        }
        memory.clone()
    })
}

fn image(memory: &GuestMemoryMmap) -> Vec<u8> {
    let mut all = vec![0; REGIONS.iter().map(|(_, len)| len).sum()];
    let mut rest = all.as_mut_slice();
    for (at, len) in REGIONS {
        let (here, after) = rest.split_at_mut(len);
        memory.read_slice(here, GuestAddress(at)).unwrap();
        rest = after;
    }
    all
}

/// Where the byte at `at` is in an [`image`].
fn place(at: u64) -> Option<usize> {
    let mut before = 0;
    for (from, len) in REGIONS {
        let here = at.checked_sub(from).and_then(|n| usize::try_from(n).ok()).filter(|n| *n < len);
        if let Some(here) = here {
            return Some(before + here);
        }
        before += len;
    }
    None
}

/// The address of a byte of an [`image`].
fn address_of(place: usize) -> u64 {
    let mut left = place;
    for (from, len) in REGIONS {
        if left < len {
            return from + u64::try_from(left).unwrap();
        }
        left -= len;
    }
    unreachable!("a place beyond the memory")
}

pub(super) fn lock<T>(what: &Mutex<T>) -> MutexGuard<'_, T> {
    what.lock().unwrap_or_else(PoisonError::into_inner)
}

const REGIONS: [(u64, usize); 3] = [(0, 0x8000), (0x8000, 0x4000), (0x1_0000, 0x4000)];
/// Where a driver that starts by the book has its rings, its requests' headers, and its data.
const RINGS: u64 = 0x1000;
const HEADERS: u64 = 0x100;
const HEADERS_END: u64 = 0x1000;
const DATA: u64 = 0x5000;
const NEEDS_RESET: u8 = 64;
/// What one input can do at most.
const STEPS: usize = 200;
/// More turns than any device may want at once: all its queue's chains, one by one.
const TURNS: usize = 300;
