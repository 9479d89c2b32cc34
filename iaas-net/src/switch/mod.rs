//! The switch: one thread that moves frames between the ports of a host by the program in its folder.
//!
//! It dials the socket of each plugged-in port and re-dials as long as the port is plugged in. Whatever must survive it is in
//! its folder: a switch that starts again has the program before it dials, and frames that wait in the rings wait on until
//! the ports that were there before are back, or 300 ms have passed.

mod link;
pub mod role;

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;
use std::time::Instant;

use iaas_core::Error;
use iaas_core::Id;
use iaas_core::Result;
use iaas_core::Rev;
use iaas_core::spi::dataplane::Offloads;
use iaas_core::spi::network::PacketQuery;
use iaas_core::spi::network::Plug;
use iaas_core::spi::network::Trace;
use rustix::event::EventfdFlags;
use rustix::event::Timespec;
use rustix::event::epoll;

use self::link::Link;
use crate::Topology;
use crate::folder::Folder;
use crate::folder::StoredProgram;
use crate::pipeline::Frame;
use crate::pipeline::Limits;
use crate::pipeline::Pipeline;
use crate::pipeline::Slot;
use crate::pipeline::Verdict;

/// The switch of one host, as a value: the role runs one on its main thread.
#[derive(Debug)]
pub struct Switch {
    folder: Folder,
    /// The program in the pipeline, as the folder had it.
    stored: Option<StoredProgram>,
    pipeline: Pipeline,
    links: BTreeMap<Slot, Link>,
    events: OwnedFd,
    wake: Arc<OwnedFd>,
    start: Instant,
    /// Until then frames wait for ports that are about to come back.
    warm: Duration,
    batch: Vec<Frame>,
    spare: Vec<Vec<u8>>,
    verdicts: Vec<Verdict>,
    touched: BTreeSet<Slot>,
}

/// What a switch says about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Status {
    /// The revision of the program that it forwards by.
    pub program: Rev,
    /// Its plugs, and whether each one's runner is connected.
    pub plugs: BTreeMap<Id<Plug>, bool>,
    /// Flows that it remembers.
    #[serde(default)]
    pub flows: u64,
    /// Frames that it dropped, by reason.
    #[serde(default)]
    pub drops: BTreeMap<String, u64>,
}

/// What the thread of a switch is asked to do.
pub type Command = Box<dyn FnOnce(&mut Switch) + Send>;

