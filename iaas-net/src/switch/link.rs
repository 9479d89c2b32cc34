//! The switch's end of one plug: dialled, waiting for the ring, or up.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use iaas_core::Id;
use iaas_core::Term;
use iaas_core::model::Port;
use iaas_core::spi::dataplane::frame::VNET_HEADER;
use iaas_core::spi::network::Plug;

use crate::folder::Counters;
use crate::folder::StoredPlug;
use crate::folder::Totals;
use crate::port::ring::RingLink;
use crate::port::socket;

/// One plug.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) id: Id<Plug>,
    port: Id<Port>,
    term: Term,
    path: PathBuf,
    state: State,
    counters: Counters,
    totals: Totals,
    /// Frames that the guest's ring had no room for.
    full: u64,
    /// Times that earlier runners' numbers made no sense.
    broken: u64,
    /// How long to wait before the next dial.
    pause: Duration,
}

#[derive(Debug)]
enum State {
    /// Nobody listens; dial again then.
    Down(Duration),
    /// The runner has not sent the ring yet.
    Coming(OwnedFd),
    Up(Box<RingLink>),
}

impl Link {
    pub(super) fn new(id: Id<Plug>, plug: &StoredPlug, counters: Counters) -> Self {
        let totals = counters.totals();
        let (port, term, path) = (plug.spec.port, plug.spec.term, plug.socket.clone());
        Self {
            id,
            port,
            term,
            path,
            state: State::Down(Duration::ZERO),
            counters,
            totals,
            full: 0,
            broken: 0,
            pause: FIRST_REDIAL,
        }
    }

    /// Whether it is that plug's, unchanged.
    pub(super) fn is(&self, plug: &StoredPlug) -> bool {
        (self.port, self.term, &self.path) == (plug.spec.port, plug.spec.term, &plug.socket)
    }

    pub(super) fn is_up(&self) -> bool {
        matches!(self.state, State::Up(_))
    }

    pub(super) fn is_coming(&self) -> bool {
        matches!(self.state, State::Coming(_) | State::Down(Duration::ZERO))
    }

    /// When it is to be dialled.
    pub(super) fn next_dial(&self) -> Option<Duration> {
        if let State::Down(at) = self.state { Some(at) } else { None }
    }

    /// Dials if it is time; the new socket, if somebody listens.
    pub(super) fn dial(&mut self, now: Duration) -> Option<&OwnedFd> {
        if self.next_dial()? > now {
            return None;
        }
        match socket::dial(&self.path) {
            Ok(peer) => {
                self.state = State::Coming(peer);
                if let State::Coming(peer) = &self.state { Some(peer) } else { None }
            }
            Err(_) => {
                self.hang_up(now);
                None
            }
        }
    }

    /// Frames that the guest's ring had no room for, and times that its runner's numbers made no sense.
    pub(super) fn losses(&self) -> (u64, u64) {
        let now = if let State::Up(ring) = &self.state { ring.broken() } else { 0 };
        (self.full, self.broken + now)
    }

    /// Forgets the connection and dials again soon. Closing the socket takes it out of the events.
    pub(super) fn hang_up(&mut self, now: Duration) {
        (_, self.broken) = self.losses();
        self.state = State::Down(now.saturating_add(self.pause));
        self.pause = (self.pause * 2).min(LAST_REDIAL);
    }

    /// Reads what the socket says; `true` if the port has just come up.
    pub(super) fn hear(&mut self, now: Duration) -> bool {
        match &mut self.state {
            State::Down(_) => false,
            State::Up(ring) => {
                if !ring.drain() {
                    self.hang_up(now);
                }
                false
            }
            State::Coming(peer) => match come(peer) {
                Ok(None) => false,
                Ok(Some(ring)) => {
                    self.state = State::Up(Box::new(ring));
                    self.pause = FIRST_REDIAL;
                    true
                }
                Err(e) => {
                    tracing::warn!(plug = %self.id, error = %e, "a port's runner was not let in");
                    self.hang_up(now);
                    false
                }
            },
        }
    }

    /// Replaces `bytes` by the guest's next frame; `false` if there is none.
    pub(super) fn take(&mut self, bytes: &mut Vec<u8>) -> bool {
        let State::Up(ring) = &mut self.state else { return false };
        if !ring.next(bytes) {
            return false;
        }
        self.totals.tx_packets += 1;
        self.totals.tx_bytes += payload(bytes);
        true
    }

    /// Hands a frame to the guest; `false` if it cannot take it.
    pub(super) fn give(&mut self, bytes: &[u8]) -> bool {
        let State::Up(ring) = &mut self.state else { return false };
        if !ring.give(bytes) {
            self.full += 1;
            return false;
        }
        self.totals.rx_packets += 1;
        self.totals.rx_bytes += payload(bytes);
        true
    }

    /// Lets the guest see what was given.
    pub(super) fn publish(&mut self) {
        if let State::Up(ring) = &self.state {
            ring.publish();
            self.counters.set(self.totals);
        }
    }

    /// Gives back the room of what was taken.
    pub(super) fn release(&mut self) {
        if let State::Up(ring) = &mut self.state {
            self.counters.set(self.totals);
            ring.release();
        }
    }

    /// Asks to be rung for the next frame; `true` if one is there already.
    pub(super) fn sleep(&mut self) -> bool {
        if let State::Up(ring) = &mut self.state { ring.sleep() } else { false }
    }
}

fn come(peer: &OwnedFd) -> io::Result<Option<RingLink>> {
    let Some(memfd) = socket::receive_ring(peer)? else { return Ok(None) };
    // The clone shares the socket that the events already watch.
    RingLink::new(memfd, peer.try_clone()?).map(Some)
}

/// Bytes that the guest counts.
fn payload(frame: &[u8]) -> u64 {
    frame.len().saturating_sub(VNET_HEADER) as u64
}

/// How soon a port is dialled again, at first: a runner that starts again takes about as long.
const FIRST_REDIAL: Duration = Duration::from_millis(20);
/// And at last: a VM that is off costs its host a handful of system calls a second. Frames of one that comes up wait.
const LAST_REDIAL: Duration = Duration::from_millis(160);
