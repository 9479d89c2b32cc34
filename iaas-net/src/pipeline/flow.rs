//! The flow table: who opened a flow, how far it is, and until when it is remembered. Bounded; time is an argument.
//!
//! An entry that is lost (evicted, expired, the switch restarted) costs an established TCP flow nothing: see the rule for
//! packets in mid-stream in [`security_group`](super::security_group).

use std::hash::BuildHasher;
use std::time::Duration;

use foldhash::fast::FixedState;
use hashbrown::HashMap;
use hashbrown::HashTable;
use iaas_core::Id;
use iaas_core::model::Port;

use super::parse::Ip;
use super::parse::Transport;
use super::parse::tcp;

/// How much a pipeline remembers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Flows in all. When the table is full the flow that is nearest to its end gives way.
    pub flows: u32,
    /// Flows that one port opened. A port at its limit opens no more until some end.
    pub flows_per_port: u32,
}

impl Default for Limits {
    fn default() -> Self {
        // 262,144 flows of about 128 bytes: 32 MiB.
        Self { flows: 1 << 18, flows_per_port: 1 << 16 }
    }
}

/// Both directions of a flow have one key: the ends are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    low: End,
    high: End,
    vpc: u32,
    protocol: u8,
}

/// One end of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct End {
    address: u128,
    port: u16,
}

/// From which end a packet comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    Low,
    High,
}

impl Side {
    pub(crate) fn other(self) -> Self {
        match self {
            Self::Low => Self::High,
            Self::High => Self::Low,
        }
    }
}

impl Key {
    /// The key of the flow that a packet belongs to, and its side; `None` for packets that make no flow.
    pub(crate) fn of(vpc: u32, ip: &Ip) -> Option<(Self, Side)> {
        let (src_port, dst_port) = match ip.transport {
            Transport::IcmpError { .. } | Transport::Icmp { .. } => return None,
            // Only the asking end counts with its number, so that two hosts that ping each other have two flows.
            Transport::Echo { id, request: true } => (id, 0),
            Transport::Echo { id, request: false } => (0, id),
            other => other.ports(),
        };
        let (from, to) = (End { address: ip.src, port: src_port }, End { address: ip.dst, port: dst_port });
        let side = if from <= to { Side::Low } else { Side::High };
        let (low, high) = if from <= to { (from, to) } else { (to, from) };
        Some((Self { low, high, vpc, protocol: ip.protocol }, side))
    }
}

/// What is known about a flow.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flow {
    /// The side that opened it.
    pub(crate) opener: Side,
    /// The generation of the program that allowed it. Port numbers belong to that program.
    pub(crate) epoch: u64,
    low: u32,
    high: u32,
    state: State,
    expires: Duration,
}

impl Flow {
    /// The number of the port at that side.
    pub(crate) fn port(&self, side: Side) -> u32 {
        match side {
            Side::Low => self.low,
            Side::High => self.high,
        }
    }

    /// Takes over the numbers that the ports have in the current program: `from` is at `side`.
    pub(crate) fn renumber(&mut self, side: Side, from: u32, to: u32) {
        (self.low, self.high) = if side == Side::Low { (from, to) } else { (to, from) };
    }

    /// Takes note of a packet from `side`.
    pub(crate) fn touch(&mut self, now: Duration, side: Side, transport: Transport) {
        self.state = self.state.after(side != self.opener, transport);
        self.expires = now.saturating_add(self.state.patience(transport));
    }
}

/// How far a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Only one side has spoken.
    Opening,
    /// Both have.
    Open,
    /// One side has ended it.
    Closing,
}

impl State {
    fn after(self, reply: bool, transport: Transport) -> Self {
        let ends = matches!(transport, Transport::Tcp { flags, .. } if flags & (tcp::FIN | tcp::RST) != 0);
        match self {
            Self::Closing => Self::Closing,
            _ if ends => Self::Closing,
            _ if reply => Self::Open,
            other => other,
        }
    }

    /// How long silence is borne.
    ///
    /// RFC 5382 §5 and RFC 4787 §4.3 ask NATs, which cannot find a lost flow again, for 2 h and 2 min. Here a lost TCP entry
    /// costs nothing, so open connections are kept for one hour of silence.
    fn patience(self, transport: Transport) -> Duration {
        let seconds = match (transport, self) {
            (Transport::Tcp { .. }, Self::Open) => 3600,
            (Transport::Tcp { .. }, Self::Opening | Self::Closing) => 60,
            (Transport::Echo { .. }, _) => 30,
            (_, Self::Opening) => 60,
            (_, Self::Open | Self::Closing) => 180,
        };
        Duration::from_secs(seconds)
    }
}