impl Switch {
    /// A switch on `folder`, the network's folder of the host, with what that holds. `seed` keeps guests from choosing flows
    /// that meet in its table: draw it anew each time.
    ///
    /// # Errors
    /// `Unavailable` if the system gives no descriptors, or the folder cannot be read or understood.
    pub fn new(folder: PathBuf, agreed: Offloads, limits: Limits, seed: u64) -> Result<Self> {
        let failed = |e: io::Error| Error::unavailable("the switch could not start").because(&e);
        let events = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|e| failed(e.into()))?;
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let wake = wake.map_err(|e| failed(e.into()))?;
        epoll::add(&events, &wake, epoll::EventData::new_u64(WAKE), epoll::EventFlags::IN)
            .map_err(|e| failed(e.into()))?;
        let mut switch = Self {
            folder: Folder::new(folder),
            stored: None,
            pipeline: Pipeline::new(limits, agreed, seed),
            links: BTreeMap::new(),
            events,
            wake: Arc::new(wake),
            start: Instant::now(),
            warm: WARM,
            batch: Vec::with_capacity(BATCH),
            spare: Vec::new(),
            verdicts: Vec::with_capacity(BATCH),
            touched: BTreeSet::new(),
        };
        switch.reload()?;
        Ok(switch)
    }

    /// Lets frames wait so long, instead of 300 ms, for the ports that were there before it started.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.warm = patience;
        self
    }

    /// Wakes [`run`](Self::run) after a command was sent.
    pub fn waker(&self) -> Waker {
        Waker(self.wake.clone())
    }

    /// Takes over what the folder holds now: first the program, as a whole, then the plugs.
    ///
    /// # Errors
    /// `Unavailable` or `Invalid`: something cannot be read or compiled; the old program stays, and every plug that can be
    /// read is there.
    pub fn reload(&mut self) -> Result<()> {
        let programmed = self.reload_program();
        let plugged = self.reload_plugs();
        programmed.and(plugged)
    }

    fn reload_program(&mut self) -> Result<()> {
        let Some(stored) = self.folder.program()? else { return Ok(()) };
        // A repair brings the same one again, and often.
        if self.stored.as_ref() == Some(&stored) {
            return Ok(());
        }
        let program = Topology::new(stored.objects.clone())?.compile(stored.rev)?;
        self.pipeline.install(Arc::new(program));
        self.stored = Some(stored);
        Ok(())
    }

    fn reload_plugs(&mut self) -> Result<()> {
        let mut trouble = Ok(());
        let mut wanted = BTreeMap::new();
        for (id, plug) in self.folder.plugs()? {
            match plug {
                Ok(plug) => drop(wanted.insert(id, plug)),
                // It may be one that is plugged in: leave that as it is.
                Err(e) => trouble = Err(e),
            }
        }
        let keep = |link: &Link| match wanted.get(&link.id) {
            Some(plug) => link.is(plug),
            None => trouble.is_err(),
        };
        let gone: Vec<Slot> =
            self.links.iter().filter(|(_, link)| !keep(link)).map(|(slot, _)| *slot).collect();
        for slot in gone {
            self.links.remove(&slot);
            self.pipeline.unplug(slot);
        }
        for (id, plug) in wanted {
            if self.links.values().any(|link| link.id == id) {
                continue;
            }
            let counters = self.folder.counters(id, plug.spec.term)?;
            let slot = self.pipeline.plug(plug.spec.port);
            self.links.insert(slot, Link::new(id, &plug, counters));
        }
        trouble
    }

    /// What it says about itself.
    pub fn status(&self) -> Status {
        let reasons = crate::pipeline::Reason::ALL.iter();
        let mut drops: BTreeMap<_, _> =
            reasons.map(|r| (format!("{r:?}"), self.pipeline.drops().of(*r))).collect();
        for link in self.links.values() {
            let (full, broken) = link.losses();
            *drops.entry("RingFull".to_owned()).or_default() += full;
            *drops.entry("RingBroken".to_owned()).or_default() += broken;
        }
        drops.retain(|_, n| *n > 0);
        Status {
            program: self.pipeline.program().rev(),
            plugs: self.links.values().map(|link| (link.id, link.is_up())).collect(),
            flows: self.pipeline.flows() as u64,
            drops,
        }
    }

    /// Says what the program does with a packet.
    ///
    /// # Errors
    /// As [`Pipeline::explain`].
    pub fn explain(&self, query: &PacketQuery) -> Result<Trace> {
        self.pipeline.explain(query)
    }

    /// Moves frames until the senders of commands are gone.
    ///
    /// # Errors
    /// `Unavailable` if waiting itself fails.
    pub fn run(&mut self, commands: &Receiver<Command>) -> Result<()> {
        loop {
            loop {
                match commands.try_recv() {
                    Ok(command) => command(self),
                    Err(std::sync::mpsc::TryRecvError::Empty) => break,
                    Err(std::sync::mpsc::TryRecvError::Disconnected) => return Ok(()),
                }
            }
            let pause = if self.step() { Duration::ZERO } else { LONGEST };
            self.wait(pause)?;
        }
    }

    /// One turn: dials, moves a batch of frames of each port, sends what is due. Says whether there is more to do at once.
    fn step(&mut self) -> bool {
        let now = self.start.elapsed();
        self.dial(now);
        let busy = !self.is_warming(now) && self.forward(now);
        if self.pipeline.next_deadline().is_some_and(|due| due <= now) {
            self.tick(now);
        }
        // Before it sleeps it asks to be woken, and looks once more.
        busy || (!self.is_warming(now) && self.links.values_mut().any(Link::sleep))
    }

    /// Dials the ports whose time has come.
    fn dial(&mut self, now: Duration) {
        for (slot, link) in &mut self.links {
            if let Some(socket) = link.dial(now) {
                let data = epoll::EventData::new_u64(u64::from(slot.0) + FIRST_LINK);
                if epoll::add(&self.events, socket, data, epoll::EventFlags::IN).is_err() {
                    link.hang_up(now);
                }
            }
        }
    }

    fn is_warming(&self, now: Duration) -> bool {
        now < self.warm && self.links.values().any(Link::is_coming)
    }

    /// Moves up to a batch of frames of each port; says whether there was any.
    fn forward(&mut self, now: Duration) -> bool {
        let slots: Vec<Slot> = self.links.keys().copied().collect();
        let mut any = false;
        for slot in slots {
            any |= self.forward_from(slot, now);
        }
        any
    }

    fn forward_from(&mut self, slot: Slot, now: Duration) -> bool {
        let Some(link) = self.links.get_mut(&slot) else { return false };
        while self.batch.len() < BATCH {
            let mut bytes = self.spare.pop().unwrap_or_default();
            if !link.take(&mut bytes) {
                self.spare.push(bytes);
                break;
            }
            self.batch.push(Frame { from: slot, bytes });
        }
        let any = !self.batch.is_empty();
        self.pipeline.process(now, &mut self.batch, &mut self.verdicts);
        for (frame, verdict) in self.batch.drain(..).zip(&self.verdicts) {
            let to = match verdict {
                Verdict::Deliver(to) => Some(*to),
                Verdict::Reply => Some(slot),
                Verdict::Absorb | Verdict::Drop(_) => None,
            };
            if let Some(to) = to
                && let Some(link) = self.links.get_mut(&to)
                && link.give(&frame.bytes)
            {
                self.touched.insert(to);
            }
            self.spare.push(frame.bytes);
        }
        // First the receivers see the frames, then the sender gets its room back: who dies in between loses none.
        while let Some(to) = self.touched.pop_first() {
            if let Some(link) = self.links.get_mut(&to) {
                link.publish();
            }
        }
        if let Some(link) = self.links.get_mut(&slot) {
            link.release();
        }
        any
    }

    fn tick(&mut self, now: Duration) {
        let (links, touched) = (&mut self.links, &mut self.touched);
        self.pipeline.tick(now, |slot, bytes| {
            if let Some(link) = links.get_mut(&slot)
                && link.give(bytes)
            {
                touched.insert(slot);
            }
        });
        while let Some(to) = self.touched.pop_first() {
            if let Some(link) = self.links.get_mut(&to) {
                link.publish();
            }
        }
    }

    /// Waits for a doorbell, a command or a deadline, at most `pause`.
    fn wait(&mut self, pause: Duration) -> Result<()> {
        let now = self.start.elapsed();
        let dials = self.links.values().filter_map(Link::next_dial);
        let warm = self.is_warming(now).then_some(self.warm);
        let due = dials.chain(self.pipeline.next_deadline()).chain(warm).min();
        let pause = due.map_or(pause, |due| due.saturating_sub(now).min(pause));
        // `pause` is below a second.
        let pause = Timespec { tv_sec: 0, tv_nsec: i64::from(pause.subsec_nanos()) };
        let mut events: Vec<epoll::Event> = Vec::with_capacity(64);
        match epoll::wait(&self.events, rustix::buffer::spare_capacity(&mut events), Some(&pause)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(Error::unavailable("the switch cannot wait for its ports").because(&e)),
        }
        let now = self.start.elapsed();
        for event in events {
            match event.data.u64() {
                WAKE => drop(rustix::io::read(&self.wake, &mut [0; 8])),
                number => {
                    let slot = Slot(u32::try_from(number - FIRST_LINK).unwrap_or(u32::MAX));
                    self.hear(slot, now);
                }
            }
        }
        Ok(())
    }

    /// A port's socket has something to say.
    fn hear(&mut self, slot: Slot, now: Duration) {
        let Some(link) = self.links.get_mut(&slot) else { return };
        if link.hear(now) {
            // Its guest may just be coming up.
            self.pipeline.greet(slot);
        }
    }
}

/// Wakes a switch that waits.
#[derive(Clone, Debug)]
pub struct Waker(Arc<OwnedFd>);

impl Waker {
    /// Makes [`Switch::run`] look for commands.
    pub fn wake(&self) {
        // Fails only when the counter is full, and then it is about to wake anyway.
        let _ = rustix::io::write(self.0.as_fd(), &1u64.to_ne_bytes());
    }
}

/// Frames of one port that are moved at once.
const BATCH: usize = 64;
/// The longest time without a look around. Below a second, for `Timespec`'s sake.
const LONGEST: Duration = Duration::from_millis(999);
/// How long a switch that starts waits for ports that are about to come back. Runners take a millisecond on an idle host.
const WARM: Duration = Duration::from_millis(300);
/// The number of the wake-up descriptor among the events, and of the first slot.
const WAKE: u64 = 0;
const FIRST_LINK: u64 = 1;

#[cfg(test)]
mod tests;
