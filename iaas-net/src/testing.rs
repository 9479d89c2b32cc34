//! What tests and benches of a data path need: a switch between cables in memory, in the caller's thread.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use iaas_core::Cidr;
use iaas_core::Id;
use iaas_core::Mac;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::model::Port;
use iaas_core::spi::dataplane::FramePort;
use iaas_core::spi::dataplane::IoBuffers;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::dataplane::frame::VNET_HEADER;
use iaas_core::spi::network::NetObject;
use uuid::Uuid;

use crate::Pipeline;
use crate::Program;
use crate::Topology;
use crate::pipeline::Frame;
use crate::pipeline::Limits;
use crate::pipeline::Slot;
use crate::pipeline::Verdict;
use crate::port::MemoryPort;
use crate::port::memory::Faults;

/// A pipeline between [`MemoryPort`]s. Time is the caller's.
#[derive(Debug)]
pub struct LocalSwitch {
    pipeline: Pipeline,
    /// The far end of each slot's cable.
    ends: Vec<MemoryPort>,
    batch: Vec<Frame>,
    spare: Vec<Vec<u8>>,
    verdicts: Vec<Verdict>,
}

impl LocalSwitch {
    /// A switch with that program and no ports.
    pub fn new(program: Arc<Program>, seed: u64) -> Self {
        let mut pipeline = Pipeline::new(Limits::default(), Offloads::default(), seed);
        pipeline.install(program);
        Self { pipeline, ends: Vec::new(), batch: Vec::new(), spare: Vec::new(), verdicts: Vec::new() }
    }

    /// Plugs a port in by a cable that is as bad as `faults`, and returns the guest's end.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn plug(&mut self, port: Id<Port>, faults: Faults, seed: u64) -> io::Result<MemoryPort> {
        let (near, far) = MemoryPort::faulty_pair(faults, seed)?;
        let Slot(slot) = self.pipeline.plug(port);
        // Slots are given out in order and none is ever given back.
        debug_assert_eq!(slot as usize, self.ends.len());
        self.ends.push(far);
        Ok(near)
    }

    /// Moves up to 64 frames of each port, and says how many there were.
    pub fn turn(&mut self, now: Duration) -> usize {
        let mut moved = 0;
        for n in 0..self.ends.len() {
            moved += self.turn_of(n, now);
        }
        moved
    }

    fn turn_of(&mut self, n: usize, now: Duration) -> usize {
        let (from, Some(end)) = (Slot(u32::try_from(n).unwrap_or(u32::MAX)), self.ends.get_mut(n)) else {
            return 0;
        };
        while self.batch.len() < BATCH {
            let mut bytes = self.spare.pop().unwrap_or_default();
            if !end.take(&mut bytes) {
                self.spare.push(bytes);
                break;
            }
            self.batch.push(Frame { from, bytes });
        }
        self.pipeline.process(now, &mut self.batch, &mut self.verdicts);
        let moved = self.batch.len();
        let mut last = None;
        for (frame, verdict) in self.batch.drain(..).zip(&self.verdicts) {
            let to = match verdict {
                Verdict::Deliver(Slot(to)) => Some(*to as usize),
                Verdict::Reply => Some(n),
                Verdict::Absorb | Verdict::Drop(_) => None,
            };
            if let Some(end) = to.and_then(|to| self.ends.get_mut(to)) {
                end.give(&frame.bytes);
            }
            if last != to {
                ring(&self.ends, last);
                last = to;
            }
            self.spare.push(frame.bytes);
        }
        ring(&self.ends, last);
        moved
    }
}

fn ring(ends: &[MemoryPort], to: Option<usize>) {
    if let Some(end) = to.and_then(|to| ends.get(to)) {
        end.ring();
    }
}

/// The figure `net.mem.64b`: frames of 64 bytes from one memory port to another through the whole pipeline, one flow.
#[derive(Debug)]
pub struct Mem64 {
    switch: LocalSwitch,
    from: MemoryPort,
    to: MemoryPort,
    frames: Vec<IoBuffers>,
    into: Vec<IoBuffers>,
    lens: Vec<u32>,
}

impl Mem64 {
    /// Two ports in one subnet, and a batch of frames.
    ///
    /// # Errors
    /// Those of `eventfd`.
    pub fn new() -> Result<Self> {
        let failed =
            |e: io::Error| iaas_core::Error::unavailable("no event descriptor could be made").because(&e);
        let id = |n: u128| Uuid::from_u128(n);
        let port = |n: u8| NetObject::Port {
            id: Id::from_uuid(id(n.into())),
            subnet: Id::from_uuid(id(101)),
            mac: Mac([2, 0, 0, 0, 0, n]),
            addrs: vec![[10, 0, 0, n].into()],
            groups: Default::default(),
        };
        let program = Topology::new([
            NetObject::Network { id: Id::from_uuid(id(100)), vni: 1, mtu: 1500 },
            NetObject::Subnet {
                id: Id::from_uuid(id(101)),
                network: Id::from_uuid(id(100)),
                cidrs: vec!["10.0.0.0/24".parse::<Cidr>()?],
                dns: Vec::new(),
            },
            port(10),
            port(20),
        ])?
        .compile(Rev(1))?;
        let mut switch = LocalSwitch::new(Arc::new(program), 1);
        let from = switch.plug(Id::from_uuid(id(10)), Faults::default(), 0).map_err(failed)?;
        let to = switch.plug(Id::from_uuid(id(20)), Faults::default(), 0).map_err(failed)?;
        let frames = (0..BATCH).map(|_| IoBuffers::copied(&udp_frame())).collect();
        let into = (0..BATCH).map(|_| IoBuffers::zeroed(2048)).collect();
        Ok(Self { switch, from, to, frames, into, lens: vec![0; BATCH] })
    }

    /// Sends a batch of 64 frames, forwards and receives it; says how many arrived.
    pub fn round(&mut self) -> usize {
        let sent = self.from.send(&self.frames).unwrap_or(0);
        self.switch.turn(Duration::ZERO);
        let arrived = self.to.recv(&mut self.into, &mut self.lens).unwrap_or(0);
        arrived.min(sent)
    }
}

/// 64 bytes with their checksum, which a card would add: 60 without.
fn udp_frame() -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend([2, 0, 0, 0, 0, 20, 2, 0, 0, 0, 0, 10, 8, 0]);
    frame.extend([0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 10, 10, 0, 0, 20]);
    frame.extend([0x10, 0, 0x20, 0, 0, 26, 0, 0]);
    frame.resize(VNET_HEADER + 60, 0);
    frame
}

/// Frames that are moved at once.
const BATCH: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_of_the_bench_forwards_every_frame() {
        let mut bench = Mem64::new().unwrap();
        for _ in 0..10 {
            assert_eq!(bench.round(), BATCH);
        }
    }

    #[test]
    fn a_lossy_cable_loses_frames_and_the_rest_arrives() {
        let mut bench = Mem64::new().unwrap();
        let program = bench.switch.pipeline.program().clone();
        let mut switch = LocalSwitch::new(program, 1);
        let lossy = Faults { loss: 300, reorder: 0 };
        let mut from = switch.plug(Id::from_uuid(Uuid::from_u128(10)), lossy, 3).unwrap();
        let mut to = switch.plug(Id::from_uuid(Uuid::from_u128(20)), Faults::default(), 4).unwrap();
        from.send(&bench.frames).unwrap();
        let moved = switch.turn(Duration::ZERO);
        assert!((1..BATCH).contains(&moved));
        assert_eq!(to.recv(&mut bench.into, &mut bench.lens).unwrap(), moved);
    }
}