/// The flows of one pipeline.
#[derive(Debug)]
pub(crate) struct Flows {
    index: HashTable<u32>,
    slab: Vec<Option<Entry>>,
    free: Vec<u32>,
    opened: HashMap<Id<Port>, u32, FixedState>,
    hasher: FixedState,
    limits: Limits,
    hand: usize,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    key: Key,
    flow: Flow,
    owner: Id<Port>,
}

impl Flows {
    /// An empty table. `seed` keeps the places of flows from being foreseen.
    pub(crate) fn new(limits: Limits, seed: u64) -> Self {
        let limits = Limits { flows: limits.flows.max(1), ..limits };
        Self {
            index: HashTable::new(),
            slab: Vec::new(),
            free: Vec::new(),
            opened: HashMap::with_hasher(FixedState::with_seed(seed)),
            hasher: FixedState::with_seed(seed),
            limits,
            hand: 0,
        }
    }

    /// Flows that are remembered, also those whose time is over but which the hand has not met yet.
    pub(crate) fn len(&self) -> usize {
        self.index.len()
    }

    /// The flow of `key`, unless its time is over.
    pub(crate) fn find(&mut self, key: &Key, now: Duration) -> Option<&mut Flow> {
        let slab = &self.slab;
        let same = |n: &u32| slab.get(*n as usize).and_then(Option::as_ref).is_some_and(|e| e.key == *key);
        let number = *self.index.find(self.hasher.hash_one(key), same)?;
        let entry = self.slab.get_mut(number as usize)?.as_mut()?;
        (entry.flow.expires > now).then_some(&mut entry.flow)
    }

    /// Remembers a flow whose first packet came from `side`; replaces an older one. Says whether there was room.
    pub(crate) fn open(&mut self, now: Duration, new: Opened, side: Side, transport: Transport) -> bool {
        self.forget(&new.key);
        if self.opened.get(&new.owner).is_some_and(|n| *n >= self.limits.flows_per_port) {
            // Perhaps some of them are over.
            self.sweep(now, SWEEP);
            if self.opened.get(&new.owner).is_some_and(|n| *n >= self.limits.flows_per_port) {
                return false;
            }
        }
        if self.index.len() >= self.limits.flows as usize {
            self.evict();
        }
        let (low, high) = match new.opener {
            Side::Low => (new.from, new.to),
            Side::High => (new.to, new.from),
        };
        let (opener, epoch) = (new.opener, new.epoch);
        let mut flow = Flow { opener, epoch, low, high, state: State::Opening, expires: now };
        flow.touch(now, side, transport);
        let entry = Some(Entry { key: new.key, flow, owner: new.owner });
        let number = match self.free.pop() {
            Some(number) => number,
            None => {
                self.slab.push(None);
                // Bounded by `limits.flows`, which is a u32.
                u32::try_from(self.slab.len() - 1).unwrap_or(u32::MAX)
            }
        };
        if let Some(place) = self.slab.get_mut(number as usize) {
            *place = entry;
        }
        let (slab, hasher) = (&self.slab, &self.hasher);
        let hash =
            |n: &u32| slab.get(*n as usize).and_then(Option::as_ref).map_or(0, |e| hasher.hash_one(e.key));
        self.index.insert_unique(hasher.hash_one(new.key), number, hash);
        *self.opened.entry(new.owner).or_insert(0) += 1;
        true
    }

    /// Forgets the flow of `key`.
    pub(crate) fn forget(&mut self, key: &Key) {
        let slab = &self.slab;
        let same = |n: &u32| slab.get(*n as usize).and_then(Option::as_ref).is_some_and(|e| e.key == *key);
        let Ok(found) = self.index.find_entry(self.hasher.hash_one(key), same) else { return };
        let (number, _) = found.remove();
        let gone = self.slab.get_mut(number as usize).and_then(Option::take);
        self.free.push(number);
        let Some(entry) = gone else { return };
        if let Some(count) = self.opened.get_mut(&entry.owner) {
            *count -= 1;
            if *count == 0 {
                self.opened.remove(&entry.owner);
            }
        }
    }

    /// Looks at the next `places` of the table and forgets the flows there whose time is over.
    pub(crate) fn sweep(&mut self, now: Duration, places: usize) {
        for _ in 0..places.min(self.slab.len()) {
            if let Some(entry) = self.step().filter(|e| e.flow.expires <= now) {
                self.forget(&entry.key);
            }
        }
    }

    /// Forgets the flow that ends first among the next few.
    fn evict(&mut self) {
        let mut first: Option<Entry> = None;
        let mut seen = 0;
        // The table is full, so there is a flow; the bound keeps the cost of one packet bounded.
        for _ in 0..self.slab.len() {
            let Some(entry) = self.step() else { continue };
            if first.is_none_or(|f| entry.flow.expires < f.flow.expires) {
                first = Some(entry);
            }
            seen += 1;
            if seen == SAMPLE {
                break;
            }
        }
        if let Some(entry) = first {
            self.forget(&entry.key);
        }
    }

    /// Moves the hand to the next place of the slab and returns what is there.
    fn step(&mut self) -> Option<Entry> {
        self.hand = if self.hand + 1 < self.slab.len() { self.hand + 1 } else { 0 };
        self.slab.get(self.hand).copied().flatten()
    }
}

/// A flow that was just allowed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Opened {
    pub(crate) key: Key,
    pub(crate) opener: Side,
    pub(crate) epoch: u64,
    /// The number of the port that opened it.
    pub(crate) from: u32,
    /// The number of the other port.
    pub(crate) to: u32,
    pub(crate) owner: Id<Port>,
}

/// Flows that are compared when one must give way.
const SAMPLE: usize = 16;
/// Places that one sweep looks at: about 50 µs.
pub(crate) const SWEEP: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::mapped;
    use crate::topology::numbered;

    const T0: Duration = Duration::ZERO;

    fn udp(src_port: u16) -> Ip {
        let at = |last: u8| mapped(std::net::Ipv4Addr::new(10, 0, 0, last).into());
        let transport = Transport::Udp { src: src_port, dst: 53 };
        Ip {
            v6: false,
            src: at(1),
            dst: at(2),
            protocol: 17,
            hops: 64,
            l3: 26,
            l4: 46,
            end: 54,
            segment: None,
            transport,
        }
    }

    fn open(flows: &mut Flows, now: Duration, src_port: u16, owner: u128) -> Key {
        let (key, opener) = Key::of(0, &udp(src_port)).unwrap();
        let new = Opened { key, opener, epoch: 1, from: 0, to: 1, owner: numbered(owner) };
        flows.open(now, new, opener, udp(src_port).transport);
        key
    }

    #[test]
    fn a_reply_has_the_key_of_its_question_and_the_other_side() {
        let ask = udp(4000);
        let reply =
            Ip { src: ask.dst, dst: ask.src, transport: Transport::Udp { src: 53, dst: 4000 }, ..ask };
        let ((k1, s1), (k2, s2)) = (Key::of(3, &ask).unwrap(), Key::of(3, &reply).unwrap());
        assert_eq!(k1, k2);
        assert_eq!(s1, s2.other());
        assert_ne!(k1, Key::of(4, &ask).unwrap().0, "another VPC is another flow");
    }

    #[test]
    fn a_full_table_lets_the_flow_go_that_ends_first() {
        let mut flows = Flows::new(Limits { flows: 3, flows_per_port: 100 }, 1);
        let old = open(&mut flows, T0, 1, 9);
        let keys: Vec<Key> = (2..4).map(|p| open(&mut flows, Duration::from_secs(10), p, 9)).collect();
        let last = open(&mut flows, Duration::from_secs(11), 4, 9);
        let now = Duration::from_secs(12);
        assert_eq!(flows.len(), 3);
        assert!(flows.find(&old, now).is_none());
        assert!(keys.iter().chain([&last]).all(|k| flows.find(k, now).is_some()));
    }

    #[test]
    fn a_port_at_its_limit_opens_no_more_until_a_flow_ends() {
        let mut flows = Flows::new(Limits { flows: 100, flows_per_port: 2 }, 1);
        let (a, b, c) = (open(&mut flows, T0, 1, 9), open(&mut flows, T0, 2, 9), open(&mut flows, T0, 3, 9));
        assert!(flows.find(&a, T0).is_some() && flows.find(&b, T0).is_some() && flows.find(&c, T0).is_none());
        let other = open(&mut flows, T0, 4, 8);
        assert!(flows.find(&other, T0).is_some(), "another port is not concerned");
        // One-way UDP is remembered for 60 s.
        let later = Duration::from_secs(61);
        let d = open(&mut flows, later, 5, 9);
        assert!(flows.find(&d, later).is_some());
        assert_eq!(flows.len(), 1, "the sweep forgot the three that were over");
    }
}
